"""Results by the values of group fields, for tasks of labels and of numbers."""

from __future__ import annotations

from typing import Any

from mmemo.evaluation.scorer import use
from mmemo.evaluation.scoring import score_rows
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=100)


def row(place: int, task: str, truth: Any, answer: Any, **group: str) -> dict[str, Any]:
    labels = ["a", "b"] if task == "label" else []
    return {
        "sample_id": str(place),
        "task": task,
        "labels": labels,
        "truth": truth,
        "answer": answer,
        "status": "malformed" if answer is None else "ok",
        "score": float(truth == answer),
        "group": group,
        "media": {},
    }


ROWS = [
    row(0, "label", "a", "a", far="no", speaker="x"),
    row(1, "label", "b", "a", far="no", speaker="y"),
    row(2, "label", "b", "b", far="yes", speaker="x"),
    row(3, "label", "b", None, far="yes", speaker="y"),
    row(4, "label", "a", "a", speaker="z"),
    row(5, "number", 1.0, 3.0, far="no"),
    row(6, "number", 2.0, 2.0, far="yes"),
]


def test_each_value_has_its_own_numbers() -> None:
    specs = {"label": [use("ranked", at=[1])], "number": [use("numbers")]}
    blocks = score_rows(ROWS, CONFIG, specs, {"label": ("far",), "number": ("far", "gender")})
    near, far = (blocks["label"]["slices"]["far"][value] for value in ("no", "yes"))
    assert (near["n"], far["n"], far["statuses"]) == (2, 2, {"ok": 1, "malformed": 1})
    assert (near["metrics"]["war"]["value"], near["metrics"]["uar"]["value"]) == (0.5, 0.5)
    assert far["metrics"]["uar"]["value"] == 0.5  # of the one class that occurs
    assert far["scored"]["accuracy_at_1"]["value"] == 0.5
    numbers = blocks["number"]["slices"]
    assert set(numbers) == {"far"}  # no row has a gender
    assert [numbers["far"][value]["scored"]["mae"]["value"] for value in ("no", "yes")] == [2, 0]
    assert "metrics" not in numbers["far"]["no"]


def test_without_slices_nothing_is_added() -> None:
    assert all("slices" not in block for block in score_rows(ROWS, CONFIG).values())
