"""The same questions in other words.

Wording 0 is the benchmark's own. Wordings 1 and 2 are the task's ``paraphrases`` where it declares
them. Where it does not, as where each row brings its own prompt, the engine frames the question:
the words of the question stay, and a sentence before or behind them is added. That is a weaker test
than a paraphrase, and results say which of the two was asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmemo.data.sample import Turn
from mmemo.errors import EvaluationError
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
from mmemo.evaluation.task import Task
from mmemo.statistics import BootstrapConfig, rounded

FRAMES = (
    "Please answer this question about what you are given.\n{question}",
    "{question}\nTake everything into account that you are given, and then answer.",
)
"""How the engine frames a question for the wordings that a task does not have."""
WORDINGS = 1 + len(FRAMES)
_MEDIA = re.compile(r"^(?:<(?:video|audio|face)>\s*)*")


def reword(benchmark: Benchmark, questions: Sequence[Question], wording: int) -> list[Question]:
    """The questions in a wording.

    Raises:
        EvaluationError: there is no such wording, or a paraphrase lists no labels where the
            question does.
    """
    if wording == 0:
        return list(questions)
    found: list[Question] = []
    for question in questions:
        task = benchmark.tasks.get(question.task)
        text = _paraphrase(question, task, wording)
        if text is None and wording >= WORDINGS:
            raise EvaluationError(
                f"{benchmark.file}: task '{question.task}' has no wording {wording}; choose one "
                f"below {WORDINGS}, or add to its paraphrases"
            )
        text = _framed(question, wording) if text is None else text
        turns = _replaced(question.turns, text)
        sample = replace(question.sample, turns=_replaced(question.sample.turns, text))
        found.append(replace(question, sample=sample, turns=turns))
    return found


def wording_record(
    benchmark: Benchmark, questions: Sequence[Question], wording: int
) -> dict[str, Any]:
    """What results record of a wording: its number, and for each task whether the ``benchmark`` or
    the ``engine`` worded it."""
    tasks = dict.fromkeys(question.task for question in questions)
    own = [name for name in tasks if _has(benchmark.tasks.get(name), wording)]
    return {"number": wording, "by": {n: "benchmark" if n in own else "engine" for n in tasks}}


def _has(task: Task | None, wording: int) -> bool:
    """Whether a task declares a wording."""
    return task is not None and task.question is not None and wording <= len(task.paraphrases)


def _paraphrase(question: Question, task: Task | None, wording: int) -> str | None:
    """The text of the question in the task's own paraphrase; None where it has none."""
    if task is None or task.question is None or not _has(task, wording):
        return None
    paraphrase = task.paraphrases[wording - 1]
    if "{labels}" in task.question and "{labels}" not in paraphrase:
        raise EvaluationError(
            f"paraphrase {wording} of task '{question.task}' does not list {{labels}}, as its "
            "question does; add them"
        )
    names = "" if question.labels is None else ", ".join(question.labels.labels)
    before, after = (one.replace("{labels}", names) for one in (task.question, paraphrase))
    return _asked(question).replace(before, after, 1)


def _framed(question: Question, wording: int) -> str:
    text = _asked(question)
    end = _MEDIA.match(text)
    place = 0 if end is None else end.end()
    return text[:place] + FRAMES[wording - 1].replace("{question}", text[place:].strip())


def _asked(question: Question) -> str:
    """The text of the last turn of the user."""
    return next((turn.text for turn in reversed(question.turns) if turn.role == "user"), "")


def _replaced(turns: Sequence[Turn], text: str) -> tuple[Turn, ...]:
    """The turns with another text in the last one of the user."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    return tuple(replace(t, text=text) if i == last else t for i, t in enumerate(turns))


def summarise_wordings(model: EvalResult, variants: Mapping[str, EvalResult]) -> dict[str, Any]:
    """The contents of ``paraphrases.json``: for each task the metrics of every wording, their mean
    and range over the wordings, and ``alike``, the share of the questions that are answered alike
    in all of them. Holm's correction is over the differences of all wordings from the first one."""
    compared = compare(model, *variants.values())
    tasks: dict[str, Block] = {}
    for task, block in model.tasks.items():
        metrics = headlines(block)
        if not metrics:
            continue
        own = f"wording {model.made.get('prompts', {}).get('wording', {}).get('number', 0)}"
        lines = [summarised(own, block, metrics, kind="model")]
        for (name, result), found in zip(variants.items(), compared, strict=True):
            if task in result.tasks and task in found.tasks:
                line = summarised(name, result.tasks[task], metrics, kind="wording")
                made = result.made["prompts"].get("wording", {}).get("by", {})
                line["by"] = made.get(task, "benchmark")
                lines.append(line | against(found.tasks[task], metrics))
        rows = [result.rows(task) for result in (model, *variants.values())]
        tasks[task] = {
            "metrics": metrics,
            "n": block["n"],
            "rows": lines,
            "over": {metric: _over(lines, metric) for metric in metrics},
            "alike": _alike(rows, model.bootstrap),
        }
    return {"tasks": tasks, "tests": correct_all(tasks)}


def _over(lines: Sequence[Block], metric: str) -> Block:
    """Mean and range of a metric over the wordings; None where one has no value."""
    values = [line["values"][metric]["value"] for line in lines]
    if any(value is None for value in values):
        return {"mean": None, "lowest": None, "highest": None, "range": None}
    return {
        "mean": rounded(sum(values) / len(values)),
        "lowest": min(values),
        "highest": max(values),
        "range": rounded(max(values) - min(values)),
    }


def _alike(runs: Sequence[Sequence[Row]], config: BootstrapConfig) -> Block:
    """The share of the questions that all runs answer alike."""
    others = [{row["sample_id"]: row for row in rows} for rows in runs[1:]]
    asked = [row for row in runs[0] if all(row["sample_id"] in other for other in others)]
    alike = [all(answered_alike(row, o[row["sample_id"]]) for o in others) for row in asked]
    sums = clusters_of(asked, config).sums(np.array([[one, 1.0] for one in alike]).reshape(-1, 2))
    return sums.interval(mean_of_sums, len(asked), share=True).row()
