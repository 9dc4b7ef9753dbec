"""Intervals and paired tests that respect that clips of one speaker are alike.

n answers, S clusters (speakers), R bootstrap replicates. Speakers are resampled with replacement,
never single clips (cluster bootstrap, Davison and Hinkley 1997, §3.8); intervals are percentile.
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
    """How intervals are made."""

    resamples: int = Field(default=2000, ge=100, le=1_000_000)
    """Replicates. The same draws serve every number of a run."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of the percentile interval."""
    seed: int = Field(default=0, ge=0)
    cluster: str = "speaker"
    """Key of ``group`` that names the cluster; rows without it are clustered by media file."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, its bootstrap interval (None where it cannot be made), and its n answers."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def row(self) -> dict[str, float | int | None]:
        """The JSON form; rounded, so that results do not differ by the last bit."""
        return {
            "value": _round(self.value),
            "low": _round(self.low),
            "high": _round(self.high),
            "n": self.n,
        }


class Bootstrap:
    """Draws of clusters, made once and shared by every statistic of a run (so that differences
    of two statistics are paired)."""

    def __init__(self, clusters: Sequence[str], config: BootstrapConfig) -> None:
        names, codes = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
        self.clusters = len(names)
        self.config = config
        self._codes: NDArray[np.intp] = codes
        count = max(self.clusters, 1)
        self._weights: Floats = (
            np.random.default_rng(config.seed)
            .multinomial(count, np.full(count, 1 / count), size=config.resamples)
            .astype(np.float64)
        )

    def rows(self) -> Iterator[NDArray[np.intp]]:
        """The answers of each replicate by index, for statistics that are no function of sums;
        none where there is but one cluster."""
        members = [np.flatnonzero(self._codes == code) for code in range(self.clusters)]
        for weights in self._weights if self.clusters > 1 else ():
            drawn = np.repeat(np.arange(self.clusters), weights.astype(np.intp))
            yield np.concatenate([members[code] for code in drawn])

    def resample(self, values: Floats) -> Resampled:
        """Total of the per-answer ``values`` (n, ...), and its replicates (R, ...)."""
        sums = np.zeros((max(self.clusters, 1), *values.shape[1:]))
        np.add.at(sums, self._codes, values)
        draws = np.tensordot(self._weights, sums, axes=1)
        # One cluster says nothing about how clusters differ.
        return Resampled(sums.sum(0), draws if self.clusters > 1 else draws[:0], self.config)


@dataclass(frozen=True, slots=True)
class Resampled:
    """``total`` (...) and ``draws`` (R, ...): what statistics and their intervals come from."""

    total: Floats
    draws: Floats
    config: BootstrapConfig

    def part(self, index: Any) -> Resampled:
        """The same draws of a part of the counts: ``total[index]``."""
        parts = index if isinstance(index, tuple) else (index,)
        return Resampled(self.total[parts], self.draws[(slice(None), *parts)], self.config)

    def interval(self, statistic: Statistic, n: int) -> Interval:
        """``statistic`` maps (..., *total.shape) to (...), as those of ``metrics`` do."""
        point = float(statistic(self.total))
        draws = self._finite(statistic)
        if math.isnan(point) or not len(draws):
            return Interval(None if math.isnan(point) else point, None, None, n)
        tail = (1 - self.config.confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(point, float(low), float(high), n)

    def p_two_sided(self, statistic: Statistic) -> float | None:
        """Achieved significance that ``statistic`` is not 0: twice the smaller share of draws on
        one side of 0, counting the observed sample, so never below 2 / (R + 1)."""
        draws = self._finite(statistic)
        if not len(draws):
            return None
        smaller = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return min(1.0, 2 * (smaller + 1) / (len(draws) + 1))

    def _finite(self, statistic: Statistic) -> Floats:
        if not len(self.draws):
            return np.empty(0)
        draws = statistic(self.draws)
        return draws[~np.isnan(draws)]


@dataclass(frozen=True, slots=True)
class McNemar:
    """Discordant pairs and the exact two-sided p of an even split (McNemar 1947, exact form)."""

    only_a: int
    only_b: int
    p: float


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two systems on the same answers.

    It takes answers for independent; where speakers repeat, trust the clustered bootstrap more.
    """
    if len(right_a) != len(right_b):
        raise EvaluationError("a paired test needs the same answers from both runs")
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    if only_a + only_b == 0:
        return McNemar(0, 0, 1.0)
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
    return McNemar(only_a, only_b, p)


def _round(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 6)
