"""Plans of epochs: pure, complete, grouped by length, with replay and difficulty order."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmemo.data.curriculum import CurriculumConfig, plan_epoch, stage_rows
from mmemo.data.sample import Sample, Turn
from mmemo.errors import DataError

TIERS = ("attribute", "expression", "emotion")


def make(tiers: list[str], difficulty: bool = True) -> list[Sample]:
    return [
        Sample(
            sample_id=str(index),
            turns=(Turn("user", "q"),),
            media={},
            tier=tier,
            difficulty=(index * 37 % 101) / 101 if difficulty else None,
        )
        for index, tier in enumerate(tiers)
    ]


tier_lists = st.lists(st.sampled_from(TIERS), min_size=1, max_size=60)


@settings(deadline=None)
@given(
    st.data(),
    tier_lists,
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from(["shuffle", "difficulty"]),
    st.booleans(),
    st.booleans(),
)
def test_a_plan_is_pure_and_shows_every_row_once(
    data: st.DataObject,
    tiers: list[str],
    batch_size: int,
    epoch: int,
    order: str,
    group: bool,
    first: bool,
) -> None:
    samples = make(tiers)
    lengths = data.draw(st.lists(st.integers(1, 500), min_size=len(tiers), max_size=len(tiers)))
    config = CurriculumConfig(
        order=order, group_by_length=group, longest_first=first, mega_batches=2
    )
    plan = plan_epoch(samples, config, lengths, batch_size, 7, epoch)
    assert plan == plan_epoch(samples, config, lengths, batch_size, 7, epoch)
    assert sorted(index for batch in plan for index in batch) == list(range(len(tiers)))
    assert all(len(batch) == batch_size for batch in plan[:-1])
    if first and len(tiers) >= batch_size:
        longest = max(max(lengths[i] for i in batch) for batch in plan if len(batch) == batch_size)
        assert max(lengths[index] for index in plan[0]) == longest


def test_epochs_and_seeds_differ() -> None:
    samples = make(["emotion"] * 64)
    lengths = [1] * 64
    plans = [
        plan_epoch(samples, CurriculumConfig(), lengths, 4, seed, epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def padding(plan: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in plan) - sum(lengths)


def test_grouping_by_length_saves_padding() -> None:
    lengths = [(index * 71) % 400 + 10 for index in range(256)]
    samples = make(["emotion"] * 256)
    grouped, plain = (
        plan_epoch(samples, CurriculumConfig(group_by_length=group), lengths, 8, 0, 0)
        for group in (True, False)
    )
    assert padding(grouped, lengths) < padding(plain, lengths) / 4


def test_a_stage_shows_its_tiers_and_a_share_of_the_earlier_ones() -> None:
    samples = make(["attribute"] * 100 + ["expression"] * 100 + ["emotion"] * 60)
    config = CurriculumConfig(tiers=["emotion"], replay_share=0.25)
    assert config.earlier() == ["attribute", "expression"]
    drawn = []
    for epoch in (0, 1):
        plan = plan_epoch(samples, config, [1] * 260, 4, 3, epoch)
        rows = [index for batch in plan for index in batch]
        own = [index for index in rows if samples[index].tier == "emotion"]
        assert sorted(own) == stage_rows(samples, config)
        assert len(rows) - len(own) == 20
        assert len(set(rows)) == len(rows)
        drawn.append({index for index in rows if index < 200})
    assert drawn[0] != drawn[1]


def test_easy_rows_come_first_and_replay_is_spread() -> None:
    samples = make(["attribute"] * 40 + ["emotion"] * 120)
    config = CurriculumConfig(
        tiers=["emotion"],
        replay_share=0.2,
        order="difficulty",
        mega_batches=1,
        longest_first=False,
    )
    plan = plan_epoch(samples, config, [1] * 160, 10, 0, 0)
    own = [[samples[i].difficulty or 0 for i in batch if i >= 40] for batch in plan]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(own))
    assert all(1 <= sum(i < 40 for i in batch) <= 3 for batch in plan)


def test_grouping_by_length_keeps_easy_rows_first() -> None:
    samples = make(["emotion"] * 960)
    lengths = [(index * 71) % 400 + 10 for index in range(960)]
    plan = plan_epoch(samples, CurriculumConfig(order="difficulty"), lengths, 8, 0, 0)
    means = [sum(samples[i].difficulty or 0 for i in batch) / 8 for batch in plan[1:]]
    places = range(len(means))
    assert statistics.correlation(list(places), means) > 0.97


def test_without_a_curriculum_tiers_are_mixed() -> None:
    samples = make(["attribute"] * 50 + ["emotion"] * 50)
    plan = plan_epoch(samples, CurriculumConfig(), [1] * 100, 10, 0, 0)
    assert sum(len({samples[i].tier for i in batch}) == 2 for batch in plan) >= 8


def test_what_cannot_be_planned_is_an_error() -> None:
    samples = make(["emotion"] * 4, difficulty=False)
    with pytest.raises(DataError, match="no row has the tier 'attribute'"):
        plan_epoch(samples, CurriculumConfig(tiers=["attribute"]), [1] * 4, 2, 0, 0)
    with pytest.raises(DataError, match=r"curriculum.order is 'difficulty'"):
        plan_epoch(samples, CurriculumConfig(order="difficulty"), [1] * 4, 2, 0, 0)
    with pytest.raises(DataError, match="earlier tiers attribute, expression to replay"):
        plan_epoch(samples, CurriculumConfig(tiers=["emotion"], replay_share=0.1), [1] * 4, 2, 0, 0)
    with pytest.raises(ValidationError, match="replay_share needs tiers"):
        CurriculumConfig(tiers=["attribute"], replay_share=0.1)
