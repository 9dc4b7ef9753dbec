"""Group-relative policy optimisation: losses of the policy's ratio, with a KL penalty.

Shapes: N continuations, C tokens of the longest continuation.

    ratio = exp(logp - old)                            importance_sampling_level: token
    ratio = exp(mean over the tokens of logp - old)    importance_sampling_level: sequence
    kl = ratio * (exp(ref - logp) - (ref - logp) - 1)
    token = w * policy + beta * kl                     w: importance_ratio, 1 unless it is given

``loss_type``, under TRL 1.16's names, decides what the ratio does and how tokens are averaged. A
step minimises the sum of the rows of all its micro-batches divided by the sum of their weights:

    loss_type  policy   a row                                weight of a micro-batch
    grpo       clipped  mean over its tokens                 its rows
    dr_grpo    clipped  sum over its tokens / maximal length its rows
    dapo       clipped  sum over its tokens                  its tokens
    bnpo       clipped  sum / tokens of the micro-batch      1
    luspo      clipped  sum over its tokens                  its rows
    cispo      cispo    sum over its tokens                  its tokens
    sapo       sapo     mean over its tokens                 its rows

    clipped = -min(min(ratio, delta) * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
    cispo   = -stop_gradient(min(ratio, epsilon_high)) * A * logp
    sapo    = -4 / t * sigmoid(t * (ratio - 1)) * A, with a temperature t for each sign of A

GSPO is ``importance_sampling_level: sequence`` with ``loss_type: grpo``; LUSPO is GSPO whose rows
weigh by their length. All but ``bnpo`` do not depend on how rows are split into micro-batches, and
equal TRL's, whose micro-batches are all of one size. ``bnpo`` is TRL's mean of micro-batch means
and depends on the split.

Sources: Shao et al., DeepSeekMath, arXiv 2402.03300 (grpo); Liu et al., arXiv 2503.20783
(dr_grpo); Yu et al., arXiv 2503.14476 (dapo, epsilon_high); Zheng et al., GSPO, arXiv 2507.18071
(sequence); MiniMax-M1, arXiv 2506.13585 (cispo), with the upper limit alone as in ScaleRL, arXiv
2510.13786; SAPO, arXiv 2511.20347; LUSPO, arXiv 2602.05261; INTELLECT-2, arXiv 2505.07291 (delta);
DeepSeek-V3.2, arXiv 2512.02556 (the ratio that multiplies the kl); TRL 1.16,
``GRPOTrainer._compute_loss`` (all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo"]

ImportanceSamplingLevel = Literal["token", "sequence"]

PER_TOKEN = ("dapo", "cispo")
"""The loss types whose step is divided by its tokens."""


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
        tokens_per_row: for dapo and cispo, the mean length over a generation whose rollouts are
            split over several steps, by which TRL normalises each of them. None counts the step's
            own tokens.
    """
    if loss_type in PER_TOKEN:
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
    importance_sampling_level: ImportanceSamplingLevel = "token",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    use_bias_correction_kl: bool = True,
    max_completion_length: int | None = None,
    entropies: Tensor | None = None,
    importance_ratio: Tensor | None = None,
) -> GrpoLoss:
    """The loss of one micro-batch.

    Args:
        logps: (N, C) log-probabilities of the sampled tokens, with gradient.
        old_logps: (N, C) under the policy that sampled; None if that is the current policy.
        ref_logps: (N, C) under the reference; None if ``beta`` is 0.
        advantages: (N,).
        mask: (N, C), non-zero where a token counts. Rows of zeros, such as masked truncated
            completions, add nothing to the numerator and count as rows in the denominator, as in
            TRL.
        importance_sampling_level: a ratio for each token, or one for all tokens of a row, which is
            the geometric mean of theirs.
        epsilon: lower clipping range of the ratio.
        epsilon_high: upper clipping range; None uses ``epsilon``. For cispo, which clips nothing
            below, it is the largest ratio itself.
        delta: largest ratio where the advantage is negative; None sets no limit.
        sapo_temperatures: of positive advantages, and of the others.
        use_bias_correction_kl: multiply the kl by the ratio, which makes its gradient an unbiased
            estimate of the reverse KL's, also where the ratio is 1. DeepSeekMath's GRPO does not.
        max_completion_length: the fixed length that dr_grpo divides by.
        entropies: (N, C) in nats, only logged.
        importance_ratio: (N, C) or (N, 1), without gradient: what corrects a sampler other than
            the policy of ``old_logps`` (:mod:`mmemo.losses.off_policy`). As in TRL, not on the kl.

    Raises:
        ValueError: ``beta`` without reference, dr_grpo without its length, unknown ``loss_type``.
    """
    here = mask != 0
    ratio = _ratio(logps, old_logps, here, importance_sampling_level)
    limits = (epsilon, epsilon if epsilon_high is None else epsilon_high, delta)
    token, logged = _policy(logps, ratio, advantages[:, None], loss_type, limits, sapo_temperatures)
    if importance_ratio is not None:
        token = token * importance_ratio
    if beta != 0.0:
        kl = _kl(logps, ref_logps, here) * (ratio if use_bias_correction_kl else 1.0)
        token, logged["kl"] = token + beta * kl, kl
    if entropies is not None:
        logged["entropy"] = entropies
    sums, tokens = token.masked_fill(~here, 0.0).sum(1), here.sum(1)  # (N,)
    rows = _rows(sums, tokens, loss_type, max_completion_length)
    return GrpoLoss(rows, {name: _total(x.detach(), here) for name, x in logged.items()})


def _ratio(
    logps: Tensor, old_logps: Tensor | None, here: Tensor, level: ImportanceSamplingLevel
) -> Tensor:
    """(N, C), or (N, 1) for one of each sequence."""
    # If the current policy sampled, the ratio is exactly 1 and only its gradient counts.
    old = logps.detach() if old_logps is None else old_logps
    # Padding may hold infinities, and infinity times zero is NaN: masked, not multiplied by 0.
    log_ratio = (logps - old).masked_fill(~here, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
    return torch.exp(log_ratio)


def _kl(logps: Tensor, ref_logps: Tensor | None, here: Tensor) -> Tensor:
    """(N, C) Schulman's estimate of the KL divergence from the reference, which is never below
    0."""
    if ref_logps is None:
        raise ValueError("beta is not 0, so ref_logps is needed")
    difference = (ref_logps - logps).masked_fill(~here, 0.0)
    return torch.exp(difference) - difference - 1


def _policy(
    logps: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    loss_type: LossType,
    limits: tuple[float, float, float | None],
    temperatures: tuple[float, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss, (N, C) or (N, 1), and what is logged of it."""
    low, high, delta = limits
    if loss_type == "cispo":
        return _cispo(logps, ratio, advantage, high)
    if loss_type == "sapo":
        return _sapo(ratio, advantage, temperatures), {}
    return _clipped(ratio, advantage, 1 - low, 1 + high, delta)


def _clipped(
    ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss, (N, C) or (N, 1) as the ratio is, and what is clipped."""
    free = ratio if delta is None else ratio.clamp(max=delta)
    token = -torch.min(free * advantage, ratio.clamp(low, high) * advantage)
    # min() takes the clipped side only for these signs of the advantage; elsewhere nothing is
    # clipped.
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    clipped = {"low": below, "high": above, "region": below | above}
    return token, {f"clip_ratio/{name}_mean": x.float() for name, x in clipped.items()}


def _cispo(
    logps: Tensor, ratio: Tensor, advantage: Tensor, most: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with a limited importance weight: every token keeps a gradient."""
    token = -ratio.clamp(max=most).detach() * advantage * logps
    return token, {"cispo_clip_ratio": ((ratio > most) & (advantage > 0)).float()}


def _sapo(ratio: Tensor, advantage: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """The gradient fades as the ratio leaves 1, instead of stopping at a bound."""
    positive, other = temperatures
    temperature = torch.where(advantage > 0, positive, other)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage


def _total(values: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) over the tokens, or over the rows of (N, 1) values, as in TRL."""
    if values.shape[1] == 1 and here.shape[1] != 1:
        return values.sum(), torch.tensor(len(values), device=values.device)
    return values.masked_fill(~here, 0.0).sum(), here.sum()


def _rows(sums: Tensor, tokens: Tensor, loss_type: LossType, longest: int | None) -> Tensor:
    """(N,) the rows of the loss, from the sums (N,) and numbers (N,) of their tokens."""
    if loss_type in ("grpo", "bnpo", "sapo"):
        # A row whose tokens are all masked, such as a truncated completion, has a loss of 0.
        return sums / (tokens.sum() if loss_type == "bnpo" else tokens).clamp(min=1)
    if loss_type in ("dapo", "cispo", "luspo"):
        return sums
    if loss_type != "dr_grpo" or not longest:
        raise ValueError(f"loss_type '{loss_type}' is unknown, or lacks max_completion_length")
    return sums / longest
