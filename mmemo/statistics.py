"""Confidence intervals and paired tests that account for the similarity of a speaker's clips.

Whole speakers are resampled with replacement, never single clips (cluster bootstrap, Davison and
Hinkley 1997, section 3.8), and intervals are percentile intervals.

Shapes: n answers, S clusters (speakers), R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from mmemo.config import Config
from mmemo.errors import EvaluationError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


class BootstrapConfig(Config):
    """How confidence intervals are computed."""

    resamples: int = Field(default=2000, ge=100, le=1_000_000)
    """Number of bootstrap replicates. All numbers of a run use the same draws."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the percentile intervals."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    cluster: str = "speaker"
    """Key of a row's ``group`` that names its cluster. Rows without it are clustered by media
    file."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its bootstrap interval, which is None where it cannot be computed, and the
    number of answers that it is based on."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def row(self) -> dict[str, float | int | None]:
        """The JSON form. Values are rounded, so that results do not differ in their last bits."""
        return {
            "value": _round(self.value),
            "low": _round(self.low),
            "high": _round(self.high),
            "n": self.n,
        }


class Bootstrap:
    """Draws of clusters that all statistics of a run share, so that differences of two statistics
    are paired.

    Args:
        clusters: (n,) names of the cluster of each answer.
    """

    def __init__(self, clusters: Sequence[str], config: BootstrapConfig) -> None:
        # Without the dtype, an empty list would become an array of floats.
        names, codes = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
        self.clusters = len(names)
        self.config = config
        self._codes: NDArray[np.intp] = codes
        # Without any answer there is one empty cluster, so that the shapes hold.
        count = max(self.clusters, 1)
        # A multinomial count is how often each cluster is drawn with replacement. The replicates of
        # a sum are then one matrix product.
        self._weights: Floats = (
            np.random.default_rng(config.seed)
            .multinomial(count, np.full(count, 1 / count), size=config.resamples)
            .astype(np.float64)
        )

    def rows(self) -> Iterator[NDArray[np.intp]]:
        """Indices of the answers of each replicate, for statistics that are not functions of sums.
        There are none if there is only one cluster."""
        members = [np.flatnonzero(self._codes == code) for code in range(self.clusters)]
        for weights in self._weights if self.clusters > 1 else ():
            drawn = np.repeat(np.arange(self.clusters), weights.astype(np.intp))
            yield np.concatenate([members[code] for code in drawn])

    def resample(self, values: Floats) -> Resampled:
        """The total of values (n, ...) over the answers, and its replicates (R, ...)."""
        sums = np.zeros((max(self.clusters, 1), *values.shape[1:]))
        # sums[codes] += values would keep only one value of each cluster.
        np.add.at(sums, self._codes, values)
        draws = np.tensordot(self._weights, sums, axes=1)
        # With a single cluster there is no variation between clusters to estimate.
        return Resampled(sums.sum(0), draws if self.clusters > 1 else draws[:0], self.config)


@dataclass(frozen=True, slots=True)
class Resampled:
    """``total`` (...) and ``draws`` (R, ...), from which statistics and intervals are computed."""

    total: Floats
    draws: Floats
    config: BootstrapConfig

    def part(self, index: Any) -> Resampled:
        """The part ``total[index]``, with the same draws."""
        parts = index if isinstance(index, tuple) else (index,)
        return Resampled(self.total[parts], self.draws[(slice(None), *parts)], self.config)

    def interval(self, statistic: Statistic, n: int) -> Interval:
        """A statistic with its interval. ``statistic`` maps (..., *total.shape) to (...), as the
        functions of :mod:`mmemo.evaluation.metrics` do. ``n`` is passed on."""
        point = float(statistic(self.total))
        draws = self._finite(statistic)
        if math.isnan(point) or not len(draws):
            return Interval(None if math.isnan(point) else point, None, None, n)
        tail = (1 - self.config.confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(point, float(low), float(high), n)

    def p_two_sided(self, statistic: Statistic) -> float | None:
        """Two-sided bootstrap p-value of the null hypothesis that ``statistic`` is 0: twice the
        smaller share of draws on either side of 0. It counts the observed sample, so it is never
        below 2 / (R + 1). None if there are no draws."""
        draws = self._finite(statistic)
        if not len(draws):
            return None
        # A draw of exactly 0 counts on both sides, so that ties never make p smaller.
        smaller = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return min(1.0, 2 * (smaller + 1) / (len(draws) + 1))

    def _finite(self, statistic: Statistic) -> Floats:
        if not len(self.draws):
            return np.empty(0)
        draws = statistic(self.draws)
        return draws[~np.isnan(draws)]


@dataclass(frozen=True, slots=True)
class McNemar:
    """The numbers of discordant pairs, and the exact two-sided p-value of an even split (McNemar
    1947, exact form)."""

    only_a: int
    only_b: int
    p: float


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two systems on the same questions.

    It treats answers as independent, so prefer the clustered bootstrap where speakers repeat.

    Raises:
        EvaluationError: the two sequences differ in length.
    """
    if len(right_a) != len(right_b):
        raise EvaluationError(
            f"a paired test needs answers to the same questions, but one run has {len(right_a)} "
            f"and the other {len(right_b)}; compare evaluations of one benchmark"
        )
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    if only_a + only_b == 0:
        return McNemar(0, 0, 1.0)
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
    return McNemar(only_a, only_b, p)


def _round(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 6)
