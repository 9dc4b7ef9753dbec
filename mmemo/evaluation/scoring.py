"""From answered questions to the numbers of ``results.json``.

Three kinds of numbers are made here, each with a bootstrap interval:

- the metrics of each task, and their paired comparison between two models (:func:`score_rows`,
  :func:`compare_rows`);
- the means of the scores that reward functions gave to answers, and their comparison
  (:func:`task_means`, :func:`compare_means`);
- the accuracies of a benchmark with several tasks, once for each parser of its answers
  (:func:`score_readings`).

Shapes: n answers, K labels, G conflict subsets (with "none" last), T tasks, R bootstrap replicates.
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
from mmemo.evaluation.metrics import Counts, Values
from mmemo.evaluation.predictions import Row
from mmemo.formats import counted
from mmemo.statistics import (
    Bootstrap,
    BootstrapConfig,
    Interval,
    Resampled,
    Statistic,
    mcnemar,
)

Block = dict[str, Any]

ScoreValues = Mapping[str, Sequence[float | None]]
"""Name of each score to one value per answer; None where the score could not be computed."""

SUBSETS: tuple[str, ...] = (*CONFLICTS, "none")


def score_rows(rows: Sequence[Row], config: BootstrapConfig) -> dict[str, Block]:
    """The numbers of each task, in the order in which the tasks first occur."""
    tasks = dict.fromkeys(str(row["task"]) for row in rows)
    blocks: dict[str, Block] = {}
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        blocks[task] = score_task(own, config) if label_order(own) else open_task(own, config)
    return blocks


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
    bootstrap = bootstrap_of(rows, config)
    counts = bootstrap.resample(subset_counts(rows, labels))
    overall = _over_subsets(counts)
    n = len(rows)
    block: Block = {
        "labels": list(labels),
        "n": n,
        "clusters": bootstrap.clusters,
        "statuses": {**dict.fromkeys(STATUSES, 0), **_statuses(rows)},
        **_by_reading(rows),
        "metrics": _scalars(overall, n),
        "average": average_interval(counts, rows).row(),
        "classes": _classes(overall, labels),
        "confusion": _confusion(overall.total, labels),
        "subsets": _subsets(counts, rows, labels),
        "groups": _groups(rows, bootstrap),
    }
    # A benchmark without a score function is scored by accuracy, which stands in the metrics
    # already.
    if any(row["score"] != float(row["answer"] == row["truth"]) for row in rows):
        scores = np.array([[row["score"], 1.0] for row in rows])
        block["score"] = bootstrap.resample(scores).interval(_mean, n).row()
    if set(CONFLICTING) <= {row.get("conflict") for row in rows}:
        parts = [SUBSETS.index(name) for name in CONFLICTING]
        within = sum(row.get("conflict") in CONFLICTING for row in rows)
        conflict = counts.part(parts)
        block["conflict_average"] = conflict.interval(_mean_war, within).row()
        block["conflict_gap"] = conflict.interval(_gap_of_sides, within).row()
    reliance = reliance_block(rows, bootstrap)
    if reliance:
        block["reliance"] = reliance
    if labels and set(labels) == {"yes", "no"}:
        block["yes_no"] = yes_no_numbers(overall, labels, n)
    return block


def label_order(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of a task, in the benchmark's order."""
    return tuple(dict.fromkeys(label for row in rows for label in row["labels"]))


def cluster_of(row: Row, config: BootstrapConfig) -> str:
    """The cluster that the bootstrap resamples the row's answer with: its speaker, or its media
    file where the row names no speaker."""
    named = row.get("group", {}).get(config.cluster)
    if named is not None:
        # The prefix keeps a speaker apart from a clip of the same name, and tells the kind of
        # cluster.
        return f"{config.cluster}:{named}"
    media = sorted(set(row.get("media", {}).values()))
    return f"media:{media[0]}" if media else f"sample:{row['sample_id']}"


def cluster_words(rows: Sequence[Row], config: BootstrapConfig) -> str:
    """The clusters that the intervals resample, in words: ``20 speakers``, or ``18 speakers and 3
    clips`` where some rows name no speaker."""
    names = {cluster_of(row, config) for row in rows}
    kinds = Counter(name.partition(":")[0] for name in names)
    nouns = {"speaker": "speaker", "media": "clip", "sample": "question"}
    return " and ".join(
        counted(kinds[kind], nouns[kind]) if kind in nouns else f"{kinds[kind]} clusters by {kind}"
        for kind in sorted(kinds, key=lambda kind: kind != config.cluster)
    )


def bootstrap_of(rows: Sequence[Row], config: BootstrapConfig) -> Bootstrap:
    """The bootstrap over the clusters of some answers."""
    return Bootstrap([cluster_of(row, config) for row in rows], config)


def subset_counts(rows: Sequence[Row], labels: Sequence[str]) -> Counts:
    """A confusion matrix of each single answer, (n, G, K, K + 2): 1 at its subset, true label and
    answer, else 0; see :mod:`mmemo.evaluation.metrics` for the columns."""
    column = {name: index for index, name in enumerate(metrics.columns(labels))}
    out = np.zeros((len(rows), len(SUBSETS), len(labels), len(column)))
    for index, row in enumerate(rows):
        # Refused and malformed answers have columns of their own and stay in every denominator.
        answered = row["answer"] if row["status"] == "ok" else row["status"]
        subset = SUBSETS.index(row.get("conflict") or "none")
        out[index, subset, labels.index(row["truth"]), column[answered]] = 1
    return out


def average_interval(counts: Resampled, rows: Sequence[Row]) -> Interval:
    """The headline: the unweighted mean of the accuracies on the conflict and consistent subsets,
    or plain accuracy where no row has a conflict field."""
    parts = subset_indices(rows)
    within = sum(SUBSETS.index(row.get("conflict") or "none") in parts for row in rows)
    return counts.part(parts).interval(_mean_war, within)


def subset_indices(rows: Sequence[Row]) -> list[int]:
    """Positions in SUBSETS of the subsets that the headline averages over."""
    present = {row.get("conflict") or "none" for row in rows}
    found = [i for i, name in enumerate(SUBSETS) if name in present and name != "none"]
    return found or [SUBSETS.index("none")]


def compare_rows(a: Sequence[Row], b: Sequence[Row], config: BootstrapConfig) -> Block:
    """Paired comparison of two runs on the same questions of one task, in the same order.

    ``differences`` has, for the headline, accuracy, UAR, F1 and the accuracy on each subset, the
    number of both runs and the difference a - b with its clustered interval and p. ``mcnemar`` is
    McNemar's exact test on the right answers.
    """
    labels = label_order([*a, *b])
    # Both runs answer the same questions, so they have the same clusters.
    bootstrap = bootstrap_of(a, config)
    # Both runs are resampled with the same draws, so that their difference is paired.
    both = np.stack([subset_counts(a, labels), subset_counts(b, labels)], axis=1)
    counts = bootstrap.resample(both)
    present = Counter(row.get("conflict") or "none" for row in a)

    def mean_over(parts: Sequence[int]) -> Statistic:
        return lambda values: _mean_war(values[..., parts, :, :])

    differences: Block = {"average": _difference(counts, mean_over(subset_indices(a)), len(a))}
    for name in metrics.SCALARS:
        differences[name] = _difference(
            counts, lambda values, name=name: metrics.scalars(values.sum(-3))[name], len(a)
        )
    if set(CONFLICTING) <= set(present):
        parts = [SUBSETS.index(name) for name in CONFLICTING]
        within = sum(present[name] for name in CONFLICTING)
        differences["conflict_average"] = _difference(counts, mean_over(parts), within)
    if set(present) != {"none"}:
        for index, name in enumerate(SUBSETS):
            if present[name]:
                differences[name] = _difference(counts, mean_over([index]), present[name])
    test = mcnemar([_right(row) for row in a], [_right(row) for row in b])
    return {
        "n": len(a),
        "clusters": bootstrap.clusters,
        "differences": differences,
        "mcnemar": {"only_a": test.only_a, "only_b": test.only_b, "p": round(test.p, 6)},
    }


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
    bootstrap = bootstrap_of(rows, config)
    places = [SUBSETS.index(row.get("conflict") or "none") for row in rows]
    block: Block = {}
    for name, column in values.items():
        # A value and a count of 1 per answer, so that a mean is a function of sums, which is what
        # the bootstrap resamples.
        counts = np.zeros((len(rows), len(SUBSETS), 2))
        for index, value in enumerate(column):
            if value is not None:
                counts[index, places[index]] = (value, 1.0)
        drawn = bootstrap.resample(counts)
        scored = drawn.total[:, 1].astype(int).tolist()
        block[name] = {
            **_over_subsets(drawn).interval(metrics.mean_of_sums, sum(scored)).row(),
            "unscored": len(rows) - sum(scored),
            "subsets": {
                subset: {
                    **drawn.part(index).interval(metrics.mean_of_sums, scored[index]).row(),
                    "unscored": places.count(index) - scored[index],
                }
                for index, subset in enumerate(SUBSETS)
                if places.count(index) > 0 and set(places) != {SUBSETS.index("none")}
            },
        }
    return block


def compare_means(
    rows: Sequence[Row], a: ScoreValues, b: ScoreValues, config: BootstrapConfig
) -> Block:
    """Paired comparison of the scores of two runs on the same questions: the means of both runs
    over the questions that both have a score for, and the difference a - b with its clustered
    interval and p. ``unscored`` counts the questions left out."""
    bootstrap = bootstrap_of(rows, config)
    block: Block = {}
    for name in (name for name in a if name in b):
        # (n, runs, value and count): what one run has no score for stays 0 and is in neither mean.
        pairs = np.zeros((len(rows), 2, 2))
        for index, (one, other) in enumerate(zip(a[name], b[name], strict=True)):
            if one is not None and other is not None:
                pairs[index] = ((one, 1.0), (other, 1.0))
        counts, n = bootstrap.resample(pairs), int(pairs[:, 0, 1].sum())
        difference = _difference(counts, metrics.mean_of_sums, n)
        block[name] = {**difference, "unscored": len(rows) - n}
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
    """Mean of the tasks' accuracies. One bootstrap serves all tasks, since the questions that two
    tasks ask about one clip are not independent."""
    rows = [row for task in tasks for row in task]
    counts = np.zeros((len(rows), len(tasks), 2))  # (n, T, right and all)
    places = [place for place, task in enumerate(tasks) for _ in task]
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        counts[index, place] = (row["answer"] == row["truth"], 1.0)

    def mean(values: Values) -> Values:
        return metrics.mean_of(metrics.mean_of_sums(values))

    return bootstrap_of(rows, config).resample(counts).interval(mean, len(rows)).row()


def _accuracy(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    n, labels = len(rows), label_order(rows)
    counts = bootstrap_of(rows, config).resample(subset_counts(rows, labels))
    overall = _over_subsets(counts)
    block: Block = {"n": n, "accuracy": overall.interval(metrics.war, n).row()}
    if set(labels) == {"yes", "no"}:
        block["yes_no"] = yes_no_numbers(overall, labels, n)
    return block


def _difference(counts: Resampled, statistic: Statistic, n: int) -> Block:
    """The difference of ``statistic`` between two runs, with its interval and p, and ``statistic``
    of each, from counts (2, ...) of both."""
    # Indexed from the end, because replicates have one more axis in front.
    rest = [slice(None)] * (counts.total.ndim - 1)
    first, second = (..., 0, *rest), (..., 1, *rest)

    def difference(values: Values) -> Values:
        return statistic(values[first]) - statistic(values[second])

    p = counts.p_two_sided(difference)
    a, b = (counts.part(side).interval(statistic, n).row()["value"] for side in (0, 1))
    found = counts.interval(difference, n).row()
    return {**found, "a": a, "b": b, "p": None if p is None else round(p, 6)}


def _over_subsets(counts: Resampled) -> Resampled:
    """Counts (G, ...) summed over the conflict subsets."""
    return Resampled(counts.total.sum(0), counts.draws.sum(1), counts.config)


def _right(row: Row) -> bool:
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


def _mean(values: Values) -> Values:
    # Every replicate draws clusters, and every cluster has answers, so the sum is never 0.
    return values[..., 0] / values[..., 1]


def _mean_war(counts: Counts) -> Values:
    """Mean of the subsets' accuracies, (..., G, K, K + 2) to (...)."""
    return metrics.mean_of(metrics.war(counts))


def _gap_of_sides(counts: Counts) -> Values:
    """Accuracy on audio-aligned clips minus that on video-aligned clips, (..., 2, K, K + 2) in the
    order of ``CONFLICTING`` to (...)."""
    accuracies = metrics.war(counts)
    return accuracies[..., 1] - accuracies[..., 0]


def _scalars(counts: Resampled, n: int) -> Block:
    return {
        name: counts.interval(lambda c, name=name: metrics.scalars(c)[name], n).row()
        for name in metrics.SCALARS
    }


def _classes(counts: Resampled, labels: Sequence[str]) -> Block:
    support = counts.total.sum(-1)
    block: Block = {}
    for index, label in enumerate(labels):
        n = int(support[index])
        block[label] = {
            "support": n,
            "precision": counts.interval(lambda c, i=index: metrics.precision(c)[..., i], n).row(),
            "recall": counts.interval(lambda c, i=index: metrics.recall(c)[..., i], n).row(),
            "f1": counts.interval(lambda c, i=index: metrics.f1(c)[..., i], n).row(),
        }
    return block


def _confusion(total: Counts, labels: Sequence[str]) -> Block:
    return {"columns": list(metrics.columns(labels)), "counts": total.astype(int).tolist()}


def _subsets(counts: Resampled, rows: Sequence[Row], labels: Sequence[str]) -> Block:
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


def _groups(rows: Sequence[Row], bootstrap: Bootstrap) -> Block:
    """Accuracy for each value of each group field except the cluster itself, and the gap between
    the best and the worst value. Noise alone makes this gap positive, so read its interval."""
    block: Block = {}
    keys = dict.fromkeys(key for row in rows for key in row.get("group", {}))
    for key in keys:
        values = sorted({row["group"][key] for row in rows if key in row.get("group", {})})
        if key == bootstrap.config.cluster or not 2 <= len(values) <= 12:
            continue
        counts = np.zeros((len(rows), len(values), 2))
        for index, row in enumerate(rows):
            if key in row.get("group", {}):
                counts[index, values.index(row["group"][key])] = (_right(row), 1)
        drawn = bootstrap.resample(counts)
        totals = drawn.total
        # Stable, so that values with equal accuracies keep their order by name.
        order = np.argsort(totals[:, 0] / totals[:, 1], kind="stable")
        block[key] = {
            "values": {
                value: drawn.part(i).interval(metrics.mean_of_sums, int(totals[i, 1])).row()
                for i, value in enumerate(values)
            },
            "worst": values[int(order[0])],
            "best": values[int(order[-1])],
            "worst_gap": drawn.interval(_gap, int(totals[:, 1].sum())).row(),
        }
    return block


def _gap(values: Values) -> Values:
    """Range of the accuracies of V values, (..., V, 2) to (...); NaN where one was not drawn."""
    means = metrics.mean_of_sums(values)
    return means.max(-1) - means.min(-1)


def yes_no_numbers(counts: Resampled, labels: Sequence[str], n: int) -> Block:
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

    return {
        "accuracy_yes": counts.interval(lambda c: metrics.recall(c)[..., yes], n).row(),
        "accuracy_no": counts.interval(lambda c: metrics.recall(c)[..., no], n).row(),
        "harmonic_mean": counts.interval(harmonic, n).row(),
        "f1": counts.interval(lambda c: metrics.f1(c)[..., yes], n).row(),
        "yes_rate": counts.interval(
            lambda c: c[..., yes].sum(-1) / np.maximum(c.sum((-2, -1)), 1), n
        ).row(),
    }
