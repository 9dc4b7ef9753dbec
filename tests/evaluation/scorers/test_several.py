"""Multi-label metrics by hand and against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mmemo.errors import EvaluationError
from mmemo.evaluation.scorer import compare_with, score_with, use
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=100)
LABELS = ["행복", "불평/불만", "joy"]
SCORER = use("several", labels=LABELS, per_label=True)


def row(number: int, truth: Any, answer: Any, status: str = "ok") -> dict[str, Any]:
    return {
        "sample_id": f"s{number}",
        "task": "t",
        "labels": [],
        "truth": truth,
        "answer": answer,
        "status": status,
        "raw": "",
        "group": {},
        "media": {},
    }


def approx(number: float) -> Any:
    return pytest.approx(number, abs=1e-6)  # results are rounded


def value(found: dict[str, Any], name: str) -> float:
    return found[name]["value"]


def test_metrics_by_hand() -> None:
    rows = [
        row(0, ["행복", "joy"], ["행복"]),
        row(1, ["joy"], ["joy"]),
        row(2, [], ["불평/불만"]),
        row(3, ["불평/불만"], None, "refused"),
    ]
    found = score_with([SCORER], rows, CONFIG)
    # Counts: 행복 1 hit; 불평/불만 1 false, 1 missed; joy 1 hit, 1 missed.
    assert value(found, "micro_f1") == approx(4 / 7)
    assert value(found, "macro_f1") == approx((1 + 0 + 2 / 3) / 3)
    assert value(found, "samples_f1") == approx((2 / 3 + 1 + 0 + 0) / 4)
    assert value(found, "exact_match") == 1 / 4
    assert value(found, "hamming_loss") == 3 / 12
    assert value(found, "fnr[joy]") == 1 / 2
    assert value(found, "fpr[joy]") == 0
    assert value(found, "fnr[불평/불만]") == 1
    assert value(found, "fpr[불평/불만]") == approx(1 / 3)
    assert value(found, "fnr") == approx((0 + 1 + 1 / 2) / 3)
    assert value(found, "fnr_minus_fpr") == approx((0 + 2 / 3 + 1 / 2) / 3)
    # Correlations: 1, (0 * 2 - 1 * 1) / 3, and (1 * 2) / sqrt(1 * 2 * 2 * 3).
    assert value(found, "mcc") == approx((1 - 1 / 3 + 2 / 12**0.5) / 3)
    assert found["micro_f1"]["n"] == 4
    left = score_with([use("several", labels=LABELS, unreadable="left_out")], rows, CONFIG)
    assert (left["micro_f1"]["n"], left["micro_f1"]["unscored"]) == (3, 1)
    assert value(left, "micro_f1") == approx(4 / 6)


def test_a_yes_no_question_has_rates() -> None:
    scorer = use("several", labels=["yes"], none="no")
    rows = [row(0, "yes", "no"), row(1, "yes", "yes"), row(2, "no", "no"), row(3, "no", "yes")]
    rows.append(row(4, "yes", None, "malformed"))
    found = score_with([scorer], rows, CONFIG)
    assert value(found, "fnr") == approx(2 / 3)
    assert value(found, "fpr") == 1 / 2
    assert value(found, "fnr_minus_fpr") == approx(1 / 6)


def test_runs_are_compared_and_wrong_arguments_told() -> None:
    a = [row(i, ["joy"], ["joy"]) for i in range(5)]
    b = [row(i, ["joy"], []) for i in range(5)]
    found = compare_with([SCORER], a, b, CONFIG)
    assert found["micro_f1"]["value"] == 1
    with pytest.raises(EvaluationError, match="s0: 'sad' is none of the labels"):
        score_with([SCORER], [row(0, ["sad"], [])], CONFIG)
    with pytest.raises(EvaluationError, match="different labels"):
        use("several", labels=["a", "a"]).load()
    with pytest.raises(EvaluationError, match="unreadable must be"):
        use("several", labels=["a"], unreadable="dropped").load()
    assert "f1[anger]" in use("several", labels="emodb", per_label=True).load().metrics


LISTS = st.lists(st.sampled_from(LABELS), max_size=3, unique=True)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=8))
def test_metrics_are_sklearns(pairs: list[tuple[list[str], list[str]]]) -> None:
    rows = [row(i, truth, answer) for i, (truth, answer) in enumerate(pairs)]
    found = score_with([SCORER], rows, CONFIG)
    truth, answer = (
        np.array([[label in pair[side] for label in LABELS] for pair in pairs], dtype=int)
        for side in (0, 1)
    )
    for name in ("micro", "macro"):
        expected = sk.f1_score(truth, answer, average=name, zero_division=0)
        assert value(found, f"{name}_f1") == approx(expected)
    expected = sk.f1_score(truth, answer, average="samples", zero_division=1)
    assert value(found, "samples_f1") == approx(expected)
    assert value(found, "exact_match") == approx(sk.accuracy_score(truth, answer))
    assert value(found, "hamming_loss") == approx(sk.hamming_loss(truth, answer))
    each = [sk.matthews_corrcoef(truth[:, k], answer[:, k]) for k in range(len(LABELS))]
    assert value(found, "mcc") == approx(np.mean(each))
