"""Means of the scores that reward functions gave to answers, and their paired comparison.

n answers, G conflict subsets (with "none" last).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmemo.evaluation import metrics
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import SUBSETS, Block, ScoreValues, cluster_of
from mmemo.evaluation.statistics import Bootstrap, BootstrapConfig, Resampled


def task_means(
    rows: Sequence[Row], values: ScoreValues, config: BootstrapConfig
) -> dict[str, Block]:
    """For each task, the means of the scores on its answers. A score that is for another task's
    answers only, and so gave none of these a value, is left out."""
    tasks: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        tasks.setdefault(str(row["task"]), []).append(place)
    useful = {name for name, column in values.items() if any(v is not None for v in column)}
    blocks: dict[str, Block] = {}
    for task, places in tasks.items():
        own = {name: [column[place] for place in places] for name, column in values.items()}
        meant = {
            name: column
            for name, column in own.items()
            if name not in useful or any(value is not None for value in column)
        }
        blocks[task] = score_means([rows[place] for place in places], meant, config)
    return blocks


def score_means(rows: Sequence[Row], values: ScoreValues, config: BootstrapConfig) -> Block:
    """The mean of each score over the answers it could score, with its interval, over all and on
    each conflict subset. ``unscored`` answers count in no mean: None is not 0."""
    bootstrap = Bootstrap([cluster_of(row, config) for row in rows], config)
    places = [SUBSETS.index(row.get("conflict") or "none") for row in rows]
    block: Block = {}
    for name, column in values.items():
        counts = np.zeros((len(rows), len(SUBSETS), 2))
        for index, value in enumerate(column):
            if value is not None:
                counts[index, places[index]] = (value, 1.0)
        drawn = bootstrap.resample(counts)
        whole = Resampled(drawn.total.sum(0), drawn.draws.sum(1), config)
        scored = drawn.total[:, 1].astype(int).tolist()
        block[name] = {
            **whole.interval(metrics.mean_of_sums, sum(scored)).row(),
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
    """Paired comparison of the scores of two runs on the same questions: the means of both over
    the answers that both have scored, and the difference a - b with its clustered interval and p.
    ``unscored`` is how many pairs lack a value."""
    bootstrap = Bootstrap([cluster_of(row, config) for row in rows], config)

    def difference(values: Values) -> Values:
        return metrics.mean_of_sums(values[..., 0, :]) - metrics.mean_of_sums(values[..., 1, :])

    block: Block = {}
    for name in (name for name in a if name in b):
        pairs = np.zeros((len(rows), 2, 2))
        for index, (one, other) in enumerate(zip(a[name], b[name], strict=True)):
            if one is not None and other is not None:
                pairs[index] = ((one, 1.0), (other, 1.0))
        counts, n = bootstrap.resample(pairs), int(pairs[:, 0, 1].sum())
        p = counts.p_two_sided(difference)
        sides = (counts.part(side) for side in (0, 1))
        means = [side.interval(metrics.mean_of_sums, n).row()["value"] for side in sides]
        block[name] = {
            **counts.interval(difference, n).row(),
            "a": means[0],
            "b": means[1],
            "p": None if p is None else round(p, 6),
            "unscored": len(rows) - n,
        }
    return block
