"""``mmemo eval --baselines``: the same questions without the clip, with one stream alone, and
answered by the majority.

What a model gains over its own text-only answers is what it got from the clip; what it gains over
the majority is more than knowing how labels are distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MODALITIES, Modality
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.comparison import compare_rows
from mmemo.evaluation.controls.majority import constant_answer
from mmemo.evaluation.controls.summary import against, correct_all, headlines, summarised
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult, compare
from mmemo.evaluation.scorer import compare_with, specs_of
from mmemo.evaluation.scoring import Block, score_rows

TEXT_ONLY = "text only"


def streams_to_try(questions: Sequence[Question]) -> dict[str, list[Modality]]:
    """Name of each baseline to the streams that it keeps: none at all, and each one alone where
    there are several. Empty if no question shows a clip."""
    shown = {name for question in questions for name in question.sample.media}
    present: list[Modality] = [name for name in MODALITIES if name in shown]
    if not present:
        return {}
    alone: dict[str, list[Modality]] = {f"{name} only": [name] for name in present}
    return {TEXT_ONLY: [], **(alone if len(present) > 1 else {})}


def summarise_baselines(
    model: EvalResult, variants: dict[str, EvalResult], training: DataConfig | None
) -> dict[str, Any]:
    """The contents of ``baselines.json``: for each task and metric, the model, each baseline, and
    the paired difference of the model from it. Holm's correction is over all of them."""
    compared = compare(model, *variants.values()) if variants else []
    tasks: dict[str, Block] = {}
    for task, block in model.tasks.items():
        metrics = headlines(block)
        if not metrics:
            continue
        lines = [summarised(model.name, block, metrics, kind="model")]
        for (name, result), found in zip(variants.items(), compared, strict=True):
            if task in result.tasks and task in found.tasks:
                line = summarised(name, result.tasks[task], metrics, kind="ablation")
                lines.append(line | against(found.tasks[task], metrics))
        rows = model.rows(task)
        constant = constant_answer(rows, training)
        if constant is not None:
            lines.append(_constant_line(constant.name, rows, constant.rows, block, model, metrics))
            lines[-1] |= {"answer": constant.answer, "oracle": constant.oracle}
        tasks[task] = {"metrics": metrics, "n": block["n"], "rows": lines}
    return {"tasks": tasks, "tests": correct_all(tasks)}


def _constant_line(
    name: str,
    rows: Sequence[Row],
    constant: Sequence[Row],
    block: Block,
    model: EvalResult,
    metrics: Sequence[str],
) -> Block:
    task = str(rows[0]["task"])
    specs = {task: specs_of(block)}
    own = score_rows(constant, model.bootstrap, specs)[task]
    config = model.bootstrap
    found = compare_rows(rows, constant, config) if block["labels"] else {}
    found = {**found, "scored": compare_with(specs[task], rows, constant, config)}
    return summarised(name, own, metrics, kind="constant") | against(found, metrics)
