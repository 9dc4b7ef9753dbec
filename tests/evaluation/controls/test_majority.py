"""The constant answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmemo.data.manifest import DataConfig
from mmemo.evaluation.controls.majority import constant_answer


def row(truth: Any, labels: list[str] | None = None) -> dict[str, Any]:
    return {
        "truth": truth,
        "labels": labels or [],
        "answer": None,
        "status": "malformed",
        "task": "t",
    }


def training(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    whole = [{"sample_id": str(i), "prompt": "?", **one} for i, one in enumerate(rows)]
    path.write_text("".join(json.dumps(one) + "\n" for one in whole))
    return DataConfig(manifests=[str(path)])


def test_without_training_rows_it_is_an_oracle_and_says_so() -> None:
    labels = ["happy", "sad", "angry"]
    found = constant_answer([row(one, labels) for one in ("sad", "sad", "happy")], None)
    assert found is not None
    assert (found.answer, found.oracle) == ("sad", True)
    assert found.name == "always “sad” (most common label of these questions: oracle)"
    assert [one["score"] for one in found.rows] == [1.0, 1.0, 0.0]
    tie = constant_answer([row(one, labels) for one in ("sad", "happy")], None)
    assert tie is not None
    assert tie.answer == "happy"


def test_the_majority_of_training_knows_nothing_of_the_test(tmp_path: Path) -> None:
    labels = ["happy", "sad"]
    rows = [{"label": one} for one in ("happy", "bored", "bored", "bored", "happy", "sad")]
    found = constant_answer([row("sad", labels)] * 3, training(tmp_path / "a.jsonl", rows))
    assert found is not None
    assert (found.answer, found.oracle) == ("happy", False)
    assert found.name == "always “happy” (majority of training)"
    # Training rows without one of the labels tell nothing, which leaves the oracle.
    other = constant_answer([row("sad", labels)], training(tmp_path / "b.jsonl", [{"label": "x"}]))
    assert other is not None
    assert other.oracle


def test_numbers_have_their_mean(tmp_path: Path) -> None:
    found = constant_answer([row(1.0), row(2), row(6.0)], None)
    assert found is not None
    assert found.answer == 3.0
    assert found.name == "always 3 (mean of these questions: oracle)"
    assert [one["status"] for one in found.rows] == ["ok"] * 3
    rows = [{"gold": 10}, {"gold": 20}]
    trained = constant_answer([row(1.0)], training(tmp_path / "a.jsonl", rows))
    assert trained is not None
    assert (trained.answer, trained.oracle) == (15.0, False)
    named = constant_answer([row({"v": 1, "a": 2}), row({"v": 3, "a": 2})], None)
    assert named is not None
    assert named.answer == {"v": 2.0, "a": 2.0}


def test_other_kinds_have_none() -> None:
    assert constant_answer([row("a text"), row("another")], None) is None
    assert constant_answer([row(["happy", "sad"])], None) is None
