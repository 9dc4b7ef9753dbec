"""From answered questions to the numbers of ``results.json``.

n answers, K labels, G conflict subsets (with "none" last), S speakers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.data.sample import CONFLICTS
from mmemo.evaluation import metrics
from mmemo.evaluation.formats import counted
from mmemo.evaluation.metrics import Counts, Values
from mmemo.evaluation.parsing import STATUSES
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance import CONFLICTING, reliance_block
from mmemo.evaluation.statistics import (
    Bootstrap,
    BootstrapConfig,
    Interval,
    Resampled,
    Statistic,
    mcnemar,
)

Block = dict[str, Any]

ScoreValues = Mapping[str, Sequence[float | None]]
"""Of each score by name, one value an answer; None where it could not score the answer."""

SUBSETS: tuple[str, ...] = (*CONFLICTS, "none")


def score_rows(rows: Sequence[Row], config: BootstrapConfig) -> dict[str, Block]:
    """The block of each task, in the order in which tasks first come."""
    tasks = dict.fromkeys(str(row["task"]) for row in rows)
    blocks: dict[str, Block] = {}
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        blocks[task] = score_task(own, config) if label_order(own) else open_task(own, config)
    return blocks


def open_task(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """The block of a task of open questions. It has no ``metrics``: its numbers are its scores."""
    return {
        "labels": [],
        "n": len(rows),
        "clusters": len({cluster_of(row, config) for row in rows}),
        "statuses": {**dict.fromkeys(STATUSES, 0), **_statuses(rows)},
    }


def score_task(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """All numbers of one task, each with its interval and n."""
    labels = label_order(rows)
    bootstrap = Bootstrap([cluster_of(row, config) for row in rows], config)
    counts = bootstrap.resample(subset_counts(rows, labels))
    overall = Resampled(counts.total.sum(0), counts.draws.sum(1), config)
    n = len(rows)
    block: Block = {
        "labels": list(labels),
        "n": n,
        "clusters": bootstrap.clusters,
        "statuses": {**dict.fromkeys(STATUSES, 0), **_statuses(rows)},
        "metrics": _scalars(overall, n),
        "average": average_interval(counts, rows).row(),
        "classes": _classes(overall, labels),
        "confusion": _confusion(overall.total, labels),
        "subsets": _subsets(counts, rows, labels),
        "groups": _groups(rows, bootstrap),
    }
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
    """What the row's answer is not independent of: its speaker, else its file, else nothing."""
    named = row.get("group", {}).get(config.cluster)
    if named is not None:
        return f"{config.cluster}:{named}"
    media = sorted(set(row.get("media", {}).values()))
    return f"media:{media[0]}" if media else f"sample:{row['sample_id']}"


def cluster_words(rows: Sequence[Row], config: BootstrapConfig) -> str:
    """What the intervals resample: ``20 speakers``, or ``18 speakers and 3 clips`` where some rows
    name no speaker."""
    names = {cluster_of(row, config) for row in rows}
    kinds = Counter(name.partition(":")[0] for name in names)
    nouns = {"speaker": "speaker", "media": "clip", "sample": "question"}
    return " and ".join(
        counted(kinds[kind], nouns[kind]) if kind in nouns else f"{kinds[kind]} clusters by {kind}"
        for kind in sorted(kinds, key=lambda kind: kind != config.cluster)
    )


def subset_counts(rows: Sequence[Row], labels: Sequence[str]) -> Counts:
    """One count for each answer, (n, G, K, K + 2)."""
    column = {name: index for index, name in enumerate(metrics.columns(labels))}
    out = np.zeros((len(rows), len(SUBSETS), len(labels), len(column)))
    for index, row in enumerate(rows):
        answered = row["answer"] if row["status"] == "ok" else row["status"]
        subset = SUBSETS.index(row.get("conflict") or "none")
        out[index, subset, labels.index(row["truth"]), column[answered]] = 1
    return out


def average_interval(counts: Resampled, rows: Sequence[Row]) -> Interval:
    """The headline: unweighted mean of the accuracies on the conflict and consistent subsets;
    plain accuracy where the rows carry no conflict field."""
    parts = subset_indices(rows)
    within = sum(SUBSETS.index(row.get("conflict") or "none") in parts for row in rows)
    return counts.part(parts).interval(_mean_war, within)


def subset_indices(rows: Sequence[Row]) -> list[int]:
    """Positions in SUBSETS of the subsets that the headline averages over."""
    present = {row.get("conflict") or "none" for row in rows}
    found = [i for i, name in enumerate(SUBSETS) if name in present and name != "none"]
    return found or [SUBSETS.index("none")]


def compare_rows(a: Sequence[Row], b: Sequence[Row], config: BootstrapConfig) -> Block:
    """Paired comparison of two runs on the same questions of one task, in the same order: each
    number of both, the difference a - b with its clustered interval and p (of the headline, of
    accuracy, UAR and F1, and of the accuracy on each subset), and McNemar's exact test on the
    right answers."""
    labels = label_order([*a, *b])
    bootstrap = Bootstrap([cluster_of(row, config) for row in a], config)
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
    """The answers of a system that says ``label`` to everything: the majority baseline."""
    fixed = {"raw": label, "answer": label, "status": "ok"}
    return [{**row, **fixed, "score": float(row["truth"] == label)} for row in rows]


def _difference(counts: Resampled, statistic: Statistic, n: int) -> Block:
    """``statistic`` of both runs, from (..., 2, G, K, K + 2) counts, and what lies between."""

    def difference(values: Values) -> Values:
        return statistic(values[..., 0, :, :, :]) - statistic(values[..., 1, :, :, :])

    p = counts.p_two_sided(difference)
    one, other = (counts.part(index).interval(statistic, n).row()["value"] for index in (0, 1))
    found = counts.interval(difference, n).row()
    return {**found, "a": one, "b": other, "p": None if p is None else round(p, 6)}


def _right(row: Row) -> bool:
    return row["status"] == "ok" and row["answer"] == row["truth"]


def _statuses(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(str(row["status"]) for row in rows))


def _mean(values: Values) -> Values:
    return values[..., 0] / values[..., 1]


def _mean_war(counts: Counts) -> Values:
    """(..., G, K, K + 2) to the mean of the subsets' accuracies."""
    return metrics.mean_of(metrics.war(counts))


def _gap_of_sides(counts: Counts) -> Values:
    """(..., 2, K, K + 2), in the order of CONFLICTING, to the accuracy where the voice decides less
    that where the face does."""
    both = metrics.war(counts)
    return both[..., 1] - both[..., 0]


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
    """Accuracy for each value of each group field (apart from the cluster itself), and the gap
    between the best and the worst value. The gap of noisy equals is above 0: read its interval."""
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
    """(..., V, 2) to the range of the V accuracies; NaN when a value was not drawn."""
    means = metrics.mean_of_sums(values)
    return means.max(-1) - means.min(-1)


def yes_no_numbers(counts: Resampled, labels: Sequence[str], n: int) -> Block:
    """What EmoReAlM (arXiv 2602.07054) reports for yes-or-no probes: accuracy where the truth is
    yes, where it is no, their harmonic mean (it calls this F1), and the share of yes answers; and
    beside them the ordinary F1 of yes."""
    yes, no = labels.index("yes"), labels.index("no")

    def harmonic(c: Counts) -> Values:
        found = metrics.recall(c)
        sums = found[..., yes] + found[..., no]
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
