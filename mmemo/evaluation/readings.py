"""The numbers of a benchmark with several tasks, once for each way to read the answers.

n questions, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmemo.evaluation import metrics
from mmemo.evaluation.benchmark import Question, Reading
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import (
    Block,
    cluster_of,
    label_order,
    subset_counts,
    yes_no_numbers,
)
from mmemo.evaluation.statistics import Bootstrap, BootstrapConfig, Resampled


def score_readings(
    readings: Sequence[Reading],
    questions: Sequence[Question],
    rows: Sequence[Row],
    config: BootstrapConfig,
) -> dict[str, Block]:
    """For each reading how it reads, its accuracy on each task (with the numbers of yes-or-no
    questions) and, as ``mean``, the unweighted mean of these accuracies.

    Args:
        questions: all that the benchmark asks; open ones are left out.
        rows: the answers. Questions without one are counted as ``missing``, whatever the reading
            makes of them.
    """
    closed = [question for question in questions if question.labels is not None]
    answers = {str(row["sample_id"]): row for row in rows}
    return {reading.name: _score(reading, closed, answers, config) for reading in readings}


def _score(
    reading: Reading,
    questions: Sequence[Question],
    answers: dict[str, Row],
    config: BootstrapConfig,
) -> Block:
    tasks: dict[str, list[Row]] = {question.task: [] for question in questions}
    missing = dict.fromkeys(tasks, 0)
    for question in questions:
        answer = answers.get(question.sample.sample_id)
        missing[question.task] += answer is None
        if answer is not None or reading.missing == "wrong":
            tasks[question.task].append(_read(reading, question, answer))
    return {
        "parser": reading.parser,
        "missing": reading.missing,
        "mean": _mean(list(tasks.values()), config),
        "tasks": {
            task: {"missing": missing[task], **_numbers(rows, config)}
            for task, rows in tasks.items()
        },
    }


def _read(reading: Reading, question: Question, answer: Row | None) -> Row:
    if answer is None:
        return {**question.row(), "status": "malformed", "answer": None}
    if reading.read is None:
        return answer
    parsed = reading.read(answer["raw"], question)
    return {**answer, "status": parsed.status, "answer": parsed.label}


def _mean(tasks: Sequence[Sequence[Row]], config: BootstrapConfig) -> Block:
    """Mean of the tasks' accuracies. What is asked of one clip is drawn together in all tasks."""
    rows = [row for task in tasks for row in task]
    counts = np.zeros((len(rows), len(tasks), 2))  # (n, T, right and all)
    places = [place for place, task in enumerate(tasks) for _ in task]
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        counts[index, place] = (row["answer"] == row["truth"], 1.0)

    def mean(values: Values) -> Values:
        return metrics.mean_of(metrics.mean_of_sums(values))

    drawn = Bootstrap([cluster_of(row, config) for row in rows], config).resample(counts)
    return drawn.interval(mean, len(rows)).row()


def _numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    n, labels = len(rows), label_order(rows)
    counts = Bootstrap([cluster_of(row, config) for row in rows], config).resample(
        subset_counts(rows, labels)
    )
    overall = Resampled(counts.total.sum(0), counts.draws.sum(1), config)
    block: Block = {"n": n, "accuracy": overall.interval(metrics.war, n).row()}
    if set(labels) == {"yes", "no"}:
        block["yes_no"] = yes_no_numbers(overall, labels, n)
    return block
