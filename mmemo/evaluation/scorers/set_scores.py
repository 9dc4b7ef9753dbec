"""Open-vocabulary F1 as MER-UniBench's scorer averages it, beside the mean of the answers' F1.

A score that compares sets of words logs, for each answer, its precision and recall under each
grouping (``log_extra("precision_recall", ...)``). The released scorer (AffectGPT, arXiv 2501.16566)
takes the mean precision P and the mean recall R over the answers, then F1 = 2PR / (P + R) for each
grouping, then the mean over the groupings. An answer whose truth a grouping does not know is left
out there; one without words has precision and recall 0. Our own score averages the F1 of each
answer.

The official value is a statistic of sums over clusters, as every number with an interval is.

Shapes: n answers, W groupings (five wheels, or one), G conflict subsets; the last axis holds the
sums of precision, of recall, and of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmemo.errors import EvaluationError
from mmemo.evaluation import metrics
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row, read_predictions
from mmemo.evaluation.scoring import SUBSETS, Block
from mmemo.statistics import BootstrapConfig, Floats, paired_difference

LOGGED = "precision_recall"
"""What a score logs, and its key in ``scores.jsonl``."""

Pairs = Sequence[Sequence[float] | None]
"""Precision and recall under each grouping; None under one that does not know the truth."""

SetValues = Mapping[str, Sequence[Pairs | None]]
"""Name of each score that logs pairs to the pairs of each answer; None for an unscored answer."""


def official_precision(sums: Values) -> Values:
    """Mean over the groupings of the mean precision, (..., W, 3) to (...)."""
    return over_groupings(metrics.mean_of_sums(sums[..., [0, 2]]))


def official_recall(sums: Values) -> Values:
    """Mean over the groupings of the mean recall, (..., W, 3) to (...)."""
    return over_groupings(metrics.mean_of_sums(sums[..., [1, 2]]))


def official_f1(sums: Values) -> Values:
    """Mean over the groupings of F1 = 2PR / (P + R), (..., W, 3) to (...)."""
    precision = metrics.mean_of_sums(sums[..., [0, 2]])
    recall = metrics.mean_of_sums(sums[..., [1, 2]])
    both = precision + recall
    # 0 where P and R are; NaN where a grouping has no answer.
    f1 = np.where(np.isnan(both), np.nan, 0.0)
    np.divide(2 * precision * recall, both, out=f1, where=both > 0)
    return over_groupings(f1)


STATISTICS = {
    "official": official_f1,
    "official_precision": official_precision,
    "official_recall": official_recall,
}


def read_sets(path: Path, rows: Sequence[Row]) -> SetValues:
    """The logged pairs of some answers, from ``scores.jsonl``; nothing where no score logs any."""
    if not path.exists():
        return {}
    found: dict[str, Any] = {line["key"]: line.get(LOGGED, {}) for line in read_predictions(path)}
    names = dict.fromkeys(name for row in rows for name in found.get(row["key"], {}))
    return {name: [found.get(row["key"], {}).get(name) for row in rows] for name in names}


def set_means(rows: Sequence[Row], values: SetValues, config: BootstrapConfig) -> Block:
    """The official values of each score that logs pairs, ``NAME_official`` and its precision and
    recall, in the form of :func:`mmemo.evaluation.scoring.score_means`.

    Raises:
        EvaluationError: a score logged something else.
    """
    block: Block = {}
    clusters = clusters_of(rows, config)
    places = [SUBSETS.index(row.get("conflict") or "none") for row in rows]
    for name, column in values.items():
        sums = _sums(name, column)
        if sums is None:
            continue
        counts = np.zeros((len(rows), len(SUBSETS), *sums.shape[1:]))
        counts[np.arange(len(rows)), places] = sums
        parts = clusters.sums(counts)
        whole = clusters.sums(sums)
        scored = [_scored(sums[np.equal(places, index)]) for index in range(len(SUBSETS))]
        for key, statistic in STATISTICS.items():
            block[f"{name}_{key}"] = {
                **whole.interval(statistic, sum(scored), limits=(0, 1)).row(),
                "unscored": len(rows) - sum(scored),
                "subsets": {
                    subset: {
                        **parts.part(index).interval(statistic, scored[index], limits=(0, 1)).row(),
                        "unscored": places.count(index) - scored[index],
                    }
                    for index, subset in enumerate(SUBSETS)
                    if places.count(index) > 0 and set(places) != {SUBSETS.index("none")}
                },
            }
    return block


def compare_sets(rows: Sequence[Row], a: SetValues, b: SetValues, config: BootstrapConfig) -> Block:
    """Paired comparison of the official F1 of two runs on the same questions, in the form of
    :func:`mmemo.evaluation.comparison.compare_means`. The means of precision and recall are not
    compared once more, since every p-value makes the correction of all others stricter."""
    block: Block = {}
    clusters = clusters_of(rows, config)
    for name in (name for name in a if name in b):
        ours, theirs = _sums(name, a[name]), _sums(name, b[name])
        if ours is None or theirs is None or ours.shape != theirs.shape:
            continue
        both = np.stack([ours, theirs], axis=1)  # (n, runs, W, 3)
        # An answer that one run has no pair for is in neither mean.
        both *= (both[..., 2:] > 0).all(axis=1, keepdims=True)
        counts, n = clusters.sums(both), _scored(both[:, 0])
        difference = paired_difference(counts, official_f1, n, share=True)
        block[f"{name}_official"] = {**difference, "unscored": len(rows) - n}
    return block


def _sums(name: str, column: Sequence[Pairs | None]) -> Floats | None:
    """Precision, recall and 1 of each answer under each grouping, (n, W, 3), 0 where there is no
    pair; None if no answer has any."""
    if all(pairs is None for pairs in column):
        return None
    try:
        sums = np.zeros((len(column), max(len(pairs) for pairs in column if pairs is not None), 3))
        for place, pairs in enumerate(column):
            for index, pair in enumerate(pairs or ()):
                if pair is not None:
                    precision, recall = pair
                    sums[place, index] = (precision, recall, 1.0)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"score '{name}' logs a '{LOGGED}' that is no list of [precision, recall] pairs; log "
            "one pair for each grouping, or use another name"
        ) from error
    return sums


def _scored(sums: Floats) -> int:
    """The number of answers that some grouping scores."""
    return int((sums[..., 2] > 0).any(-1).sum())


def over_groupings(values: Values) -> Values:
    """Mean over the groupings that have an answer; NaN if none has."""
    known = ~np.isnan(values)
    counted = np.stack([np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(float)], -1)
    return metrics.mean_of_sums(counted)
