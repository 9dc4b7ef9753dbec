"""Rankings are scored as computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.errors import EvaluationError
from mmemo.evaluation.scorer import compare_with, score_with, use
from mmemo.evaluation.scoring import score_rows
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig()


def rows(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": str(place),
            "task": "emotion",
            "labels": [],
            "truth": truth,
            "answer": answer,
            "status": "malformed" if answer is None else "ok",
            "score": None,
            "group": {"speaker": f"s{place % 5}"},
            "media": {},
        }
        for place, (truth, answer) in enumerate(pairs)
    ]


FIVE = rows(
    ("a", ["a", "b", "c"]),
    ("a", ["b", "a"]),
    ("c", ["a", "b", "c"]),
    ("d", ["a", "b", "c"]),
    ("a", None),
)


def test_accuracy_at_k_and_reciprocal_rank() -> None:
    found = score_with([use("ranked")], FIVE, CONFIG)
    values = {name: round(block["value"], 6) for name, block in found.items()}
    # Ranks 1, 2, 3, none, unreadable.
    assert values == {
        "accuracy_at_1": 0.2,
        "accuracy_at_2": 0.4,
        "accuracy_at_3": 0.6,
        "mrr": round((1 + 1 / 2 + 1 / 3) / 5, 6),
        "unreadable": 0.2,
    }
    assert {block["n"] for block in found.values()} == {5}
    assert found["unreadable"]["lower_is_better"]


def test_other_depths_several_truths_and_single_labels() -> None:
    several = rows((["x", "b"], ["a", "b"]), ("a", "a"), ("a", "b"), ("b", ["a", "a", "b"]))
    found = score_with([use("ranked", at=[2, 5])], several, CONFIG)
    assert (found["accuracy_at_2"]["value"], found["accuracy_at_5"]["value"]) == (0.75, 0.75)
    assert found["mrr"]["value"] == (0.5 + 1 + 0 + 0.5) / 4


@pytest.mark.parametrize("at", [[], [0], [1, 1], [1.5], [True]])
def test_depths_are_checked(at: Any) -> None:
    with pytest.raises(EvaluationError, match="at must list different whole numbers"):
        use("ranked", at=at).load()


def test_it_is_the_headline_of_a_task_and_is_compared() -> None:
    block = score_rows(FIVE, CONFIG, {"emotion": [use("ranked")]})["emotion"]
    assert block["headline"] == "accuracy_at_1"
    better = [{**row, "answer": [row["truth"]], "status": "ok"} for row in FIVE]
    assert compare_with([use("ranked")], better, FIVE, CONFIG)["accuracy_at_1"]["value"] == 0.8
