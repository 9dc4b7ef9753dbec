"""Advantages of whole groups: TRL's numbers, and unscored completions that touch nobody else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from mmemo.rewards.advantages import (
    Combined,
    ScaleRewards,
    advantage_parts,
    advantage_shares,
    combine,
    compared,
    fill_missing,
    group_advantages,
    group_std,
    zero_variance,
)

SCALES = ("group", "batch", "none")
NAN = math.nan
# Few values, so that ties and equal groups happen.
SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 1.3])
MAYBE = st.one_of(st.just(NAN), SCORE)


def trl_advantages(scores: torch.Tensor, weights: torch.Tensor, g: int, scale: str) -> torch.Tensor:
    """The lines of TRL 1.16's ``_generate_and_score_completions``, ``sum_then_normalize``."""
    unscorable = torch.isnan(scores).all(dim=1)
    rewards = (scores * weights.unsqueeze(0)).nansum(dim=1)
    rewards[unscorable] = torch.nan
    means = torch.nanmean(rewards.view(-1, g), dim=1).repeat_interleave(g, dim=0)
    if scale in ("group", "none"):
        std = nanstd(rewards.view(-1, g), dim=1).repeat_interleave(g, dim=0)
    else:
        std = nanstd(rewards).expand_as(rewards)
    advantages = rewards - means
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_equals_trl_where_all_is_scored(scale: str, group_size: int) -> None:
    torch.manual_seed(group_size)
    scores = torch.rand(5 * group_size, 3).round(decimals=1)
    weights = torch.tensor([0.3, 1.0, 0.5])
    ours = group_advantages(combine(scores, weights, group_size).total, group_size, scale)
    theirs = trl_advantages(scores, weights, group_size, scale)
    varied = ~zero_variance(combine(scores, weights, group_size).total, group_size)
    assert torch.equal(
        ours[varied.repeat_interleave(group_size)], theirs[varied.repeat_interleave(group_size)]
    )
    assert torch.allclose(ours, theirs, atol=5e-3)


def test_a_group_of_equals_gets_exactly_nothing_although_its_mean_is_rounded() -> None:
    rewards = torch.full((7,), 1.3)
    assert rewards.mean() != rewards[0]  # the rounding that TRL divides by 1e-4
    assert torch.equal(group_advantages(rewards, 7), torch.zeros(7))
    assert zero_variance(torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 1.0, NAN, NAN]), 2).tolist() == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("scale", SCALES)
def test_a_lone_scored_completion_gets_nothing(scale: str) -> None:
    rewards = torch.tensor([NAN, 1.0, NAN, NAN])
    assert torch.equal(group_advantages(rewards, 4, scale), torch.zeros(4))
    assert torch.equal(group_advantages(torch.full((4,), NAN), 4, scale), torch.zeros(4))


def test_groups_must_be_whole() -> None:
    with pytest.raises(ValueError, match="7 completions do not make whole groups of 4"):
        group_advantages(torch.zeros(7), 4)


@given(
    st.lists(st.lists(MAYBE, min_size=3, max_size=3), min_size=2, max_size=6),
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=3, max_size=3),
    st.sampled_from(SCALES),
)
def test_completions_that_nothing_scored_do_not_change_the_others(
    rows: list[list[float]], weights: list[float], scale: str
) -> None:
    """Taking them out of their group leaves the others' advantages alone."""
    scores, weight = torch.tensor(rows), torch.tensor(weights)
    # A reward of weight 0 scores nothing, so its scores are not what counts as scored.
    kept = compared(scores, weight)
    advantages = group_advantages(combine(scores, weight, len(rows)).total, len(rows), scale)
    assert (advantages[~kept] == 0).all()
    rest = scores[kept]
    if not len(rest):
        return
    alone = group_advantages(combine(rest, weight, len(rest)).total, len(rest), scale)
    assert torch.allclose(advantages[kept], alone, atol=1e-3)


@given(
    st.lists(st.lists(MAYBE, min_size=2, max_size=2), min_size=2, max_size=6),
    st.sampled_from(SCALES),
)
def test_a_missing_score_moves_nothing(rows: list[list[float]], scale: ScaleRewards) -> None:
    """The part of a reward in the advantage of a completion that it did not score is 0, and the
    reward's part in all advantages is that of the completions that it scored."""
    scores, size = torch.tensor(rows), len(rows)
    found = combine(scores, torch.tensor([1.0, 0.5]), size)
    parts = advantage_parts(found, size, scale)
    assert parts[scores.isnan()].abs().max() < 1e-3 if scores.isnan().any() else True
    assert fill_missing(scores, size)[~scores.isnan()].tolist() == scores[~scores.isnan()].tolist()


def test_a_completion_keeps_the_rewards_that_scored_it() -> None:
    """By hand: the judge scored three of four with mean 0.5, which the fourth receives."""
    scores = torch.tensor([[1.0, 0.25], [0.0, 0.5], [1.0, 0.75], [0.0, NAN]])
    found = combine(scores, torch.tensor([1.0, 1.0]), 4)
    assert found.total.tolist() == [1.25, 0.5, 1.75, 0.5]
    advantages = group_advantages(found.total, 4, "none")
    assert advantages.tolist() == [0.25, -0.5, 0.75, -0.5]
    assert advantage_parts(found, 4, "none")[3].tolist() == [-0.5, 0.0]


def test_missing_scores_among_equal_ones_add_no_variance() -> None:
    scores = torch.full((8, 1), 1.3)
    scores[7] = NAN
    assert torch.full((7,), 1.3).mean() != 1.3
    filled = fill_missing(scores, 8)
    assert (filled == filled[0]).all()


def test_a_reward_that_scored_nobody_is_left_out_of_the_group() -> None:
    weights = torch.tensor([1.0, 0.5])
    scores = torch.tensor([[1.0, NAN], [0.0, NAN], [1.0, 0.2], [0.0, NAN]])
    found = combine(scores, weights, 2)
    assert found.total[:2].tolist() == [1.0, 0.0]
    # In the second group it scored one of two: nobody is compared by it.
    assert found.total[2:].tolist() == pytest.approx([1.1, 0.1])


def test_a_reward_that_only_observes_may_be_missing() -> None:
    scores = torch.tensor([[1.0, NAN], [0.0, 0.4]])
    assert combine(scores, torch.tensor([1.0, 0.0]), 2).total.tolist() == [1.0, 0.0]


def test_the_order_of_groups_and_members_does_not_matter() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(12)
    order = torch.tensor([3, 1, 0, 2])
    moved = rewards.view(3, 4)[:, order].reshape(-1)
    whole = group_advantages(rewards, 4).view(3, 4)[:, order].reshape(-1)
    assert torch.allclose(group_advantages(moved, 4), whole, atol=1e-6)


def shares(combined: Combined, size: int, scale: ScaleRewards = "group") -> torch.Tensor:
    advantages = group_advantages(combined.total, size, scale)
    return advantage_shares(advantage_parts(combined, size, scale), advantages)


@pytest.mark.parametrize("scale", SCALES)
def test_parts_sum_to_the_advantages(scale: ScaleRewards) -> None:
    torch.manual_seed(2)
    scores = torch.rand(24, 3)
    scores[3, 1] = scores[7] = NAN
    scores[8:12] = 0.5
    found = combine(scores, torch.tensor([0.3, 1.0, 0.5]), 4)
    parts = advantage_parts(found, 4, scale)
    assert torch.allclose(parts.sum(1), group_advantages(found.total, 4, scale), atol=1e-5)
    assert not parts[8:12].any()
    assert parts[3, 1] == pytest.approx(0, abs=1e-5)  # the others scored it
    assert not parts[7].any()


def test_shares_sum_to_one_and_tell_who_moves_the_policy() -> None:
    scores = torch.tensor([[1.0, 0.5], [0.0, 0.5], [1.0, 0.5], [0.0, 0.5]])
    found = combine(scores, torch.tensor([1.0, 1.0]), 4)
    assert shares(found, 4).tolist() == pytest.approx([1.0, 0.0])
    torch.manual_seed(1)
    mixed = combine(torch.rand(16, 3), torch.tensor([0.3, 1.0, 0.5]), 4)
    for scale in SCALES:
        assert shares(mixed, 4, scale).sum() == pytest.approx(1.0, abs=1e-5)
    against = combine(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([1.0, 1.0]), 2)
    assert shares(against, 2)[1] < 0
    assert shares(combine(torch.ones(4, 2), torch.ones(2), 4), 4).tolist() == [0, 0]


def test_spread_inside_groups_is_unbiased() -> None:
    values = torch.tensor([1.0, 0.0, NAN, 5.0, NAN, NAN])
    assert group_std(values, 3)[0] == pytest.approx(math.sqrt(0.5))
    assert group_std(values, 3)[1].isnan()
