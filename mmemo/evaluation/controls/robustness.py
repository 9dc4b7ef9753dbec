"""``mmemo eval --robustness``: how much small edits of sound and picture change the answers.

The protocol is audEERING's (ser-tests; see :mod:`mmemo.media.edits`): for labels, the percentage of
answers that stay the same; for numbers, that of answers that move by less than 0.05 of the scale.
The change of the metric itself is added, paired and with its interval: an answer may change without
becoming wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.data.sample import Modality
from mmemo.evaluation.benchmark import Benchmark, Question
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.controls.summary import (
    against,
    answered_alike,
    correct_all,
    headlines,
    summarised,
)
from mmemo.evaluation.metrics import mean_of_sums
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult, compare
from mmemo.evaluation.scoring import Block
from mmemo.media.edits import EDITS, concerns
from mmemo.statistics import BootstrapConfig

SMALL = 0.05
"""The share of the scale that an unchanged number moves by at most (ser-tests)."""


def edits_to_try(questions: Sequence[Question], wanted: Sequence[str] = ()) -> list[str]:
    """The edits among ``wanted``, by default all, that change a stream which a question shows."""
    shown: set[Modality] = {name for question in questions for name in question.sample.media}
    chosen = wanted or list(EDITS)
    return [edit for edit in chosen if any(concerns(edit, stream) for stream in shown)]


def summarise_robustness(
    model: EvalResult, variants: Mapping[str, EvalResult], benchmark: Benchmark
) -> dict[str, Any]:
    """The contents of ``robustness.json``: for each task and edit the metrics, ``unchanged``, the
    share of the answers that the edit does not change, and the paired difference of the plain
    clips from the edited ones. Holm's correction is over all differences."""
    compared = compare(model, *variants.values())
    tasks: dict[str, Block] = {}
    for task, block in model.tasks.items():
        metrics = headlines(block)
        plain = {row["sample_id"]: row for row in model.rows(task)}
        scale = _scale(benchmark, task, list(plain.values()))
        lines = [summarised(model.name, block, metrics, kind="model")]
        for (edit, result), found in zip(variants.items(), compared, strict=True):
            if task not in result.tasks or task not in found.tasks:
                continue
            line = summarised(edit, result.tasks[task], metrics, kind=EDITS[edit].stream)
            line["title"] = EDITS[edit].title
            line["unchanged"] = _unchanged(plain, result.rows(task), scale, model.bootstrap)
            lines.append(line | against(found.tasks[task], metrics))
        tasks[task] = {"metrics": metrics, "n": block["n"], "scale": scale, "rows": lines}
    return {"tasks": tasks, "tests": correct_all(tasks)}


def _scale(benchmark: Benchmark, task: str, rows: Sequence[Row]) -> float | None:
    """The length of the scale of numeric answers: the task's own, or else the range of the truths;
    None for other kinds of answers."""
    kind = benchmark.tasks[task].answers if task in benchmark.tasks else None
    low, high = getattr(kind, "low", None), getattr(kind, "high", None)
    if isinstance(low, int | float) and isinstance(high, int | float):
        return float(high - low)
    truths = [value for row in rows for value in _numbers(row["truth"])]
    return float(max(truths) - min(truths)) if truths else None


def _unchanged(
    plain: Mapping[str, Row], edited: Sequence[Row], scale: float | None, config: BootstrapConfig
) -> Block:
    """The share of unchanged answers, with its interval over clusters."""
    rows = [row for row in edited if row["sample_id"] in plain]
    same = [_is_same(plain[row["sample_id"]], row, scale) for row in rows]
    counts = np.array([[float(one), 1.0] for one in same]).reshape(-1, 2)
    sums = clusters_of(rows, config).sums(counts)
    return sums.interval(mean_of_sums, len(rows), share=True).row()


def _is_same(one: Row, other: Row, scale: float | None) -> bool:
    ours, theirs = _numbers(one["answer"]), _numbers(other["answer"])
    if scale is None or not ours or len(ours) != len(theirs):
        return answered_alike(one, other)
    # The margin keeps decimal fractions apart from what binary ones make of them.
    least = SMALL * scale - 1e-9 * max(1.0, scale)
    return all(abs(a - b) < least for a, b in zip(ours, theirs, strict=True))


def _numbers(value: Any) -> list[float]:
    """The numbers of an answer, by name; empty for other answers."""
    values = [value[name] for name in sorted(value)] if isinstance(value, dict) else [value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    found = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    return [float(one) for one in found] if len(found) == len(values) else []
