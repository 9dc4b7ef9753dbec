"""Answers with one label for each of several fields: accuracy of each, and of all at once.

An answer that cannot be read is wrong in every field.

Shapes: n answers, F fields; sums (..., 2 + F) of 1, of answers that are right in all, and in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats


def fields(*, names: Sequence[str]) -> Scorer:
    """The scorer: ``joint``, right in all fields, and the accuracy of each field by its name."""

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), 2 + len(names)))
        for place, row in enumerate(rows):
            truth: Mapping[str, Any] = row["truth"]
            answer: Mapping[str, Any] = row["answer"] if isinstance(row["answer"], dict) else {}
            right = [float(answer.get(name) == truth[name]) for name in names]
            found[place] = [1.0, float(all(right)), *right]
        return found, np.ones(len(rows), dtype=np.bool_)

    columns = enumerate(("joint", *names), start=1)
    return Scorer(values, {name: Metric(_share(place), share=True) for place, name in columns})


def _share(place: int) -> Callable[[Floats], Floats]:
    return lambda sums: ratio(sums[..., place], sums[..., 0], np.nan)
