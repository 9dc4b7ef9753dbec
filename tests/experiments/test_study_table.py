"""A study's numbers against scipy's own and known values."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmemo.experiments.study_table import holm, mean_interval, paired, plot, summary, table


def test_the_mean_has_students_interval() -> None:
    values = [0.61, 0.70, 0.66, 0.73]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found["mean"] == pytest.approx(0.675)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_one_seed_or_no_spread_has_no_interval_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
        assert mean_interval([])["mean"] is None
        # 0.1 more in each seed, but for rounding: there is nothing to test against
        same = paired({0: 0.4, 1: 0.8, 2: 0.3}, {0: 0.3, 1: 0.7, 2: 0.2})
    assert same["mean"] == pytest.approx(0.1)
    assert same["p"] is same["low"] is None


def test_pairs_are_by_seed_and_equal_scipys() -> None:
    a = {0: 0.7, 1: 0.9, 2: 0.65, 7: 0.8}
    b = {2: 0.6, 1: 0.7, 0: 0.71, 9: 0.1}
    found = paired(a, b)
    expected: Any = stats.ttest_rel([0.7, 0.9, 0.65], [0.71, 0.7, 0.6])
    assert found["n"] == 3
    assert found["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def results(seeds: int, **bad: float | None) -> dict[str, Any]:
    values = {"a": [0.5, 0.6, 0.4], "b": [0.7, 0.75, 0.72]}
    runs: list[dict[str, Any]] = [
        {"arm": arm, "seed": seed, "status": "done", "metrics": {"score": values[arm][seed], **bad}}
        for seed in range(seeds)
        for arm in values
    ]
    metrics = {
        "score": {"percent": True, "better": "higher"},
        **{name: {"percent": False, "better": None} for name in bad},
    }
    return {
        "name": "toy",
        "runs": runs,
        "config": {"arms": {"a": {}, "b": {}}, "metrics": metrics},
        "summary": summary(runs, ["a", "b"], metrics, [("b", "a")]),
    }


def test_the_table_shows_means_intervals_and_tests() -> None:
    text = table(results(3))
    assert "| arm | score, % ↑ | seeds |" in text
    assert "| a | 50.0 (25.2 to 74.8) | 3 |" in text
    t: Any = stats.ttest_rel([0.7, 0.75, 0.72], [0.5, 0.6, 0.4])
    ends = t.confidence_interval(0.95)
    span = f"{100 * ends.low:+.1f} to {100 * ends.high:+.1f}".replace("-", "−")
    p = f"{t.pvalue:.3f}"
    assert f"| b − a | score, % ↑ | +22.3 | {span} | {p} | {p} | 3 |" in text


def test_the_table_of_one_seed_says_that_there_are_no_intervals() -> None:
    text = table(results(1))
    assert "One seed: intervals and tests need at least two" in text
    assert "| b − a | score, % ↑ | +20.0 | – | – | – | 1 |" in text


def test_a_number_that_no_run_has_is_a_dash() -> None:
    found = results(2, other=None)
    assert found["summary"]["other"]["arms"]["a"]["n"] == 0
    assert "| a | 55.0 (−8.5 to 118.5) | – | 2 |" in table(found)


@pytest.mark.parametrize("seeds", [1, 3])
def test_plots_are_drawn_without_warnings_and_the_same_twice(tmp_path: Path, seeds: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("one.png", "two.png"):
            plot(results(seeds, other=None), "score", tmp_path / name)
        plot(results(seeds, other=None), "other", tmp_path / "none.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert not math.isclose((tmp_path / "one.png").stat().st_size, 0)
