"""Ranked: accuracy at 1, 2, 3, ... best, and the mean reciprocal rank of the truth.

An answer counts at ``k`` if the truth is among its first k labels. The reciprocal rank is 1 / r for
a truth at rank r, and 0 where the answer does not name it (Voorhees, TREC-8, 1999), so that its
mean depends on how many labels are asked for. An answer that cannot be read names nothing: it is
wrong at every k and counts, and ``unreadable`` is the share of such answers. A truth of several
labels is found at the first of them. One label that is no list is a ranking of one.

Shapes: n answers; sums (..., A + 3) of 1, the hits at each of A depths, the reciprocal rank and
whether the answer could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats, Statistic


def ranked(*, at: Sequence[int] = (1, 2, 3)) -> Scorer:
    """The scorer of rankings; the first of ``at`` is the headline.

    Args:
        at: the depths k of ``accuracy_at_k``.

    Raises:
        TypeError: ``at`` is no list of different whole numbers of 1 or more.
    """
    depths = list(at)
    if not depths or len(set(depths)) < len(depths) or any(not _whole(one) for one in depths):
        raise TypeError("at must list different whole numbers of 1 or more, such as [1, 2, 3]")

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), len(depths) + 3))
        for index, row in enumerate(rows):
            rank = _rank(row)
            hits = [rank is not None and rank <= depth for depth in depths]
            found[index] = [1, *hits, 0 if rank is None else 1 / rank, row["answer"] is None]
        return found, np.ones(len(rows), dtype=np.bool_)

    metrics = {
        f"accuracy_at_{depth}": Metric(_mean(place), share=True)
        for place, depth in enumerate(depths, start=1)
    }
    metrics["mrr"] = Metric(_mean(len(depths) + 1), limits=(0, 1))
    metrics["unreadable"] = Metric(_mean(len(depths) + 2), share=True, lower_is_better=True)
    return Scorer(values, metrics)


def _rank(row: Row) -> int | None:
    """The rank of the truth, 1 for the first; None where the answer does not name it."""
    truth = row["truth"] if isinstance(row["truth"], list) else [row["truth"]]
    answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    named = list(dict.fromkeys(one for one in answer if one is not None))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    ranks = [named.index(one) + 1 for one in truth if one in named]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return min(ranks, default=None)


def _mean(place: int) -> Statistic:
    return lambda sums: ratio(sums[..., place], sums[..., 0], np.nan)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
