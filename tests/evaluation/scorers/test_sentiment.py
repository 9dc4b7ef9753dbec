"""MMSA's sentiment metrics: hand-computed values, its own formulas, answers without a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from mmemo.errors import EvaluationError
from mmemo.evaluation.scorer import score_with, use
from mmemo.evaluation.scorers.sentiment import Scale, mmsa_mosi, mmsa_sims
from mmemo.statistics import BootstrapConfig

QUICK = BootstrapConfig(resamples=100)


def rows(truth: list[float], given: list[float | None]) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": str(place),
            "truth": x,
            "answer": y,
            "status": "malformed" if y is None else "ok",
            "group": {},
        }
        for place, (x, y) in enumerate(zip(truth, given, strict=True))
    ]


def values(scale: Scale, made: list[dict[str, Any]], **params: Any) -> dict[str, float]:
    scorer = use("sentiment", scale=scale, **params).load()
    sums = scorer.values(made)[0].sum(0)
    metrics = scorer.metrics.items()
    return {name: float(one.of_sums(sums)) for name, one in metrics if one.of_sums is not None}


def test_mosi_rounds_half_to_even_and_counts_zero_in_two_ways() -> None:
    # Classes of 7:     2    2    0   -2   -3    3
    truth = [1.5, 2.4, 0.0, -2.5, -3.0, 2.6]
    given = [2.5, 1.4, 0.5, -1.6, -2.4, 0.0]
    # Classes of 7:     2    1    0   -2   -2    0
    found = values("mosi", rows(truth, list(given)))
    assert found["acc7"] == pytest.approx(3 / 6)
    assert found["acc5"] == pytest.approx(4 / 6)  # clipped to 2: -3 and -2.4 are -2
    assert found["acc3"] == pytest.approx(5 / 6)  # all but 2.6 and 0
    assert found["acc2_has0"] == pytest.approx(1.0)  # 0 and up are positive on both sides
    assert found["acc2_non0"] == pytest.approx(4 / 5)  # the answer of 0 to 2.6 is negative
    # Positive: 2 right, 1 missed; negative: 2 right, 1 too many. F1 of each is 4/5.
    assert found["f1_non0"] == pytest.approx(0.8)
    assert found["mae"] == pytest.approx((1.0 + 1.0 + 0.5 + 0.9 + 0.6 + 2.6) / 6)
    official = mmsa_mosi(rows(truth, list(given)))
    assert official["Mult_acc_5"] == 0.6667  # rounded, as MMSA prints it
    assert official["Non0_acc_2"] == 0.8
    assert official["left_out"] == 0


def test_sims_bins_are_closed_above() -> None:
    # Classes of 5: 0    1    1    2    2    3    3    4
    truth = [-0.7, -0.6, -0.1, 0.0, 0.1, 0.2, 0.7, 0.8]
    found = values("sims", rows(truth, list(truth)))
    assert all(found[name] == 1 for name in ("acc2_has0", "acc3", "acc5", "f1_has0"))
    given = [-0.6, -0.7, 0.0, -0.1, 0.2, 0.1, 0.8, 0.7]  # each in the neighbouring bin of five
    found = values("sims", rows(truth, list(given)))
    assert found["acc5"] == 0
    assert found["acc3"] == pytest.approx(4 / 8)
    assert found["acc2_has0"] == 1
    assert found["acc2_non0"] == 1
    assert "acc7" not in found


def literal(scale: Scale, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, float]:
    """The formulas, written out for each clip."""

    def bins(value: float, edges: list[float]) -> int:
        return next(i for i in range(len(edges)) if value <= edges[i])

    if scale == "mosi":
        classes = {f"acc{2 * k + 1}": (lambda v, k=k: round(min(max(v, -k), k))) for k in (1, 2, 3)}
        positive = [(a >= 0, b >= 0) for a, b in zip(x, y, strict=True)]
    else:
        edges = {"acc3": [-0.1, 0.1, 1.0], "acc5": [-0.7, -0.1, 0.1, 0.7, 1.0]}
        classes = {name: (lambda v, e=e: bins(v, e)) for name, e in edges.items()}
        positive = [(a > 0, b > 0) for a, b in zip(x, y, strict=True)]
    nonzero = [(a > 0, b > 0) for a, b in zip(x, y, strict=True) if a != 0]
    found = {
        name: float(np.mean([of(a) == of(b) for a, b in zip(x, y, strict=True)]))
        for name, of in classes.items()
    }
    for name, pairs in (("has0", positive), ("non0", nonzero)):
        if pairs:
            truth, answers = zip(*pairs, strict=True)
            found[f"acc2_{name}"] = float(accuracy_score(truth, answers))
            found[f"f1_{name}"] = float(f1_score(truth, answers, average="weighted"))  # type: ignore
    return found


NUMBER = st.integers(-12, 12).map(lambda quarter: quarter / 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=12))
def test_the_metrics_are_the_formulas(pairs: list[tuple[float, float]]) -> None:
    x, y = (np.array(column) for column in zip(*pairs, strict=True))
    scales: tuple[tuple[Scale, float], ...] = (("mosi", 1), ("sims", 3))
    for scale, divided in scales:
        found = values(scale, rows(list(x / divided), list(y / divided)))
        for name, value in literal(scale, x / divided, y / divided).items():
            assert found[name] == pytest.approx(value), (scale, name)


@pytest.mark.parametrize("scale", ["mosi", "sims"])
@pytest.mark.parametrize("truth", [-1.0, -0.05, 0.0, 0.05, 1.0])
def test_no_number_is_wrong_in_every_accuracy(scale: Scale, truth: float) -> None:
    made = rows([truth], [None])
    found = values(scale, made)
    scored = {name: value for name, value in found.items() if name.startswith("acc")}
    if truth == 0:
        del scored["acc2_non0"]  # not defined
    assert set(scored.values()) == {0.0}
    end = {"mosi": 3.0, "sims": 1.0}[scale]
    assert found["mae"] == pytest.approx(end + abs(truth))
    left = score_with([use("sentiment", scale=scale, unreadable="left_out")], made, QUICK)
    assert (left["mae"]["n"], left["mae"]["unscored"]) == (0, 1)


def test_official_numbers_are_json_whatever_the_answers_are() -> None:
    assert mmsa_mosi(rows([1.0], [None])) == {"left_out": 1.0}
    assert mmsa_sims(rows([1.0], [None])) == {"left_out": 1.0}
    constant = mmsa_mosi(rows([0.0, 0.0], [1.0, 1.0]))
    assert "Corr" not in constant
    assert "Non0_acc_2" not in constant
    assert constant["MAE"] == 1
    found = mmsa_sims(rows([0.2, -0.8, 0.5], [1.0, -1.0, None]))
    assert found["Mult_acc_2"] == 1
    assert found["Mult_acc_2_weak"] == 1  # of 0.2 alone
    assert found["left_out"] == 1
    assert found["MAE"] == pytest.approx(0.5)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(EvaluationError, match="use one of mosi, sims"):
        use("sentiment", scale="mosei").load()
