"""Which prompts the steps of a GRPO run use."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.sample import Sample
from mmemo.train.grpo.data import GrpoData
from mmemo.train.stage import Rows


class Counting:
    """A collator that counts."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, samples: list[Sample], *, generation: bool) -> dict[str, Any]:
        self.calls.append([one.sample_id for one in samples])
        return {"sample_ids": self.calls[-1]}


def data(together: int = 1, repeats: int = 1, rows: int = 10, kept: int = 1) -> GrpoData:
    """``rows`` prompts, three a step."""
    samples = [Sample(str(at), (), {}) for at in range(rows)]
    found: Any = Rows(kept=samples, lengths=[at + 1 for at in range(rows)], source=None)  # type: ignore[arg-type]
    collator: Any = Counting()
    return GrpoData(
        found,
        collator,
        parse(CurriculumConfig, {}),
        3,
        seed=4,
        together=together,
        repeats=repeats,
        kept_batches=kept,
    )


def test_steps_of_a_generation_are_taken_in_turn_and_then_again() -> None:
    plain = data().plan(2)
    assert [len(rows) for rows in plain] == [3, 3, 3, 1]
    a, b, c, d = plain
    assert data(together=2, repeats=2).plan(2) == [a, b, a, b, c, d, c, d]
    # What is left of an epoch is a generation of its own.
    assert data(together=3, repeats=2).plan(2) == [a, b, c, a, b, c, d, d]
    assert data(repeats=3).plan(2) == [rows for rows in plain for _ in range(3)]


@pytest.mark.parametrize(("together", "repeats"), [(1, 1), (1, 2), (2, 2), (3, 1), (9, 2)])
def test_a_step_knows_its_generation(together: int, repeats: int) -> None:
    one = data(together, repeats)
    plan = one.plan(1)
    for batch, rows in enumerate(plan):
        generation = one.generation(1, batch)
        assert generation[batch % (together * repeats) % len(generation)] == rows
        assert len(generation) <= together


def test_further_prompts_are_those_that_come_next() -> None:
    one = data(together=2)
    a, b, c, d = one.plan(0)
    assert one.further(0, 0) == c + d
    assert one.further(0, 1) == c + d
    assert one.further(0, 3) == a + b
    small = data()
    a, b, c, d = small.plan(0)
    assert small.further(0, 1) == c + d + a
    assert data(together=9).further(0, 2) == []


def test_batches_of_a_generation_are_collated_once() -> None:
    one = data(together=2, repeats=2, kept=2)
    for rows in one.plan(0)[:4]:
        one.collate(rows)
    calls: Any = one.collator
    assert len(calls.calls) == 2
    # And no more are kept.
    for rows in one.plan(0)[4:]:
        one.collate(rows)
    one.collate(one.plan(0)[0])
    assert len(calls.calls) == 5
