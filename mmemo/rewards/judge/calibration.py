"""Calibration of a judge of reasoning: how well its grades agree with known ones.

n rows, K dimensions. Intervals come from a jackknife over speakers, as everywhere in mmemo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy import stats

from mmemo.errors import EvaluationError
from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST
from mmemo.statistics import BootstrapConfig, Clusters, Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Graded:
    """A graded row. ``given``: the judge's grade of each dimension; ``known``: the true ones.
    ``faults``: the candidate's known faults and their severities."""

    given: Sequence[float]
    known: Sequence[float]
    speaker: str
    faults: Mapping[str, int]


def calibrate(rows: Sequence[Graded], config: BootstrapConfig) -> dict[str, Any]:
    """Measure the agreement of given and known grades.

    Returns:
        JSON values. ``dimensions``: for each dimension, Spearman's rank correlation with its
        interval, the mean absolute error in grades, the share of rows whose rounded grade equals
        the known one, and the mean given grade by known grade. ``mean_grade``: the rank
        correlation of the mean over dimensions. ``faults``: for rows with a single fault, the mean
        known and given grades.

    Raises:
        EvaluationError: there are no rows.
    """
    if not rows:
        raise EvaluationError("no row could be graded, so there is no calibration; check the judge")
    given = np.array([row.given for row in rows], dtype=np.float64)
    known = np.array([row.known for row in rows], dtype=np.float64)
    clusters = Clusters([row.speaker for row in rows], config)
    dimensions = {
        name: _dimension(given[:, k], known[:, k], clusters) for k, name in enumerate(DIMENSIONS)
    }
    total = _spearman(given.mean(1), known.mean(1), clusters)
    return {
        "n": len(rows),
        "speakers": clusters.count,
        "confidence": config.confidence,
        "dimensions": dimensions,
        "mean_grade": {"spearman": total.row()},
        "faults": _faults(rows, given, known),
    }


def _dimension(given: Floats, known: Floats, clusters: Clusters) -> dict[str, Any]:
    by_grade = {
        str(grade): {
            "n": int((known == grade).sum()),
            "mean": round(float(given[known == grade].mean()), 4),
            "low": round(float(np.quantile(given[known == grade], 0.1)), 4),
            "high": round(float(np.quantile(given[known == grade], 0.9)), 4),
        }
        for grade in range(LOWEST, HIGHEST + 1)
        if (known == grade).any()
    }
    return {
        "spearman": _spearman(given, known, clusters).row(),
        "mean_absolute_error": round(float(np.abs(given - known).mean()), 4),
        # Half up, as the judge rounds; np.round would round half to even.
        "exact": round(float((np.floor(given + 0.5) == known).mean()), 4),
        "by_known_grade": by_grade,
    }


def _spearman(given: Floats, known: Floats, clusters: Clusters) -> Interval:
    """The rank correlation with its interval; None where one side is constant."""
    # Ranks are no function of sums, so each value of the jackknife needs its rows.
    return clusters.correlation(lambda rows: spearman(given[rows], known[rows]))


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two (n,) arrays, with midranks for ties; NaN where one of them
    is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1])


def _faults(rows: Sequence[Graded], given: Floats, known: Floats) -> dict[str, Any]:
    names = [next(iter(row.faults), "none") if len(row.faults) < 2 else "" for row in rows]
    found: dict[str, Any] = {}
    for name in sorted({name for name in names if name}):
        chosen = np.array([one == name for one in names])
        found[name] = {
            "n": int(chosen.sum()),
            "known": _by_dimension(known[chosen].mean(0)),
            "given": _by_dimension(given[chosen].mean(0)),
        }
    return found


def _by_dimension(values: Floats) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in zip(DIMENSIONS, values, strict=True)}


def calibration_table(found: Mapping[str, Any]) -> Table:
    """The agreement by dimension as a table for the terminal."""
    percent = round(100 * found["confidence"])
    table = Table(
        title=f"Calibration on {found['n']} rows of {found['speakers']} held-out speakers",
        caption=f"{percent} % intervals over speakers (jackknife, Student's t)",
    )
    for title in ("dimension", "Spearman", "interval", "error in grades", "exact"):
        table.add_column(title, justify="left" if title == "dimension" else "right")
    for name, row in found["dimensions"].items():
        rank = row["spearman"]
        table.add_row(
            name.replace("_", " "),
            _number(rank["value"]),
            f"{_number(rank['low'])} to {_number(rank['high'])}",
            f"{row['mean_absolute_error']:.2f}",
            f"{row['exact']:.0%}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_calibration(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG that plots, for each dimension, the given grade over the known one: the mean and
    the middle 80 % of the rows."""
    # pyplot would keep the figure in global state and choose a backend for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(DIMENSIONS), sharey=True)
    for panel, (name, row) in zip(panels, found["dimensions"].items(), strict=True):
        grades = [int(grade) for grade in row["by_known_grade"]]
        means = [one["mean"] for one in row["by_known_grade"].values()]
        # errorbar refuses negative lengths, and a mean may lie outside the middle 80 %.
        spread = [
            [max(0.0, one["mean"] - one["low"]) for one in row["by_known_grade"].values()],
            [max(0.0, one["high"] - one["mean"]) for one in row["by_known_grade"].values()],
        ]
        panel.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], color="0.75", linewidth=1, zorder=0)
        panel.errorbar(grades, means, yerr=spread, fmt="o", color="#1f5f8b", capsize=3)
        rank = row["spearman"]
        panel.set_title(name.replace("_and_", ", ").replace("_", " "), size=9)
        panel.set_xlabel(f"known grade (Spearman {_number(rank['value'])})", size=9)
        panel.set_xticks(range(LOWEST, HIGHEST + 1))
    panels[0].set_ylabel("given grade", size=9)
    figure.savefig(path, dpi=120)
