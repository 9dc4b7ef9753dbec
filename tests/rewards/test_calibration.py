"""Calibration: rank correlation as scipy has it, intervals from speakers, an honest table."""

from __future__ import annotations

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
    spearman,
)
from mmemo.rewards.judge.rubric import DIMENSIONS
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
