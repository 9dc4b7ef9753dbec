"""Group-relative policy optimisation: the clipped policy loss with a KL penalty.

Shapes: N continuations, C tokens of the longest continuation.

    ratio = exp(logp - old),  kl = ratio * (exp(ref - logp) - (ref - logp) - 1)
    token = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * kl

``loss_type``, under TRL 1.16's names, decides how tokens are averaged. A step minimises the sum of
the rows of all its micro-batches divided by the sum of their weights:

    loss_type  a row                                weight of a micro-batch
    grpo       mean over its tokens                 its rows
    dr_grpo    sum over its tokens / maximal length its rows
    dapo       sum over its tokens                  its tokens
    bnpo       sum / tokens of the micro-batch      1

The first three do not depend on how rows are split into micro-batches, and equal TRL's, whose
micro-batches are all of one size. ``bnpo`` is TRL's mean of micro-batch means and depends on the
split.

Sources: Shao et al., DeepSeekMath, arXiv 2402.03300 (grpo); Liu et al., arXiv 2503.20783
(dr_grpo); Yu et al., arXiv 2503.14476 (dapo); DeepSeek-V3.2, arXiv 2512.02556 (the ratio that
multiplies the kl); TRL 1.16, ``GRPOTrainer._compute_loss`` (all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo"]


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """The loss of a micro-batch, to be summed over its rows."""

    rows: Tensor
    """(N,) with gradient."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """name -> (sum, count) over tokens, without gradient, under TRL's names."""


def grpo_weight(mask: Tensor, loss_type: LossType, *, tokens_per_row: float | None = None) -> float:
    """The weight of a micro-batch with ``mask`` (N, C): its part of the step's normaliser.

    Args:
        tokens_per_row: for dapo, the mean length over a generation whose rollouts are used in
            several steps, by which TRL normalises each of them. None counts the step's own tokens.
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
        old_logps: (N, C) under the policy that sampled; None if that is the current policy.
        ref_logps: (N, C) under the reference; None if ``beta`` is 0.
        advantages: (N,).
        mask: (N, C), non-zero where a token counts. To mask truncated completions, set their rows
            to zero: as in TRL, they add nothing to the numerator and still count as rows in the
            denominator.
        epsilon: lower clipping range of the ratio.
        epsilon_high: upper clipping range; None uses ``epsilon``.
        use_bias_correction_kl: multiply the kl by the ratio, which makes its gradient an unbiased
            estimate of the reverse KL's, also where the ratio is 1. DeepSeekMath's GRPO does not.
        max_completion_length: the fixed length that dr_grpo divides by.
        entropies: (N, C) in nats, only logged.

    Raises:
        ValueError: ``beta`` without reference, dr_grpo without its length, unknown ``loss_type``.
    """
    here, advantage = mask != 0, advantages[:, None]
    # If the current policy sampled, the ratio is exactly 1 and only its gradient counts.
    old = logps.detach() if old_logps is None else old_logps
    # Padding may hold infinities, and infinity times zero is NaN: masked, not multiplied by 0.
    ratio = torch.exp((logps - old).masked_fill(~here, 0.0))
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    token = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    # min() takes the clipped side only for these signs of the advantage; elsewhere nothing is
    # clipped.
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    clipped = {"low": below, "high": above, "region": below | above}
    logged = {f"clip_ratio/{name}_mean": x.float() for name, x in clipped.items()}
    if beta != 0.0:
        if ref_logps is None:
            raise ValueError("beta is not 0, so ref_logps is needed")
        difference = (ref_logps - logps).masked_fill(~here, 0.0)
        kl = (torch.exp(difference) - difference - 1) * (ratio if use_bias_correction_kl else 1.0)
        token, logged["kl"] = token + beta * kl, kl
    if entropies is not None:
        logged["entropy"] = entropies
    sums, tokens = token.masked_fill(~here, 0.0).sum(1), here.sum(1)  # (N,)
    rows = _rows(sums, tokens, loss_type, max_completion_length)
    masked = {name: x.detach().masked_fill(~here, 0.0).sum() for name, x in logged.items()}
    return GrpoLoss(rows, {name: (total, tokens.sum()) for name, total in masked.items()})


def _rows(sums: Tensor, tokens: Tensor, loss_type: LossType, longest: int | None) -> Tensor:
    """(N,) the rows of the loss, from the sums (N,) and numbers (N,) of their tokens."""
    if loss_type in ("grpo", "bnpo"):
        # A row whose tokens are all masked, such as a truncated completion, has a loss of 0.
        return sums / (tokens if loss_type == "grpo" else tokens.sum()).clamp(min=1)
    if loss_type == "dapo":
        return sums
    if loss_type != "dr_grpo" or not longest:
        raise ValueError(f"loss_type '{loss_type}' is unknown, or lacks max_completion_length")
    return sums / longest
