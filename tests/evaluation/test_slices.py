"""Results by the values of group fields, for tasks of labels and of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.console import console
from mmemo.evaluation.results import EvalResult, EvaluatedRun
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.tables import scored_table, scored_tasks, slices_table
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
    for block in blocks.values():
        console.print(slices_table("model", "task", block))


def test_the_table_of_slices(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = score_rows(ROWS[:5], CONFIG, None, {"label": ("far",)}).values()
    console.print(slices_table("model", "label", block))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["far:", "no", "2", "0", "50.0", "50.0", "33.3"] in lines
    assert ["far:", "yes", "2", "1", "50.0", "50.0", "66.7"] in lines


def test_without_slices_nothing_is_added() -> None:
    assert all("slices" not in block for block in score_rows(ROWS, CONFIG).values())


def test_a_released_scorer_of_labels_has_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = score_rows(ROWS[:5], CONFIG)
    blocks["label"]["official"] = {"weighted_f1": 0.25}
    made = {"bootstrap": CONFIG.model_dump()}
    result = EvalResult(tmp_path, {"name": "m", "role": "model", "tasks": blocks, "made": made})
    runs = [EvaluatedRun("m", "model", blocks["label"], result, None)]
    assert scored_tasks(runs) == ["label"]
    console.print(scored_table(runs, "label"))
    assert "weighted_f1 (official)" in capsys.readouterr().out
