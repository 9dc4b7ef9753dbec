"""Group-relative policy optimisation: the clipped policy loss with a KL penalty.

N continuations, C tokens of the longest one.

    ratio = exp(logp - old),  kl = exp(ref - logp) - (ref - logp) - 1
    token = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * kl

How tokens become one number is ``loss_type``, under TRL 1.16's names. A step minimises the sum of
the rows of all its micro-batches over the sum of their weights:

    loss_type  a row                                weight of a micro-batch
    grpo       mean over its tokens                 its rows
    dr_grpo    sum over its tokens / maximal length its rows
    dapo       sum over its tokens                  its tokens
    bnpo       sum over its tokens / tokens of the  1
               micro-batch

In the first three, how rows are split into micro-batches changes nothing; TRL's, all of one size,
come to the same. ``bnpo`` is TRL's mean of micro-batch means, so it depends on the split.

Sources: Shao et al., DeepSeekMath, arXiv 2402.03300 (grpo); Liu et al., arXiv 2503.20783
(dr_grpo); Yu et al., arXiv 2503.14476 (dapo); TRL 1.16, ``GRPOTrainer._compute_loss`` (all).
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

    ``tokens_per_row`` is for dapo when the rollouts of one generation are used in several steps:
    TRL then divides each by the generation's mean step. Give the mean length over the generation's
    rows; None divides by the step's own tokens.
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
        max_completion_length: the fixed length that dr_grpo divides by.
        entropies: (N, C) in nats, for the metrics only.

    Raises:
        ValueError: ``beta`` without reference, dr_grpo without its length, unknown ``loss_type``.
    """
    here, advantage = mask != 0, advantages.unsqueeze(1)
    old = logps.detach() if old_logps is None else old_logps
    # Padding may hold anything, and infinity times zero is not zero.
    ratio = torch.exp((logps - old).masked_fill(~here, 0.0))
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    token = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    clipped = {"low": below, "high": above, "region": below | above}
    seen = {f"clip_ratio/{name}_mean": value.to(token.dtype) for name, value in clipped.items()}
    if beta != 0.0:
        if ref_logps is None:
            raise ValueError("beta is not 0, so ref_logps is needed")
        difference = (ref_logps - logps).masked_fill(~here, 0.0)
        kl = torch.exp(difference) - difference - 1
        token, seen["kl"] = token + beta * kl, kl
    if entropies is not None:
        seen["entropy"] = entropies
    sums, tokens = token.masked_fill(~here, 0.0).sum(1), here.sum(1)  # (N,)
    if loss_type == "grpo":
        rows = sums / tokens.clamp(min=1)
    elif loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("dr_grpo needs max_completion_length")
        rows = sums / max_completion_length
    elif loss_type == "dapo":
        rows = sums
    elif loss_type == "bnpo":
        rows = sums / tokens.sum().clamp(min=1)
    else:
        raise ValueError(f"loss_type is '{loss_type}', not grpo, dr_grpo, dapo or bnpo")
    count = tokens.sum()
    metrics = {n: (x.detach().masked_fill(~here, 0.0).sum(), count) for n, x in seen.items()}
    return GrpoLoss(rows, metrics)
