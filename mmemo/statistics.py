"""Confidence intervals and paired tests that hold with few speakers.

The answers about one speaker are alike, so the unit of every interval and test is the cluster (a
speaker, or a clip where no speaker is named), never the single answer:

- The variance of any statistic is that of the delete-one-cluster jackknife (Efron and Stein 1981;
  for few clusters MacKinnon, Nielsen and Webb 2023), and its interval is Student's t with one
  degree of freedom fewer than clusters.
- A share of answers, and what is made of shares (recall, F1, their means), has the interval of Korn
  and Graubard (1998): Clopper and Pearson's exact one with the number of independent answers that
  has the same variance. It lies in [0, 1] and is not empty at 0 % and 100 %.
- A difference of two runs is tested by exchanging the two runs' answers in whole clusters (Fisher's
  randomisation test; for means, the sign-flip test), exactly where there are few clusters.

``benchmarks/interval_coverage.py`` measures how often these intervals cover and these tests err,
beside the percentile, BCa and studentised bootstraps.

Shapes: n answers, S clusters, R exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import special, stats

from mmemo.config import Config

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

INTERVALS = "jackknife over clusters"
"""How intervals are made, as results record it."""
MOST_CLUSTERS = 500
"""More clusters than this are merged at random into this many groups (random groups, Wolter 2007,
chapter 2). Sums stay exact; t has 499 degrees of freedom (1.965 in place of 1.960)."""
FEW_CLUSTERS = 10
"""Fewer clusters than this are warned of."""
_MOST_ENUMERATED = 12
_BLOCK = 4_000_000  # numbers held at once, 32 MB


class BootstrapConfig(Config):
    """How confidence intervals and p-values are computed."""

    resamples: int = Field(default=2000, ge=100, le=1_000_000)
    """Number of random exchanges behind a p-value where there are too many clusters (more than 12)
    to go through all. All numbers of a run use the same ones."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    seed: int = Field(default=0, ge=0)
    """Seed of the exchanges, and of the groups of more than 500 clusters."""
    cluster: str = "speaker"
    """Key of a row's ``group`` that names its cluster. Rows without it are clustered by media
    file."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its interval, which is None where it cannot be computed, and the number of
    answers that it is based on."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def row(self) -> dict[str, float | int | None]:
        """The JSON form. Values are rounded, so that results do not differ in their last bits."""
        return {
            "value": rounded(self.value),
            "low": rounded(self.low),
            "high": rounded(self.high),
            "n": self.n,
        }


class Clusters:
    """The clusters of some answers. All statistics of a run share them and their random exchanges.

    Args:
        names: (n,) name of the cluster of each answer.
    """

    def __init__(self, names: Sequence[str], config: BootstrapConfig) -> None:
        # Sorted, so that nothing depends on the order of the answers.
        found = sorted(set(names))
        self.count = len(found)
        self.config = config
        group = np.arange(self.count)
        if self.count > MOST_CLUSTERS:
            shuffled = np.random.default_rng(config.seed).permutation(self.count)
            group = shuffled % MOST_CLUSTERS
        place = dict(zip(found, group.tolist(), strict=True))
        self._codes: NDArray[np.intp] = np.array([place[name] for name in names], dtype=np.intp)
        # Without any answer there is one empty cluster, so that the shapes hold.
        self.sizes: Floats = np.bincount(group, minlength=1).astype(np.float64)

    def sums(self, values: Floats) -> ClusterSums:
        """The sums of values (n, ...) over each cluster."""
        sums = np.zeros((len(self.sizes), *values.shape[1:]))
        # sums[codes] += values would keep only one value of each cluster.
        np.add.at(sums, self._codes, values)
        return ClusterSums(sums, self.sizes, self.config)

    def tally(self, cells: NDArray[np.intp], shape: tuple[int, ...]) -> ClusterSums:
        """The sums of values (n, \\*shape) that are 1 at ``cells`` (n, D) and 0 elsewhere, without
        holding these values."""
        sums = np.zeros((len(self.sizes), *shape))
        np.add.at(sums, (self._codes, *cells.T), 1.0)
        return ClusterSums(sums, self.sizes, self.config)

    def correlation(self, statistic: Callable[[NDArray[np.intp]], float]) -> Interval:
        """A correlation in [-1, 1] with its interval, on Fisher's z scale. ``statistic`` computes
        it from the indices of some answers; NaN stands for one that is not defined."""
        n = len(self._codes)
        point, left = self._without_each(statistic)
        if math.isnan(point):
            return Interval(None, None, None, n)
        with np.errstate(divide="ignore"):
            z, spread = np.arctanh(point), np.arctanh(left)
        half = _half_width(spread, self.config) if np.isfinite([z, *spread]).all() else None
        if half is None:
            return Interval(point, None, None, n)
        return Interval(point, float(np.tanh(z - half)), float(np.tanh(z + half)), n)

    def of_rows(
        self, statistic: Callable[[NDArray[np.intp]], float], limits: tuple[float, float]
    ) -> Interval:
        """Any statistic that is no function of sums, such as a difference of rank correlations,
        with its t interval, which ends at ``limits``. ``statistic`` is as in
        :meth:`correlation`."""
        n = len(self._codes)
        point, left = self._without_each(statistic)
        if math.isnan(point):
            return Interval(None, None, None, n)
        half = None if np.isnan(left).any() else _half_width(left, self.config)
        if half is None:
            return Interval(point, None, None, n)
        return Interval(point, max(limits[0], point - half), min(limits[1], point + half), n)

    def _without_each(self, statistic: Callable[[NDArray[np.intp]], float]) -> tuple[float, Floats]:
        """The statistic of all answers, and without each cluster (S,), or () for one cluster."""
        left = [
            statistic(np.flatnonzero(self._codes != code))
            for code in range(len(self.sizes))
            if self.count > 1
        ]
        return statistic(np.arange(len(self._codes))), np.array(left, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class ClusterSums:
    """``sums`` (S, ...) over each cluster, from which statistics, intervals and tests are computed.
    ``sizes`` (S,): the number of clusters merged into each."""

    sums: Floats
    sizes: Floats
    config: BootstrapConfig

    @property
    def total(self) -> Floats:
        """The sums over all answers."""
        return self.sums.sum(0)

    def part(self, index: Any) -> ClusterSums:
        """The part ``total[index]``."""
        parts = index if isinstance(index, tuple) else (index,)
        return ClusterSums(self.sums[(slice(None), *parts)], self.sizes, self.config)

    def only(self, index: Any) -> ClusterSums:
        """The same shape with all but the part ``total[index]`` set to 0. A statistic of that part
        alone is computed from it, so that clusters without any such answer do not count."""
        kept = np.zeros(self.sums.shape[1:])
        kept[index] = 1.0
        return ClusterSums(self.sums * kept, self.sizes, self.config)

    def over(self, axis: int) -> ClusterSums:
        """Summed over an axis of ``total``."""
        return ClusterSums(self.sums.sum(axis + 1), self.sizes, self.config)

    @property
    def clusters(self) -> int:
        """The number of clusters that have something in these sums."""
        return round(float(self.sizes[self._present()].sum()))

    def interval(
        self,
        statistic: Statistic,
        n: int,
        *,
        share: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> Interval:
        """A statistic with its interval.

        There is none with a single cluster, where the statistic is not defined without one of them,
        or where all clusters agree (other than for shares).

        Args:
            statistic: maps (..., \\*total.shape) to (...), as the functions of
                :mod:`mmemo.evaluation.metrics` do.
            n: number of answers, which is passed on.
            share: it is a share of answers or is made of such shares, so it lies in [0, 1].
            limits: range of any other statistic; the interval ends there.
        """
        total = self.total
        point = float(statistic(total))
        left = self._left_out(statistic, total)
        if math.isnan(point) or len(left) < 2 or np.isnan(left).any():
            return Interval(None if math.isnan(point) else point, None, None, n)
        half = _half_width(left, self.config)
        if share:
            return _share(point, half, n, self.clusters, len(left), self.config)
        if half is None:
            return Interval(point, None, None, n)
        lowest, highest = limits or (-math.inf, math.inf)
        return Interval(point, max(lowest, point - half), min(highest, point + half), n)

    def p_two_sided(self, statistic: Statistic, exchange: Statistic) -> float | None:
        """Two-sided p-value of the hypothesis that two runs are alike, so that exchanging their
        answers about any cluster changes nothing but chance.

        All exchanges are gone through where at most 12 clusters change by one. Otherwise
        ``resamples`` random ones are drawn, and the observed one is counted among them, so that p
        is never below 1 / (R + 1).

        Args:
            statistic: the difference; it maps (..., \\*total.shape) to (...).
            exchange: maps sums (..., \\*total.shape) to those with the runs exchanged.

        Returns:
            None if the statistic is not defined, or if there are so few clusters that the smallest
            possible p, :func:`smallest_p`, is above one minus the confidence level.
        """
        total = self.total
        point = float(statistic(total))
        if math.isnan(point) or not carries_p(self.clusters, self.config):
            return None
        change = exchange(self.sums) - self.sums
        change = change.reshape(len(change), -1)
        moved = np.flatnonzero(change.any(1))
        change = change[moved]
        exact = len(moved) <= _MOST_ENUMERATED
        # Without the margin, rounding would decide ties.
        bound = abs(point) - 1e-9 * max(1.0, abs(point))
        extreme, drawn = 0, 0
        for chosen in _every(len(moved)) if exact else self._random(moved, change.shape[1]):
            draws = statistic(total + (chosen @ change).reshape(len(chosen), *total.shape))
            # Where an exchange leaves the statistic undefined, it speaks for no difference.
            extreme += int((~(np.abs(draws) < bound)).sum())
            drawn += len(chosen)
        return extreme / drawn if exact else (extreme + 1) / (drawn + 1)

    def _present(self) -> NDArray[np.bool_]:
        return (self.sums != 0).reshape(len(self.sums), -1).sum(1) > 0

    def _left_out(self, statistic: Statistic, total: Floats) -> Floats:
        """The statistic without each of the clusters that have something in the sums."""
        sums = self.sums[self._present()]
        step = max(1, _BLOCK // max(1, total.size))
        parts = [statistic(total - sums[at : at + step]) for at in range(0, len(sums), step)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _random(self, moved: NDArray[np.intp], cells: int) -> Iterator[Floats]:
        """Random exchanges (block, moved), the same for every statistic of a run."""
        draws = np.random.default_rng(self.config.seed).integers(
            0, 2, size=(self.config.resamples, len(self.sums)), dtype=np.int8
        )
        step = max(1, _BLOCK // max(1, cells))
        for at in range(0, len(draws), step):
            yield draws[at : at + step, moved].astype(np.float64)


def paired_difference(
    counts: ClusterSums, statistic: Statistic, n: int, *, share: bool
) -> dict[str, Any]:
    """The difference of ``statistic`` between two runs, with its interval and p, and ``statistic``
    of each, from counts (2, ...) of both. A share's difference lies in [-1, 1]."""
    # Indexed from the end, because other axes may come in front.
    rest = [slice(None)] * (counts.sums.ndim - 2)
    first, second = (..., 0, *rest), (..., 1, *rest)

    def difference(values: Floats) -> Floats:
        return statistic(values[first]) - statistic(values[second])

    def exchange(values: Floats) -> Floats:
        return np.flip(values, axis=-1 - len(rest))

    p = counts.p_two_sided(difference, exchange)
    a, b = (float(statistic(counts.total[side])) for side in (0, 1))
    found = counts.interval(difference, n, limits=(-1, 1) if share else None).row()
    numbers = {"a": a, "b": b, "p": p}
    return {
        **found,
        **{name: rounded(value) for name, value in numbers.items()},
        "clusters": counts.clusters,
    }


def smallest_p(clusters: int) -> float:
    """The smallest two-sided p that exchanges of whole clusters can reach: two of 2^clusters."""
    return min(1.0, 2.0 ** (1 - clusters))


def carries_p(clusters: int, config: BootstrapConfig) -> bool:
    """Whether so many clusters can reach significance at all. At a confidence level of 95 % it
    takes six."""
    return smallest_p(clusters) <= 1 - config.confidence


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values, such as those of training seeds; None
    for fewer than two, or if all are equal."""
    found = np.asarray(values, dtype=np.float64)
    scale = np.abs(found).max(initial=0.0)
    if len(found) < 2 or np.ptp(found) <= 1e-12 * scale:
        return None
    quantile = float(special.stdtrit(len(found) - 1, (1 + confidence) / 2))
    half = quantile * float(found.std(ddof=1)) / math.sqrt(len(found))
    return float(found.mean()) - half, float(found.mean()) + half


def t_test(values: Sequence[float]) -> float | None:
    """p of the two-sided t-test that independent values have the mean 0; None where
    :func:`t_interval` is."""
    if t_interval(values) is None:
        return None
    test: Any = stats.ttest_1samp(np.asarray(values, dtype=np.float64), 0.0)
    return float(test.pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (Holm 1979), in the given order. None stays None and is not
    counted."""
    order = sorted((p, place) for place, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        # The running maximum keeps a larger p from getting a smaller adjusted one.
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted


def _every(clusters: int) -> Iterator[Floats]:
    """All 2^clusters exchanges."""
    numbers = np.arange(2**clusters)[:, None]
    yield ((numbers >> np.arange(clusters)) & 1).astype(np.float64)


def _half_width(left: Floats, config: BootstrapConfig) -> float | None:
    """Half the width of the t interval, from the statistic without each cluster (S,); None if there
    are fewer than two, or if all are equal."""
    clusters = len(left)
    if clusters < 2:
        return None
    deviations = left - left.mean()
    if np.abs(deviations).max() <= 1e-12 * max(1.0, float(np.abs(left).max())):
        return None
    deviation = math.sqrt((clusters - 1) / clusters * float((deviations**2).sum()))
    return _quantile(clusters - 1, config) * deviation


def _share(
    point: float, half: float | None, n: int, clusters: int, groups: int, config: BootstrapConfig
) -> Interval:
    """Korn and Graubard's interval. Nothing tells how alike the answers about one cluster are where
    all answers are right or all wrong, so there each cluster counts as one answer."""
    point = min(1.0, max(0.0, point))
    at_the_edge = min(point, 1 - point) < 1e-12
    answers = max(n, groups, 2)
    # Both quantiles together carry over the degrees of freedom.
    quantile = _quantile(answers - 1, config)
    if at_the_edge:
        effective, point = float(clusters), float(round(point))
    elif half is None:
        effective = answers * (quantile / _quantile(groups - 1, config)) ** 2
    else:
        # point (1 - point) / variance is the number of independent answers of that variance. By
        # chance it may exceed n; a bound at n would cover 98 % where answers are independent.
        effective = min(2.0 * answers, point * (1 - point) * (quantile / half) ** 2)
    right, tail = point * effective, (1 - config.confidence) / 2
    wrong = effective - right
    low = float(special.betaincinv(right, wrong + 1, tail)) if right > 0 else 0.0
    high = float(special.betaincinv(right + 1, wrong, 1 - tail)) if wrong > 0 else 1.0
    return Interval(point, low, high, n)


def _quantile(degrees: int, config: BootstrapConfig) -> float:
    return float(special.stdtrit(degrees, (1 + config.confidence) / 2))


def rounded(value: float | None) -> float | None:
    """A number as results hold it, so that they do not differ in their last bits; NaN as None."""
    return None if value is None or math.isnan(value) else round(float(value), 6)
