"""Paired comparison of two runs on the same questions, and of how the two were made.

Shapes: S clusters, K labels, G conflict subsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.evaluation import metrics
from mmemo.evaluation.answer_source import CONFLICTING
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import (
    SUBSETS,
    Block,
    ScoreValues,
    binary,
    is_right,
    label_order,
    mean_war,
    subset_counts,
    subset_indices,
    subset_of,
)
from mmemo.statistics import BootstrapConfig, ClusterSums, holm, paired_difference, rounded

Setting = tuple[str, Any, Any]
"""Dotted name of a setting, and its value in either run; None where a run does not have it."""

# Shown elsewhere, or a consequence of what is named.
_NOT_SETTINGS = (
    *("prompts.example", "scores", "data.media_root", "intervals"),
    *(f"training.{name}" for name in ("manifests", "base", "same", "overlap", "why")),
)


def unlike_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Setting]:
    """Every setting in which two runs differ, from how their numbers were made (``made``): model,
    data, benchmark, sampling, prompts, generation, parser, seeds, and versions of libraries."""
    ours, theirs = dict(_flat(a)), dict(_flat(b))
    names = dict.fromkeys([*ours, *theirs])
    return [
        (name, ours.get(name), theirs.get(name))
        for name in names
        if ours.get(name) != theirs.get(name) and not name.startswith(_NOT_SETTINGS)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            inner: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def correct(blocks: Sequence[Block]) -> int:
    """Add ``p_holm`` to every difference of some comparisons, Holm's correction over all of them.

    Without conflict subsets the headline is the accuracy, and counts once.

    Returns:
        The number of p-values that are corrected together.
    """
    found = _tested(blocks)
    adjusted = holm([one["p"] for one in found])
    for one, p in zip(found, adjusted, strict=True):
        one["p_holm"] = rounded(p)
    for block in blocks:
        metric = block.get("differences", {})
        if "average" in metric and "p_holm" not in metric["average"]:
            metric["average"]["p_holm"] = metric["war"]["p_holm"]
    return count_tests(blocks)


def count_tests(blocks: Sequence[Block]) -> int:
    """The number of p-values that :func:`correct` corrects together."""
    return sum(one["p"] is not None for one in _tested(blocks))


def _tested(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        metric: Block = block.get("differences", {})
        if not any(name in metric for name in SUBSETS) and "average" in metric:
            metric = {name: one for name, one in metric.items() if name != "average"}
        found += [*metric.values()]
        found += [*block.get("scores", {}).values(), *block.get("scored", {}).values()]
    return found


def compare_rows(a: Sequence[Row], b: Sequence[Row], config: BootstrapConfig) -> Block:
    """Paired comparison of two runs on the same questions of one task, in the same order.

    ``differences`` has, for the headline, accuracy, UAR, F1 and the accuracy on each subset, the
    number of both runs and the difference a - b with its interval, p, n and number of clusters.
    ``discordant`` counts the questions that only one of the two runs answered correctly.
    """
    labels = label_order([*a, *b])
    # Both runs answer the same questions, so they have the same clusters.
    clusters = clusters_of(a, config)
    sums = [subset_counts(rows, labels, clusters).sums for rows in (a, b)]
    counts = ClusterSums(np.stack(sums, axis=1), clusters.sizes, config)  # (S, 2, G, K, K + 2)
    present = Counter(row.get("conflict") or "none" for row in a)

    def over(parts: Sequence[int]) -> ClusterSums:
        return counts.part((slice(None), parts))

    parts = subset_indices(a)
    within = sum(subset_of(row) in parts for row in a)
    differences: Block = {"average": paired_difference(over(parts), mean_war, within, share=True)}
    for name in metrics.SCALARS:
        differences[name] = paired_difference(
            counts.over(1), lambda v, name=name: metrics.scalars(v)[name], len(a), share=True
        )
    if set(CONFLICTING) <= set(present):
        conflict = over([SUBSETS.index(name) for name in CONFLICTING])
        within = sum(present[name] for name in CONFLICTING)
        differences["conflict_average"] = paired_difference(conflict, mean_war, within, share=True)
    if set(present) != {"none"}:
        for index, name in enumerate(SUBSETS):
            if present[name]:
                part, n = over([index]), present[name]
                differences[name] = paired_difference(part, mean_war, n, share=True)
    right = [(is_right(one), is_right(other)) for one, other in zip(a, b, strict=True)]
    return {
        "n": len(a),
        "clusters": clusters.count,
        "differences": differences,
        "discordant": {
            "only_a": right.count((True, False)),
            "only_b": right.count((False, True)),
        },
    }


def compare_means(
    rows: Sequence[Row], a: ScoreValues, b: ScoreValues, config: BootstrapConfig
) -> Block:
    """Paired comparison of the scores of two runs on the same questions: the means of both runs
    over the questions that both have a score for, and the difference a - b with its clustered
    interval and p. ``unscored`` counts the questions left out."""
    clusters = clusters_of(rows, config)
    block: Block = {}
    for name in (name for name in a if name in b):
        # (n, runs, value and count): what one run has no score for stays 0 and is in neither mean.
        pairs = np.zeros((len(rows), 2, 2))
        for index, (one, other) in enumerate(zip(a[name], b[name], strict=True)):
            if one is not None and other is not None:
                pairs[index] = ((one, 1.0), (other, 1.0))
        counts, n = clusters.sums(pairs), int(pairs[:, 0, 1].sum())
        share = binary([*a[name], *b[name]])
        difference = paired_difference(counts, metrics.mean_of_sums, n, share=share)
        block[name] = {**difference, "unscored": len(rows) - n}
    return block
