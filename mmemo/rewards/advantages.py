"""Group-relative advantages from rewards, where some completions could not be scored.

The numbers are those of TRL 1.16's ``GRPOTrainer`` wherever every completion of a group is scored,
and the options have its names.

N completions stand prompt by prompt, G (``group_size``) of each prompt; K rewards; NaN marks what
is unscored. Groups must be whole, so gather the scores of all ranks first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]
"""What advantages are divided by: the standard deviation of the group, of the batch, or nothing."""

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


@dataclass(frozen=True, slots=True)
class Combined:
    """``total``: (N,) weighted sum of the rewards; NaN for unscored completions.
    ``parts``: (N, K) the part of each reward in it; 0 where it adds nothing."""

    total: Tensor
    parts: Tensor


def compared(scores: Tensor, weights: Tensor) -> Tensor:
    """(N,) bool mask of the completions that are compared within their group: those that at least
    one reward scored. Rewards of weight 0 are ignored.

    Args:
        scores: (N, K); NaN where a reward returned None.
        weights: (K,).
    """
    return (~scores.isnan() & (weights != 0)).any(dim=1)


def fill_missing(scores: Tensor, group_size: int) -> Tensor:
    """(N, K) scores in which a missing one is the mean of its group, so that it moves nothing: the
    completion is compared by the rewards that scored it. A reward that scored no completion of a
    group is 0 in all of it.

    TRL takes a missing score as 0 instead, which charges the model for the scorer's failure.

    Raises:
        ValueError: N is no multiple of G.
    """
    _check_groups(len(scores), group_size)
    groups = scores.view(-1, group_size, scores.shape[1])
    missing = groups.isnan()
    means = groups.nanmean(dim=1, keepdim=True)
    # The mean of equal scores is rounded; within their limits it equals them, and adds no variance.
    lowest = torch.where(missing, torch.inf, groups).amin(dim=1, keepdim=True)
    highest = torch.where(missing, -torch.inf, groups).amax(dim=1, keepdim=True)
    means = torch.minimum(torch.maximum(means, lowest), highest).nan_to_num(nan=0.0)
    return torch.where(missing, means, groups).view_as(scores)


def combine(
    scores: Tensor, weights: Tensor, group_size: int, factors: Tensor | None = None
) -> Combined:
    """Sum the rewards of each completion that any of them scored; see :func:`fill_missing`.

    Args:
        scores: (N, K); NaN where a reward returned None.
        weights: (K,).
        group_size: G.
        factors: (N, K) factors of the weights, such as how far a reward is trusted.
    """
    kept = compared(scores, weights)
    effective = weights if factors is None else weights * factors
    parts = fill_missing(scores, group_size) * effective
    parts = torch.where(kept[:, None], parts, 0.0)
    total = parts.sum(dim=1)
    # NaN, not 0, so that the means and deviations of the group leave the completion out.
    return Combined(torch.where(kept, total, torch.nan), parts)


def group_advantages(
    rewards: Tensor, group_size: int, scale_rewards: ScaleRewards = "group"
) -> Tensor:
    """(N,) advantages: each reward minus its group's mean, scaled.

    Unscored completions (NaN) get 0 and do not affect the others. A group whose scored rewards are
    all equal gets exactly 0; TRL leaves the rounding error of the mean there, which the division by
    ``EPSILON`` enlarges ten thousand times.

    Args:
        rewards: (N,); NaN where unscored.
        group_size: G.
        scale_rewards: what the differences are divided by.

    Raises:
        ValueError: N is no multiple of G.
    """
    _check_groups(len(rewards), group_size)
    means = rewards.view(-1, group_size).nanmean(dim=1).repeat_interleave(group_size)
    advantages = (rewards - means) / _divisor(rewards, group_size, scale_rewards)
    flat = zero_variance(rewards, group_size).repeat_interleave(group_size)
    return torch.where(flat, 0.0, advantages).nan_to_num(nan=0.0)


def zero_variance(rewards: Tensor, group_size: int) -> Tensor:
    """(N/G,) bool mask of groups without a learning signal: no two scored rewards differ."""
    groups = rewards.view(-1, group_size)
    unscored = groups.isnan()
    # In a group without any score the two limits are -inf and inf, so it has no learning signal.
    highest = groups.masked_fill(unscored, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(dim=1)
    return highest <= lowest


def advantage_parts(
    combined: Combined, group_size: int, scale_rewards: ScaleRewards = "group"
) -> Tensor:
    """(N, K) part of each reward in the advantages, which are the sums over the rewards up to
    rounding. 0 for unscored completions and in groups whose totals are all equal."""
    total = combined.total
    scored = ~total.isnan()
    # The parts are averaged over the same completions as the totals, else they would not sum to the
    # advantages.
    parts = torch.where(scored[:, None], combined.parts, torch.nan)
    means = parts.view(-1, group_size, parts.shape[1]).nanmean(dim=1)
    centred = parts - means.repeat_interleave(group_size, dim=0)
    # All parts are divided by the deviation of the totals, because each part's own would break the
    # sum.
    centred = centred / _divisor(total, group_size, scale_rewards)[:, None]
    flat = zero_variance(total, group_size).repeat_interleave(group_size)
    return torch.where(flat[:, None], 0.0, centred).nan_to_num(nan=0.0)


def advantage_shares(parts: Tensor, advantages: Tensor) -> Tensor:
    """(K,) share of each reward in the squared advantages; the shares sum to 1.

    A reward that works against the sum has a negative share. All shares are 0 where all advantages
    are.

    Args:
        parts: (N, K) from :func:`advantage_parts`, or a mixture of several such results if the
            advantages are one.
        advantages: (N,).
    """
    # The parts of a completion sum to its advantage, so these products sum to the squared
    # advantages.
    moved = (parts * advantages[:, None]).sum(dim=0)
    whole = moved.sum()
    return moved / whole if whole > 0 else torch.zeros_like(moved)


def group_std(values: Tensor, group_size: int) -> Tensor:
    """(N/G,) unbiased standard deviation of each group's scored values; NaN with fewer than two."""
    return _std(values.view(-1, group_size), 1)


def _divisor(rewards: Tensor, group_size: int, scale_rewards: ScaleRewards) -> Tensor:
    """(N,) divisor of each completion's difference from its group's mean."""
    if scale_rewards == "none":
        return torch.ones_like(rewards)
    if scale_rewards == "batch":
        return _std(rewards, None).expand_as(rewards) + EPSILON
    return group_std(rewards, group_size).repeat_interleave(group_size) + EPSILON


def _std(values: Tensor, dim: int | None) -> Tensor:
    """Unbiased standard deviation that ignores NaN, in TRL's order of operations, so that it equals
    TRL's to the last bit."""
    means = values.nanmean(dim=dim, keepdim=True)
    variance = ((values - means) ** 2).nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    # A single value has no deviation, and its correction would divide by 0.
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    std = (variance * correction).sqrt()
    return std.squeeze() if dim is None else std.squeeze(dim)


def _check_groups(number: int, group_size: int) -> None:
    if group_size < 1 or number % group_size:
        raise ValueError(f"{number} completions do not make whole groups of {group_size}")
