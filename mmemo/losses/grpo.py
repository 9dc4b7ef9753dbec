"""Group-relative policy optimisation: the clipped policy loss with a KL penalty.

N continuations, C tokens of the longest one.

    ratio = exp(logp - old),  kl = ratio * (exp(ref - logp) - (ref - logp) - 1)
    token = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * kl

How tokens become one number is ``loss_type``, under TRL 1.16's names. A step minimises the sum of
the rows of all its micro-batches over the sum of their weights:

    loss_type  a row                                weight of a micro-batch
    grpo       mean over its tokens                 its rows
    dr_grpo    sum over its tokens / maximal length its rows
    dapo       sum over its tokens                  its tokens
    bnpo       sum / tokens of the micro-batch      1

In the first three, how rows are split into micro-batches changes nothing; TRL's, all of one size,
come to the same. ``bnpo`` is TRL's mean of micro-batch means, so it depends on the split.

Sources: Shao et al., DeepSeekMath, arXiv 2402.03300 (grpo); Liu et al., arXiv 2503.20783
(dr_grpo); Yu et al., arXiv 2503.14476 (dapo); DeepSeek-V3.2, arXiv 2512.02556 (the ratio before
the kl); TRL 1.16, ``GRPOTrainer._compute_loss`` (all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo"]


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """``rows``: (N,) with gradient, to be summed. ``metrics``: name -> (sum, count) over tokens,
    without gradient, under TRL's names."""

    rows: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


def grpo_weight(mask: Tensor, loss_type: LossType, *, tokens_per_row: float | None = None) -> float:
    """What a micro-batch with ``mask`` (N, C) adds to its step's normaliser.

    For dapo, ``tokens_per_row`` is the mean length over a generation whose rollouts are used in
    several steps, which TRL divides each by; None counts the step's own tokens.
    """
    if loss_type == "dapo":
        return float(mask.sum()) if tokens_per_row is None else len(mask) * tokens_per_row
    return 1.0 if loss_type == "bnpo" else float(len(mask))


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "dapo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    entropies: Tensor | None = None,
) -> GrpoLoss:
    """The loss of one micro-batch.

    Args:
        logps: (N, C) log-probabilities of the sampled tokens, with gradient.
        old_logps: (N, C) under the policy that sampled; None when that is the present one.
        ref_logps: (N, C) under the reference; None when ``beta`` is 0.
        advantages: (N,).
        mask: (N, C), non-zero where a token counts. To mask truncated completions, make their
            rows zero: as in TRL they add nothing above the line, and still count as rows below it.
        epsilon_high: upper clip; None is ``epsilon``.
        use_bias_correction_kl: the ratio before the kl, which makes its gradient the unbiased one
            of the reverse KL, also where the ratio is 1. DeepSeekMath's GRPO has none.
        max_completion_length: the fixed length that dr_grpo divides by.
        entropies: (N, C) in nats, for the metrics only.

    Raises:
        ValueError: ``beta`` without reference, dr_grpo without its length, unknown ``loss_type``.
    """
    here, advantage = mask != 0, advantages[:, None]
    old = logps.detach() if old_logps is None else old_logps
    # Padding may hold anything, and infinity times zero is not zero.
    ratio = torch.exp((logps - old).masked_fill(~here, 0.0))
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    token = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    clipped = {"low": below, "high": above, "region": below | above}
    seen = {f"clip_ratio/{name}_mean": x.float() for name, x in clipped.items()}
    if beta != 0.0:
        if ref_logps is None:
            raise ValueError("beta is not 0, so ref_logps is needed")
        difference = (ref_logps - logps).masked_fill(~here, 0.0)
        kl = (torch.exp(difference) - difference - 1) * (ratio if use_bias_correction_kl else 1.0)
        token, seen["kl"] = token + beta * kl, kl
    if entropies is not None:
        seen["entropy"] = entropies
    sums, tokens = token.masked_fill(~here, 0.0).sum(1), here.sum(1)  # (N,)
    rows = _rows(sums, tokens, loss_type, max_completion_length)
    masked = {name: x.detach().masked_fill(~here, 0.0).sum() for name, x in seen.items()}
    return GrpoLoss(rows, {name: (total, tokens.sum()) for name, total in masked.items()})


def _rows(sums: Tensor, tokens: Tensor, loss_type: LossType, longest: int | None) -> Tensor:
    """(N,) what each row adds, from its tokens' sum and number."""
    if loss_type in ("grpo", "bnpo"):
        return sums / (tokens if loss_type == "grpo" else tokens.sum()).clamp(min=1)
    if loss_type == "dapo":
        return sums
    if loss_type != "dr_grpo" or not longest:
        raise ValueError(f"loss_type '{loss_type}' is unknown, or lacks max_completion_length")
    return sums / longest
