"""Scorers: plug-ins that turn the answers of a task into metrics with intervals.

A scorer says what each answer adds to some sums, and each metric is a function of these sums. From
this follow the value, its interval over clusters, the value on every subset and group, and the
paired difference of two runs. Metrics that are no function of sums, such as rank correlations, are
computed from the rows.

A benchmark names scorers by a :class:`Spec`, made with :func:`use`: the name of a built-in scorer
(``SCORERS``) or ``my_file.py:function``, and the arguments of the function that returns the
:class:`Scorer`. Results keep the specs, so that two runs can be compared later.

Shapes: n answers; ``...`` of the sums is the scorer's own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo import content
from mmemo.config import nearest
from mmemo.errors import EvaluationError
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.predictions import Row
from mmemo.statistics import BootstrapConfig, ClusterSums, Floats, Statistic, paired_difference

Block = dict[str, Any]
Mask = NDArray[np.bool_]

SCORERS: Mapping[str, str] = {
    "numbers": "mmemo.evaluation.scorers.numbers:numbers",
    "sentiment": "mmemo.evaluation.scorers.sentiment:sentiment",
    "votes": "mmemo.evaluation.scorers.votes:votes",
    "several": "mmemo.evaluation.scorers.several:several",
    "measured": "mmemo.evaluation.scorers.measured:measured",
    "ranked": "mmemo.evaluation.scorers.ranked:ranked",
    "words": "mmemo.evaluation.scorers.words:words",
    "text": "mmemo.evaluation.scorers.text:text",
    "fields": "mmemo.evaluation.scorers.fields:fields",
    "judge": "mmemo.evaluation.scorers.judge:judge",
}
"""Name of each built-in scorer to the function that makes it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a scorer. Exactly one of ``of_sums`` and ``of_rows`` is set."""

    of_sums: Statistic | None = None
    """Maps sums (..., \\*shape) to (...); NaN where it is not defined."""
    of_rows: Callable[[Sequence[Row]], float] | None = None
    """Computes it from some answers; NaN where it is not defined."""
    share: bool = False
    """It is a share of answers, or made of such shares."""
    limits: tuple[float, float] | None = None
    """The range of any other number."""
    lower_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Scorer:
    """The metrics of a task.

    Attributes:
        values: maps the answers to what each adds to the sums, (n, \\*shape), and to which answers
            are scored, (n,). Answers that are not scored add nothing. They are counted.
        metrics: the metrics by name; the first one is the headline.
    """

    values: Callable[[Sequence[Row]], tuple[Floats, Mask]]
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Spec:
    """The name of a scorer, and the arguments of the function that makes it."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def load(self) -> Scorer:
        """The scorer.

        Raises:
            EvaluationError: there is no such scorer, or it does not take these arguments.
        """
        make: Callable[..., Scorer]
        if ":" in self.name:
            make = content.load(self.name)
        elif self.name in SCORERS:
            module, _, function = SCORERS[self.name].partition(":")
            make = getattr(importlib.import_module(module), function)
        else:
            guess = nearest(self.name, list(SCORERS))
            hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(SCORERS)}"
            raise EvaluationError(f"there is no scorer '{self.name}'; {hint}")
        try:
            return make(**self.params)
        except TypeError as error:
            raise EvaluationError(f"scorer '{self.name}': {error}") from error

    def record(self) -> Block:
        """The spec as a JSON value."""
        return {"name": self.name, "params": dict(self.params)}


def use(name: str, /, **params: Any) -> Spec:
    """The scorer of a name, with its arguments."""
    return Spec(name, params)


def specs_of(block: Mapping[str, Any]) -> list[Spec]:
    """The scorers of a task's block in ``results.json``."""
    return [Spec(one["name"], one["params"]) for one in block.get("scorers", ())]


def score_with(specs: Sequence[Spec], rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """The metrics of all scorers, each with its interval, ``n`` scored and ``unscored`` answers.

    Raises:
        EvaluationError: two scorers have a metric of the same name.
    """
    found: Block = {}
    clusters = clusters_of(rows, config)
    for spec in specs:
        scorer = spec.load()
        values, scored = scorer.values(rows)
        sums, n = clusters.sums(values), int(scored.sum())
        for name, metric in scorer.metrics.items():
            if name in found:
                raise EvaluationError(f"two scorers have a metric '{name}'; leave one out")
            if metric.of_sums is not None:
                interval = sums.interval(
                    metric.of_sums, n, share=metric.share, limits=metric.limits
                )
            else:
                interval = clusters.of_rows(
                    lambda index, metric=metric: _of(rows, index, metric),
                    metric.limits or ((0.0, 1.0) if metric.share else (-math.inf, math.inf)),
                )
            found[name] = {**interval.row(), "n": n, "unscored": len(rows) - n, **_kind(metric)}
    return found


def compare_with(
    specs: Sequence[Spec], a: Sequence[Row], b: Sequence[Row], config: BootstrapConfig
) -> Block:
    """Paired differences a - b of every metric of sums, with intervals and p-values. An answer that
    only one run has a value for counts in neither."""
    found: Block = {}
    clusters = clusters_of(a, config)
    for spec in specs:
        scorer = spec.load()
        (ours, one), (theirs, other) = scorer.values(a), scorer.values(b)
        both = one & other
        kept = both.reshape(-1, *(1 for _ in ours.shape[1:]))
        counts: ClusterSums = clusters.sums(np.stack([ours * kept, theirs * kept], axis=1))
        for name, metric in scorer.metrics.items():
            if metric.of_sums is not None:
                n = int(both.sum())
                block = paired_difference(counts, metric.of_sums, n, share=metric.share)
                found[name] = {**block, "unscored": len(a) - n}
    return found


def _of(rows: Sequence[Row], index: NDArray[np.intp], metric: Metric) -> float:
    assert metric.of_rows is not None
    return metric.of_rows([rows[place] for place in index.tolist()])


def _kind(metric: Metric) -> Block:
    """What tables need to know of a metric."""
    return {"share": metric.share, "lower_is_better": metric.lower_is_better}
