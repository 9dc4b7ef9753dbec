"""Calibration: rank correlation as scipy has it, intervals from speakers, an honest table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr

from mmemo.errors import EvaluationError
from mmemo.rewards.judge.calibration import (
    Graded,
    calibrate,
    calibration_table,
    draw_calibration,
    facts_read,
    headline,
    read_headline,
    refusal,
    reward_of,
    spearman,
    swap_facts,
)
from mmemo.rewards.judge.rubric import DIMENSIONS, JudgeItem
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=200)


def rows_of(number: int, noise: float, speakers: int = 8) -> list[Graded]:
    rng = np.random.default_rng(0)
    known = rng.integers(1, 6, size=(number, 4))
    given = known + noise * rng.normal(size=known.shape)
    return [
        Graded(list(given[k]), list(known[k]), f"s{k % speakers}", {"filler": 1} if k % 2 else {})
        for k in range(number)
    ]


def test_spearman_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(1, 6, 200).astype(float), rng.normal(size=200)
    other += one
    assert spearman(one, other) == pytest.approx(float(spearmanr(one, other)[0]))
    assert spearman(one, -one) == pytest.approx(-1)
    assert np.isnan(spearman(one, np.ones(200)))


def test_a_perfect_scorer_and_a_blind_one_are_told_apart() -> None:
    best = calibrate(rows_of(160, 0.0), CONFIG)
    blind = calibrate(rows_of(160, 50.0), CONFIG)
    for name in DIMENSIONS:
        found = best["dimensions"][name]
        assert found["spearman"]["value"] == pytest.approx(1)
        assert found["mean_absolute_error"] == 0
        assert found["exact"] == 1
        blurred = blind["dimensions"][name]["spearman"]
        assert blurred["low"] < 0.1 < blurred["high"] + 0.3
    assert best["n"] == 160
    assert best["speakers"] == 8
    assert best["faults"]["filler"]["n"] == best["faults"]["none"]["n"] == 80


def test_intervals_come_from_speakers_not_rows() -> None:
    """Rows of one speaker that repeat one answer make no narrower interval."""
    rows = rows_of(40, 1.0, speakers=40)
    once, often = calibrate(rows, CONFIG), calibrate(rows * 5, CONFIG)
    name = DIMENSIONS[0]
    one, many = (found["dimensions"][name]["spearman"] for found in (once, often))
    assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], abs=0.02)
    alone = calibrate(rows_of(40, 1.0, speakers=1), CONFIG)["dimensions"][name]["spearman"]
    assert alone["value"] is not None
    assert alone["low"] is alone["high"] is None


def test_table_and_plot_say_what_was_found(tmp_path: Path) -> None:
    found = calibrate(rows_of(80, 0.5), CONFIG)
    page = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    page.print(calibration_table(found))
    text = page.export_text()
    assert "factual alignment" in text
    assert f"{found['dimensions'][DIMENSIONS[0]]['spearman']['value']:.3f}" in text
    assert "80 rows of 8 held-out speakers" in text
    draw_calibration(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_row_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no row could be graded"):
        calibrate([], CONFIG)


# Whether a judge reads the facts.

WORDS = ("angry", "sad", "happy", "calm")


def asked(number: int = 80) -> tuple[list[JudgeItem], list[tuple[int, ...]], list[str]]:
    """Answers of which half name the emotion of their clip."""
    items, known = [], []
    for k in range(number):
        emotion, said = WORDS[k // 2 % 4], WORDS[(k // 2 + k % 2) % 4]
        items.append(JudgeItem("q", f"They are {said} {k}.", f"- emotion: {emotion} {k // 2}"))
        known.append((1, 5, 5, 5) if k % 2 else (5, 5, 5, 5))
    return items, known, [f"s{k // 8}" for k in range(number)]


def reads(items: Sequence[JudgeItem]) -> list[tuple[float, ...] | None]:
    words = [(item.completion.split()[2], item.facts.split()[2]) for item in items]
    return [(5.0 if said == true else 1.0, 5, 5, 5) for said, true in words]


def blind(items: Sequence[JudgeItem]) -> list[tuple[float, ...] | None]:
    """Knows which answers are right without the facts, as one that learnt their wording does."""
    return [(5.0 - int(item.completion.split()[3][:-1]) % 2 * 4, 5, 5, 5) for item in items]


def test_a_judge_that_reads_the_facts_loses_by_other_facts() -> None:
    items, known, speakers = asked()
    found = facts_read(items, known, speakers, reads, CONFIG)
    # Half way round: 20 clips on, where the emotion is the same again for none but every fourth.
    swapped = found["swapped"]
    assert swapped["own"] == 5
    drop = swapped["own"] - swapped["other"]
    assert swapped["drop"]["value"] == pytest.approx(drop)
    assert found["constant"]["reward"] == pytest.approx((0.25 * 20 + 0.75 * 4) / 20)


def test_one_that_does_not_is_found_out_however_well_it_agrees(tmp_path: Path) -> None:
    items, known, speakers = asked()
    found = facts_read(items, known, speakers, blind, CONFIG)
    assert found["swapped"]["spearman"]["own"] == found["swapped"]["spearman"]["other"] == 1
    assert found["swapped"]["drop"] == {"value": 0.0, "low": None, "high": None, "n": 40}
    assert found["constant"]["reward"] == 1
    assert "does not read the facts" in (refusal(found) or "")
    paid = {**found, "swapped": {"drop": {"value": 1.0, "low": 0.8, "high": 1.2}}}
    assert "given to every clip, earns 1.00" in (refusal(paid) or "")
    assert "does not say" in (refusal({}) or "")
    assert "lose 0.000 grades" in headline(found)
    assert read_headline(tmp_path) == ""
    (tmp_path / "calibration.json").write_text(json.dumps(found))
    assert read_headline(tmp_path).startswith(headline(found) + " It is refused as a reward")


def test_facts_are_swapped_with_another_clip_s() -> None:
    items, _, _ = asked(12)
    swapped = swap_facts(items)
    assert swapped is not None
    assert all(a.facts != b.facts for a, b in zip(items, swapped, strict=True))
    assert [a.completion for a in swapped] == [a.completion for a in items]
    assert {a.facts for a in swapped} == {a.facts for a in items}
    assert swap_facts(items[:2]) is None
    with pytest.raises(EvaluationError, match="all rows have the same"):
        facts_read(items[:2], [(5, 5, 5, 5)] * 2, ["a", "b"], reads, CONFIG)
    with pytest.raises(EvaluationError, match="nothing that swapped facts could cost"):
        facts_read(items, [(1, 1, 1, 1)] * 12, ["a"] * 12, reads, CONFIG)


def test_no_grade_counts_for_more_than_the_factual_one() -> None:
    assert reward_of((5, 5, 5, 5)) == 1
    assert reward_of((1, 5, 5, 5)) == 0.2
    assert reward_of((4, 5, 2, 3)) == (4 + 4 + 2 + 3) / 20
