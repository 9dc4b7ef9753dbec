"""How often the intervals of mmemo cover, and how often its tests err.

    python benchmarks/interval_coverage.py

Speakers are drawn at random, each with its own skill (intra-cluster correlation ICC) and number of
answers (lognormal, 4 and more, 24 on average). The true value is that of infinitely many speakers.
Each cell of the table is the share of simulated evaluations whose nominal 95% interval covers it;
beside the interval of mmemo stand those of the percentile, BCa and studentised bootstraps over the
same clusters. The last column of the paired table is how often two runs that do not differ come out
with p < 0.05.

Shapes: N simulated evaluations, S speakers, K labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from mmemo.evaluation import metrics
from mmemo.statistics import BootstrapConfig, ClusterSums, Interval

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]

CLASSES = np.array([0.4, 0.3, 0.2, 0.1])  # K, as uneven as emotions are
K = len(CLASSES)
CLUSTERS = (5, 10, 20, 40)
DESIGNS = ((0.5, 0.1), (0.7, 0.001), (0.7, 0.05), (0.8, 0.1), (0.9, 0.05), (0.9, 0.1))
"""Accuracy and ICC. An ICC of 0.001 is as good as independent answers."""
HARD = ((0.9, 0.2), (0.97, 0.05))
"""Designs in which some cells fall out of 93-97%: a few speakers whom the model fails altogether,
and evaluations in which nearly every answer is right."""
PAIRED = ((0.7, 0.05), (0.9, 0.1))
METRICS = ("war", "macro_f1")
CONFIG = BootstrapConfig(resamples=400)
_SPREAD = [0.6]  # standard deviation of the logarithm of the number of answers


@dataclass(frozen=True)
class Cell:
    """What was counted for one metric, number of speakers, accuracy and ICC."""

    metric: str
    clusters: int
    accuracy: float
    icc: float
    found: dict[str, float]
    """Share of simulated evaluations by name of the column."""


def evaluations(
    generator: np.random.Generator, number: int, clusters: int, accuracy: float, icc: float
) -> Floats:
    """Confusion matrices of single runs by speaker, (N, S, K, K + 2)."""
    strength = (1 - icc) / icc
    skill = generator.beta(accuracy * strength, (1 - accuracy) * strength, (number, clusters))
    asked = generator.multinomial(_sizes(generator, number, clusters), CLASSES)
    right = generator.binomial(asked, skill[..., None])
    counts = np.zeros((number, clusters, K, K + 2))
    for label in range(K):
        others = [other for other in range(K) if other != label]
        share = CLASSES[others] / CLASSES[others].sum()
        wrong = generator.multinomial(asked[..., label] - right[..., label], share)
        counts[..., label, label] = right[..., label]
        counts[..., label, others] = wrong
    return counts


def expected(accuracy: float) -> Floats:
    """The confusion matrix of infinitely many speakers, (K, K + 2)."""
    counts = np.zeros((K, K + 2))
    for label in range(K):
        others = [other for other in range(K) if other != label]
        counts[label, others] = (1 - accuracy) * CLASSES[others] / CLASSES[others].sum()
        counts[label, label] = accuracy
        counts[label] *= CLASSES[label]
    return counts


def pairs(
    generator: np.random.Generator, number: int, clusters: int, accuracy: float, icc: float
) -> Floats:
    """Confusion matrices of two runs of the same accuracy on the same questions, (N, S, 2, K,
    K + 2). Half of a speaker's effect and half of a question's are common to both runs."""
    sizes = _sizes(generator, number, clusters)
    most = int(sizes.max())
    asked = np.arange(most) < sizes[..., None]
    truth = generator.choice(K, size=asked.shape, p=CLASSES)
    shared = np.sqrt(icc / 2) * generator.normal(size=(number, clusters, 1))
    shared = shared + np.sqrt((1 - icc) / 2) * generator.normal(size=asked.shape)
    counts = np.zeros((number, clusters, 2, K, K + 2))
    place = np.arange(number * clusters).reshape(number, clusters, 1) * K * K
    for run in (0, 1):
        own = np.sqrt(icc / 2) * generator.normal(size=(number, clusters, 1))
        own = own + np.sqrt((1 - icc) / 2) * generator.normal(size=asked.shape)
        right = shared + own < special.ndtri(accuracy)
        other = (truth + generator.integers(1, K, size=truth.shape)) % K
        cell = place + truth * K + np.where(right, truth, other)
        found = np.bincount(cell[asked], minlength=number * clusters * K * K)
        counts[:, :, run, :, :K] = found.reshape(number, clusters, K, K)
    return counts


def _generator(
    seed: int, metric: str, clusters: int, design: tuple[float, float]
) -> np.random.Generator:
    """One stream a cell, so that a cell's figures do not depend on the others."""
    numbers = [METRICS.index(metric), clusters, *(round(1000 * one) for one in design)]
    return np.random.default_rng([seed, *numbers])


def _sizes(generator: np.random.Generator, number: int, clusters: int) -> NDArray[np.int64]:
    drawn = generator.lognormal(np.log(24) - _SPREAD[0] ** 2 / 2, _SPREAD[0], (number, clusters))
    return np.maximum(4, drawn.astype(np.int64))


def sums_of(counts: Floats) -> ClusterSums:
    """One simulated evaluation (S, ...)."""
    return ClusterSums(counts, np.ones(len(counts)), CONFIG)


def covered(found: Interval, truth: float) -> bool:
    """Whether an interval covers the truth; one that cannot be computed does not."""
    return found.low is not None and found.high is not None and found.low <= truth <= found.high


def share_cell(
    seed: int,
    metric: str,
    clusters: int,
    design: tuple[float, float],
    number: int,
    bootstraps: int = 0,
) -> Cell:
    """Coverage of a share's interval, and of the bootstraps' on the first ``bootstraps`` of the
    simulated evaluations."""
    generator = _generator(seed, metric, clusters, design)
    of: Metric = getattr(metrics, metric)
    truth = float(of(expected(design[0])))
    drawn = evaluations(generator, number, clusters, *design)
    hits = [covered(sums_of(one).interval(of, int(one.sum()), share=True), truth) for one in drawn]
    found = {"mmemo": float(np.mean(hits))}
    rows = [bootstrap_hits(generator, one, of, truth) for one in drawn[:bootstraps]]
    if rows:
        found |= {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return Cell(metric, clusters, *design, found)


def pair_cell(
    seed: int,
    metric: str,
    clusters: int,
    design: tuple[float, float],
    number: int,
    tests: int | None = None,
) -> Cell:
    """Coverage of a difference's interval, and false positives of its p in the first ``tests``."""
    generator = _generator(seed, metric, clusters, design)
    of: Metric = getattr(metrics, metric)

    def difference(values: Floats) -> Floats:
        return of(values[..., 0, :, :]) - of(values[..., 1, :, :])

    def exchange(values: Floats) -> Floats:
        return values[..., ::-1, :, :]

    drawn = pairs(generator, number, clusters, *design)
    hits: list[bool] = []
    found: list[float | None] = []
    for place, one in enumerate(drawn):
        sums = sums_of(one)
        hits.append(covered(sums.interval(difference, 0, limits=(-1, 1)), 0.0))
        if tests is None or place < tests:
            found.append(sums.p_two_sided(difference, exchange))
    false = float(np.mean([p is not None and p < 0.05 for p in found]))
    return Cell(metric, clusters, *design, {"mmemo": float(np.mean(hits)), "p < 0.05": false})


def bootstrap_hits(
    generator: np.random.Generator, one: Floats, of: Metric, truth: float
) -> dict[str, bool]:
    """Whether the percentile, BCa and studentised bootstraps of one evaluation cover the truth."""
    clusters = len(one)
    weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=400)
    draws = np.tensordot(weights.astype(float), one, axes=1)  # (R, K, K + 2)
    values, total = of(draws), one.sum(0)
    point, left = float(of(total)), of(total - one)
    percentile = np.quantile(values, [0.025, 0.975])
    # BCa: Efron 1987, with the acceleration of the jackknife.
    below = (values < point).mean() + (values == point).mean() / 2
    bias = special.ndtri(np.clip(below, 1e-3, 1 - 1e-3))
    skew = left.mean() - left
    scale = (skew**2).sum() ** 1.5
    acceleration = (skew**3).sum() / (6 * scale) if scale > 0 else 0.0
    ends = bias + special.ndtri([0.025, 0.975])
    bca = np.quantile(values, stats.norm.cdf(bias + ends / (1 - acceleration * ends)))
    # Studentised by the jackknife of each replicate, over the clusters that it drew.
    inner = np.where(weights > 0, of(draws[:, None] - one), 0.0)
    centre = (weights * inner).sum(1, keepdims=True) / clusters
    spread = (weights * np.where(weights > 0, (inner - centre) ** 2, 0.0)).sum(1)
    errors = np.sqrt(spread * (clusters - 1) / clusters)
    own = np.sqrt(((left - left.mean()) ** 2).sum() * (clusters - 1) / clusters)
    kept = errors > 1e-9
    ratios = (values[kept] - point) / errors[kept] if kept.any() else np.zeros(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "percentile": bool(percentile[0] <= truth <= percentile[1]),
        "BCa": bool(bca[0] <= truth <= bca[1]),
        "studentised": bool(point - high * own <= truth <= point - low * own),
    }


def table(cells: Sequence[Cell]) -> str:
    """Cells of one kind as a Markdown table, in percent."""
    names = list(cells[0].found)
    lines = [["metric", "speakers", "accuracy", "ICC", *names]]
    lines.append(["---"] * len(lines[0]))
    for cell in cells:
        shares = [f"{100 * cell.found[name]:.1f}" for name in names]
        shown = [cell.metric, str(cell.clusters), f"{cell.accuracy:g}", f"{cell.icc:g}"]
        lines.append([*shown, *shares])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--number", type=int, default=2000, help="simulated evaluations per cell")
    parser.add_argument("--bootstraps", type=int, default=150, help="those with bootstraps beside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=_SPREAD[0], help="of the speakers' answers")
    options = parser.parse_args()
    _SPREAD[0] = options.spread
    seed, number = options.seed, options.number
    paired = [
        pair_cell(seed, metric, clusters, design, number, number // 2)
        for metric in METRICS
        for clusters in (5, 6, *CLUSTERS[1:])
        for design in PAIRED
    ]
    print("Paired differences: intervals that cover, and false positives, in percent\n")
    print(table(paired) + "\n", flush=True)
    shares = [
        share_cell(seed, metric, clusters, design, number, options.bootstraps)
        for metric in METRICS
        for clusters in CLUSTERS
        for design in (*DESIGNS, *HARD)
    ]
    print("Single runs: intervals that cover, in percent\n\n" + table(shares))


if __name__ == "__main__":
    main()
