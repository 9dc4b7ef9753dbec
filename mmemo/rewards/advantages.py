"""From the rewards of whole groups to advantages, where some completions could not be scored.

N completions stand prompt by prompt, G (``group_size``) of each prompt; K rewards; NaN: unscored.
Groups must be whole: gather the scores of all ranks first. The numbers are those of TRL 1.16's
``GRPOTrainer`` wherever every completion of a group is scored, with its option names.
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
    """``total``: (N,) weighted sum of the rewards, NaN for unscored completions.
    ``parts``: (N, K) what each reward adds to it, 0 where it adds nothing."""

    total: Tensor
    parts: Tensor


def comparable(scores: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """(N,) bool: which completions of each group are compared with each other.

    Those that were scored by the same rewards: the rewards of the completion whose scored rewards
    weigh most. So a reward that scored nobody in a group is left out of the group, and where it
    scored some, the others count as unscored; a sum with one term missing says nothing. TRL takes
    a missing term as 0 instead, which charges the model for the scorer's failure. Which ones are
    compared does not change when a completion that is not compared is taken away.

    Args:
        scores: (N, K); NaN where a reward gave None.
        weights: (K,); rewards of weight 0 do not matter here.
    """
    _check_groups(len(scores), group_size)
    scored = ~scores.isnan() & (weights != 0)
    weight = (scored * weights.double().abs()).sum(dim=1)
    # Sets of equal weight are told apart by the order of the rewards.
    bits = 2.0 ** torch.arange(len(weights) - 1, -1, -1, dtype=torch.float64, device=scores.device)
    code = (scored * bits).sum(dim=1)
    groups = (-1, group_size)
    heaviest = weight.view(groups).amax(dim=1).repeat_interleave(group_size)
    code = torch.where(weight == heaviest, code, torch.zeros_like(code))
    chosen = code.view(groups).amax(dim=1).repeat_interleave(group_size)
    return (code == chosen) & (chosen > 0)


def combine(
    scores: Tensor, weights: Tensor, group_size: int, factors: Tensor | None = None
) -> Combined:
    """Sum the rewards of each completion that is :func:`comparable`.

    Args:
        scores: (N, K); NaN where a reward gave None.
        weights: (K,).
        factors: (N, K) multiplied to the weights, such as how far a reward is trusted.
    """
    kept = comparable(scores, weights, group_size)
    effective = weights if factors is None else weights * factors
    parts = torch.where(scores.isnan(), 0.0, scores) * effective
    parts = torch.where(kept[:, None], parts, 0.0)
    total = parts.sum(dim=1)
    return Combined(torch.where(kept, total, torch.nan), parts)


def group_advantages(
    rewards: Tensor, group_size: int, scale_rewards: ScaleRewards = "group"
) -> Tensor:
    """(N,) advantages: each reward less its group's mean, scaled.

    Unscored completions (NaN) get 0 and change nobody else's advantage. A group whose scored
    rewards are all equal gets exactly 0; TRL leaves a rounding error of the mean there, which the
    division by ``EPSILON`` makes ten thousand times larger.

    Args:
        rewards: (N,); NaN for unscored.
    """
    _check_groups(len(rewards), group_size)
    means = rewards.view(-1, group_size).nanmean(dim=1).repeat_interleave(group_size)
    advantages = (rewards - means) / _divisor(rewards, group_size, scale_rewards)
    flat = zero_variance(rewards, group_size).repeat_interleave(group_size)
    return torch.where(flat, 0.0, advantages).nan_to_num(nan=0.0)


def zero_variance(rewards: Tensor, group_size: int) -> Tensor:
    """(N/G,) bool: groups that teach nothing, having no two scored rewards that differ."""
    groups = rewards.view(-1, group_size)
    unscored = groups.isnan()
    highest = groups.masked_fill(unscored, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(dim=1)
    return highest <= lowest


def advantage_parts(
    combined: Combined, group_size: int, scale_rewards: ScaleRewards = "group"
) -> Tensor:
    """(N, K) what each reward adds to the advantages, which are the sums over the rewards up to
    rounding. 0 for unscored completions and in groups whose totals are all equal."""
    total = combined.total
    scored = ~total.isnan()
    parts = torch.where(scored[:, None], combined.parts, torch.nan)
    means = parts.view(-1, group_size, parts.shape[1]).nanmean(dim=1)
    centred = parts - means.repeat_interleave(group_size, dim=0)
    centred = centred / _divisor(total, group_size, scale_rewards)[:, None]
    flat = zero_variance(total, group_size).repeat_interleave(group_size)
    return torch.where(flat[:, None], 0.0, centred).nan_to_num(nan=0.0)


def advantage_shares(parts: Tensor, advantages: Tensor) -> Tensor:
    """(K,) the share of each reward in the squared advantages; the shares sum to 1.

    A reward that works against the sum has a negative share. All are 0 where nothing differs.

    Args:
        parts: (N, K) of :func:`advantage_parts`, or mixed from several as the advantages were.
        advantages: (N,).
    """
    moved = (parts * advantages[:, None]).sum(dim=0)
    whole = moved.sum()
    return moved / whole if whole > 0 else torch.zeros_like(moved)


def group_std(values: Tensor, group_size: int) -> Tensor:
    """(N/G,) unbiased standard deviation of each group's scored values; NaN below two of them."""
    return _std(values.view(-1, group_size), 1)


def _divisor(rewards: Tensor, group_size: int, scale_rewards: ScaleRewards) -> Tensor:
    """(N,) what each completion's distance from its group's mean is divided by."""
    if scale_rewards == "none":
        return torch.ones_like(rewards)
    if scale_rewards == "batch":
        return _std(rewards, None).expand_as(rewards) + EPSILON
    return group_std(rewards, group_size).repeat_interleave(group_size) + EPSILON


def _std(values: Tensor, dim: int | None) -> Tensor:
    """Unbiased standard deviation without NaN, in TRL's order of operations."""
    means = values.nanmean(dim=dim, keepdim=True)
    variance = ((values - means) ** 2).nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    std = (variance * correction).sqrt()
    return std.squeeze() if dim is None else std.squeeze(dim)


def _check_groups(number: int, group_size: int) -> None:
    if group_size < 1 or number % group_size:
        raise ValueError(f"{number} completions do not make whole groups of {group_size}")
