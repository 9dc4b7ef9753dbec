"""From answered questions to the numbers of ``results.json``.

Three kinds of numbers are made here, each with an interval over clusters:

- the metrics of each task (:func:`score_rows`);
- the means of the scores that reward functions gave to answers (:func:`task_means`);
- the accuracies of a benchmark with several tasks, once for each parser of its answers
  (:func:`score_readings`).

Shapes: n answers, K labels, G conflict subsets (with "none" last), T tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.answers.parsing import STATUSES
from mmemo.data.sample import CONFLICTS
from mmemo.evaluation import metrics
from mmemo.evaluation.answer_source import CONFLICTING, reliance_block
from mmemo.evaluation.benchmark import Question, Reading
from mmemo.evaluation.clusters import cluster_of, clusters_of
from mmemo.evaluation.metrics import Counts, Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Spec, score_with
from mmemo.statistics import BootstrapConfig, Clusters, ClusterSums, Interval, Statistic

Block = dict[str, Any]

ScoreValues = Mapping[str, Sequence[float | None]]
"""Name of each score to one value per answer; None where the score could not be computed."""

SUBSETS: tuple[str, ...] = (*CONFLICTS, "none")


def score_rows(
    rows: Sequence[Row],
    config: BootstrapConfig,
    specs: Mapping[str, Sequence[Spec]] | None = None,
    slices: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Block]:
    """The numbers of each task, in the order in which the tasks first occur.

    Args:
        specs: the scorers of each task, whose metrics are in ``scored``. The first metric is the
            headline (``average``) of a task without labels.
        slices: the fields of ``group`` of each task, for every value of which the numbers are in
            ``slices`` as well.
    """
    tasks = dict.fromkeys(str(row["task"]) for row in rows)
    blocks: dict[str, Block] = {}
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        block = score_task(own, config) if label_order(own) else open_task(own, config)
        used = (specs or {}).get(task, ())
        if used:
            block["scorers"] = [spec.record() for spec in used]
            block["scored"] = score_with(used, own, config)
            first, metric = next(iter(block["scored"].items()))
            block.setdefault("average", metric)
            block.setdefault("headline", first)
        if (slices or {}).get(task):
            block["slices"] = _slices(own, config, used, (slices or {})[task])
        blocks[task] = block
    return blocks


def _slices(
    rows: Sequence[Row], config: BootstrapConfig, specs: Sequence[Spec], fields: Sequence[str]
) -> Block:
    """For each value of some fields of ``group``: how many answers there are, the metrics of labels
    and those of the scorers. Rows without the field are in none."""
    found: Block = {}
    for key in fields:
        values = sorted({row["group"][key] for row in rows if key in row.get("group", {})})
        for value in values:
            own = [row for row in rows if row.get("group", {}).get(key) == value]
            block: Block = {"n": len(own), "statuses": _statuses(own)}
            labels = label_order(own)
            if labels:
                counts = subset_counts(own, labels, clusters_of(own, config)).over(0)
                block["metrics"] = _scalars(counts, len(own))
            if specs:
                block["scored"] = score_with(specs, own, config)
            found.setdefault(key, {})[value] = block
    return found


def open_task(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """The block of a task of open questions. It has no ``metrics``, since open answers are only
    rated by scores."""
    return {
        "labels": [],
        "n": len(rows),
        "clusters": len({cluster_of(row, config) for row in rows}),
        "statuses": {**dict.fromkeys(STATUSES, 0), **_statuses(rows)},
    }


def score_task(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """All numbers of one task with labels, each with its interval and n."""
    labels = label_order(rows)
    clusters = clusters_of(rows, config)
    counts = subset_counts(rows, labels, clusters)
    overall = counts.over(0)
    n = len(rows)
    block: Block = {
        "labels": list(labels),
        "n": n,
        "clusters": clusters.count,
        "statuses": {**dict.fromkeys(STATUSES, 0), **_statuses(rows)},
        **_by_reading(rows),
        "metrics": _scalars(overall, n),
        "average": average_interval(counts, rows).row(),
        "classes": _classes(overall, labels),
        "confusion": _confusion(overall.total, labels),
        "subsets": _subsets(counts, rows, labels),
        "groups": _groups(rows, clusters),
    }
    # A benchmark without a score function is scored by accuracy, which stands in the metrics
    # already.
    if any(row["score"] != float(row["answer"] == row["truth"]) for row in rows):
        scores = np.array([[row["score"], 1.0] for row in rows])
        binary = all(row["score"] in (0, 1) for row in rows)
        block["score"] = clusters.sums(scores).interval(metrics.mean_of_sums, n, share=binary).row()
    if set(CONFLICTING) <= {row.get("conflict") for row in rows}:
        parts = [SUBSETS.index(name) for name in CONFLICTING]
        within = sum(row.get("conflict") in CONFLICTING for row in rows)
        conflict = counts.part(parts)
        block["conflict_average"] = conflict.interval(mean_war, within, share=True).row()
        gap = conflict.interval(_gap_of_sides, within, limits=(-1, 1))
        block["conflict_gap"] = gap.row()
    reliance = reliance_block(rows, clusters)
    if reliance:
        block["reliance"] = reliance
    if labels and set(labels) == {"yes", "no"}:
        block["yes_no"] = yes_no_numbers(overall, labels)
    return block


def label_order(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of a task, in the benchmark's order."""
    return tuple(dict.fromkeys(label for row in rows for label in row["labels"]))


def subset_counts(rows: Sequence[Row], labels: Sequence[str], clusters: Clusters) -> ClusterSums:
    """Confusion matrices (G, K, K + 2), by conflict subset, of some answers; see
    :mod:`mmemo.evaluation.metrics` for the columns."""
    column = {name: index for index, name in enumerate(metrics.columns(labels))}
    places = {name: index for index, name in enumerate(labels)}
    subsets = {name: index for index, name in enumerate(SUBSETS)}
    cells = [
        (
            subsets[row.get("conflict") or "none"],
            places[row["truth"]],
            # Refused and malformed answers have columns of their own and stay in every denominator.
            column[row["answer"] if row["status"] == "ok" else row["status"]],
        )
        for row in rows
    ]
    shape = (len(SUBSETS), len(labels), len(column))
    return clusters.tally(np.array(cells, dtype=np.intp).reshape(-1, 3), shape)


def average_interval(counts: ClusterSums, rows: Sequence[Row]) -> Interval:
    """The headline: the unweighted mean of the accuracies on the conflict and consistent subsets,
    or plain accuracy where no row has a conflict field."""
    parts = subset_indices(rows)
    within = sum(subset_of(row) in parts for row in rows)
    return counts.part(parts).interval(mean_war, within, share=True)


def subset_of(row: Row) -> int:
    """The position in SUBSETS of a row's subset."""
    return SUBSETS.index(row.get("conflict") or "none")


def subset_indices(rows: Sequence[Row]) -> list[int]:
    """Positions in SUBSETS of the subsets that the headline averages over."""
    present = {row.get("conflict") or "none" for row in rows}
    found = [i for i, name in enumerate(SUBSETS) if name in present and name != "none"]
    return found or [SUBSETS.index("none")]


def constant_rows(rows: Sequence[Row], label: str) -> list[Row]:
    """The answers of a model that always says ``label``: the majority baseline."""
    fixed = {"raw": label, "answer": label, "status": "ok"}
    strict = {"strict_answer": label, "strict_status": "ok"}
    return [
        {
            **row,
            **fixed,
            **(strict if "strict_status" in row else {}),
            "score": float(row["truth"] == label),
        }
        for row in rows
    ]


def task_means(
    rows: Sequence[Row], values: ScoreValues, config: BootstrapConfig
) -> dict[str, Block]:
    """For each task, the means of the scores over its answers. A score that applies to the answers
    of other tasks only, and so has no value here, is left out."""
    tasks: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        tasks.setdefault(str(row["task"]), []).append(place)
    # A score that has no value in any task stays in all of them, where it counts as unscored.
    useful = {name for name, column in values.items() if any(v is not None for v in column)}
    blocks: dict[str, Block] = {}
    for task, places in tasks.items():
        own = {name: [column[place] for place in places] for name, column in values.items()}
        applicable = {
            name: column
            for name, column in own.items()
            if name not in useful or any(value is not None for value in column)
        }
        blocks[task] = score_means([rows[place] for place in places], applicable, config)
    return blocks


def score_means(rows: Sequence[Row], values: ScoreValues, config: BootstrapConfig) -> Block:
    """The mean of each score over the answers that have one, with its interval, over all answers
    and on each conflict subset. ``unscored`` counts the others: they enter no mean, for None is
    not 0."""
    clusters = clusters_of(rows, config)
    places = [SUBSETS.index(row.get("conflict") or "none") for row in rows]
    block: Block = {}
    for name, column in values.items():
        # A value and a count of 1 per answer, so that a mean is a function of sums over clusters.
        counts = np.zeros((len(rows), len(SUBSETS), 2))
        for index, value in enumerate(column):
            if value is not None:
                counts[index, places[index]] = (value, 1.0)
        drawn, share = clusters.sums(counts), binary(column)
        scored = drawn.total[:, 1].astype(int).tolist()
        whole = drawn.over(0).interval(metrics.mean_of_sums, sum(scored), share=share)
        block[name] = {
            **whole.row(),
            "unscored": len(rows) - sum(scored),
            "subsets": {
                subset: {
                    **drawn.part(index)
                    .interval(metrics.mean_of_sums, scored[index], share=share)
                    .row(),
                    "unscored": places.count(index) - scored[index],
                }
                for index, subset in enumerate(SUBSETS)
                if places.count(index) > 0 and set(places) != {SUBSETS.index("none")}
            },
        }
    return block


def score_readings(
    readings: Sequence[Reading],
    questions: Sequence[Question],
    rows: Sequence[Row],
    config: BootstrapConfig,
) -> dict[str, Block]:
    """For each reading: its parser, the accuracy on each task (with the numbers of yes-or-no
    questions) and, as ``mean``, the unweighted mean of these accuracies.

    Args:
        questions: all questions of the benchmark; open ones are left out.
        rows: the answers. ``missing`` counts the questions without one, whether the reading takes
            them for wrong or skips them.
    """
    closed = [question for question in questions if question.labels is not None]
    answers = {str(row["sample_id"]): row for row in rows}
    return {one.name: _score_reading(one, closed, answers, config) for one in readings}


def _score_reading(
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
            tasks[question.task].append(_read_again(reading, question, answer))
    return {
        "parser": reading.parser,
        "missing": reading.missing,
        "mean": _mean_over_tasks(list(tasks.values()), config),
        "tasks": {
            task: {"missing": missing[task], **_accuracy(rows, config)}
            for task, rows in tasks.items()
        },
    }


def _read_again(reading: Reading, question: Question, answer: Row | None) -> Row:
    if answer is None:
        return {**question.row(), "status": "malformed", "answer": None}
    if reading.read is None:
        return answer
    parsed = reading.read(answer["raw"], question)
    return {**answer, "status": parsed.status, "answer": parsed.label}


def _mean_over_tasks(tasks: Sequence[Sequence[Row]], config: BootstrapConfig) -> Block:
    """Mean of the tasks' accuracies. The tasks share their clusters, since the questions that two
    tasks ask about one clip are not independent."""
    rows = [row for task in tasks for row in task]
    counts = np.zeros((len(rows), len(tasks), 2))  # (n, T, right and all)
    places = [place for place, task in enumerate(tasks) for _ in task]
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        counts[index, place] = (row["answer"] == row["truth"], 1.0)

    def mean(values: Values) -> Values:
        return metrics.mean_of(metrics.mean_of_sums(values))

    return clusters_of(rows, config).sums(counts).interval(mean, len(rows), share=True).row()


def _accuracy(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    n, labels = len(rows), label_order(rows)
    overall = subset_counts(rows, labels, clusters_of(rows, config)).over(0)
    block: Block = {"n": n, "accuracy": overall.interval(metrics.war, n, share=True).row()}
    if set(labels) == {"yes", "no"}:
        block["yes_no"] = yes_no_numbers(overall, labels)
    return block


def binary(column: Sequence[float | None]) -> bool:
    """Whether a score is only ever 0 or 1, so that its mean is a share of answers."""
    return all(value is None or value in (0, 1) for value in column)


def is_right(row: Row) -> bool:
    """Whether the answer could be read and is the truth."""
    return row["status"] == "ok" and row["answer"] == row["truth"]


def _statuses(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(str(row["status"]) for row in rows))


def _by_reading(rows: Sequence[Row]) -> Block:
    """How many answers each reading reads as what, and how many of them are right. Rows of earlier
    versions were read in one way only, and have no such block."""
    if not all("strict_status" in row for row in rows):
        return {}
    block: Block = {}
    for name, prefix in (("verdict", ""), ("strict", "strict_")):
        counts = Counter(str(row[f"{prefix}status"]) for row in rows)
        right = sum(row[f"{prefix}answer"] == row["truth"] for row in rows)
        block[name] = {**{status: counts[status] for status in STATUSES}, "right": right}
    return {"by_reading": block}


def mean_war(counts: Counts) -> Values:
    """Mean of the subsets' accuracies, (..., G, K, K + 2) to (...)."""
    return metrics.mean_of(metrics.war(counts))


def _gap_of_sides(counts: Counts) -> Values:
    """Accuracy on audio-aligned clips minus that on video-aligned clips, (..., 2, K, K + 2) in the
    order of ``CONFLICTING`` to (...)."""
    accuracies = metrics.war(counts)
    return accuracies[..., 1] - accuracies[..., 0]


def _scalars(counts: ClusterSums, n: int) -> Block:
    return {
        name: counts.interval(lambda c, name=name: metrics.scalars(c)[name], n, share=True).row()
        for name in metrics.SCALARS
    }


def _classes(counts: ClusterSums, labels: Sequence[str]) -> Block:
    """Numbers of each class. Only the row and the column of a class matter, so that clusters
    without the class do not count."""
    total = counts.total
    block: Block = {}
    for index, label in enumerate(labels):
        block[label] = {
            "support": int(total[index].sum()),
            "precision": _of_class(counts.only((slice(None), index)), metrics.precision, index),
            "recall": _of_class(counts.only(index), metrics.recall, index),
            "f1": _of_class(_row_and_column(counts, index), metrics.f1, index),
        }
    return block


def _of_class(part: ClusterSums, metric: Statistic, index: int) -> Block:
    n = int(part.total.sum())
    return part.interval(lambda c: metric(c)[..., index], n, share=True).row()


def _row_and_column(counts: ClusterSums, index: int) -> ClusterSums:
    """The counts of the answers that are of a class, or name it."""
    kept = np.zeros(counts.sums.shape[1:], dtype=np.bool_)
    kept[index] = kept[:, index] = True
    return counts.only(kept)


def _confusion(total: Counts, labels: Sequence[str]) -> Block:
    return {"columns": list(metrics.columns(labels)), "counts": total.astype(int).tolist()}


def _subsets(counts: ClusterSums, rows: Sequence[Row], labels: Sequence[str]) -> Block:
    block: Block = {}
    for index, name in enumerate(SUBSETS):
        n = sum((row.get("conflict") or "none") == name for row in rows)
        if n and not (name == "none" and n == len(rows)):
            part = counts.part(index)
            block[name] = {
                "n": n,
                **_scalars(part, n),
                "confusion": _confusion(part.total, labels),
            }
    return block


def _groups(rows: Sequence[Row], clusters: Clusters) -> Block:
    """Accuracy for each value of each group field except the cluster itself, and the gap between
    the best and the worst value. Noise alone makes this gap positive, so read its interval."""
    block: Block = {}
    keys = dict.fromkeys(key for row in rows for key in row.get("group", {}))
    for key in keys:
        values = sorted({row["group"][key] for row in rows if key in row.get("group", {})})
        if key == clusters.config.cluster or not 2 <= len(values) <= 12:
            continue
        counts = np.zeros((len(rows), len(values), 2))
        for index, row in enumerate(rows):
            if key in row.get("group", {}):
                counts[index, values.index(row["group"][key])] = (is_right(row), 1)
        drawn = clusters.sums(counts)
        totals = drawn.total
        # Stable, so that values with equal accuracies keep their order by name.
        order = np.argsort(totals[:, 0] / totals[:, 1], kind="stable")
        block[key] = {
            "values": {
                value: drawn.part(i)
                .interval(metrics.mean_of_sums, int(totals[i, 1]), share=True)
                .row()
                for i, value in enumerate(values)
            },
            "worst": values[int(order[0])],
            "best": values[int(order[-1])],
            "worst_gap": drawn.interval(_gap, int(totals[:, 1].sum()), limits=(0, 1)).row(),
        }
    return block


def _gap(values: Values) -> Values:
    """Range of the accuracies of V values, (..., V, 2) to (...); NaN where one has no answer."""
    means = metrics.mean_of_sums(values)
    return means.max(-1) - means.min(-1)


def yes_no_numbers(counts: ClusterSums, labels: Sequence[str]) -> Block:
    """The numbers of yes-or-no questions, as EmoReAlM (arXiv 2602.07054) reports them: the accuracy
    where the truth is yes, the accuracy where it is no, their harmonic mean (which the paper calls
    F1), and the share of yes answers. ``f1`` is the usual F1 of yes, added here."""
    yes, no = labels.index("yes"), labels.index("no")

    def harmonic(c: Counts) -> Values:
        found = metrics.recall(c)
        sums = found[..., yes] + found[..., no]
        # The harmonic mean is 0 where both recalls are, and undefined where one of them is.
        out = np.where(np.isnan(sums), np.nan, 0.0)
        return np.divide(2 * found[..., yes] * found[..., no], sums, out=out, where=sums > 0)

    def rate(c: Counts) -> Values:
        return c[..., yes].sum(-1) / np.maximum(c.sum((-2, -1)), 1)

    def number(part: ClusterSums, statistic: Statistic) -> Block:
        return part.interval(statistic, int(part.total.sum()), share=True).row()

    return {
        "accuracy_yes": number(counts.only(yes), lambda c: metrics.recall(c)[..., yes]),
        "accuracy_no": number(counts.only(no), lambda c: metrics.recall(c)[..., no]),
        "harmonic_mean": number(counts, harmonic),
        "f1": _of_class(_row_and_column(counts, yes), metrics.f1, yes),
        "yes_rate": number(counts, rate),
    }
