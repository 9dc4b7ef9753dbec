"""Numbers: concordance, correlations and errors of numeric answers (arousal, valence, intensity).

CCC = 2 cov(x, y) / (var x + var y + (mean x - mean y)²) (Lin, Biometrics 1989), with population
moments; Pearson's r; Spearman's rho, Pearson's r of average ranks; MAE and RMSE.

An answer that cannot be read has no number. With ``unreadable: left_out`` it is in no metric and is
counted, as in released scorers. With ``farthest`` it counts as the end of the scale that is farther
from the truth, so that refusing never pays; that needs ``low`` and ``high``.

Shapes: n answers; sums (..., 8) of 1, x, y, x², y², xy, |x - y| and (x - y)², with x the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats

Moments = Floats


def numbers(
    *,
    of: str | None = None,
    unreadable: Literal["left_out", "farthest"] = "left_out",
    low: float | None = None,
    high: float | None = None,
) -> Scorer:
    """The scorer of numbers.

    Args:
        of: the name of one of several numbers that an answer has; it begins the metrics' names.
        unreadable: how an answer without a number counts.
        low, high: the ends of the scale.

    Raises:
        TypeError: ``farthest`` without a scale.
    """
    if unreadable == "farthest" and (low is None or high is None):
        raise TypeError("unreadable: farthest needs low and high")

    def counted(rows: Sequence[Row]) -> tuple[Floats, Floats, Mask]:
        x, y, scored = paired_numbers(rows, of)
        if unreadable == "left_out":
            return x, y, scored
        assert low is not None
        assert high is not None
        farther = np.where(x > (low + high) / 2, low, high)
        return x, np.where(scored, y, farther), np.ones_like(scored)

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        x, y, scored = counted(rows)
        columns = [np.ones_like(x), x, y, x * x, y * y, x * y, np.abs(x - y), (x - y) ** 2]
        return np.where(scored[:, None], np.stack(columns, -1), 0.0), scored

    def spearman(rows: Sequence[Row]) -> float:
        x, y, scored = counted(rows)
        if scored.sum() < 2 or np.ptp(x[scored]) == 0 or np.ptp(y[scored]) == 0:
            return float("nan")
        return float(stats.spearmanr(x[scored], y[scored]).statistic)  # pyright: ignore

    name: Callable[[str], str] = (lambda metric: metric) if of is None else f"{of}_{{}}".format
    return Scorer(
        values,
        {
            name("ccc"): Metric(concordance, limits=(-1, 1)),
            name("pearson"): Metric(pearson, limits=(-1, 1)),
            name("spearman"): Metric(of_rows=spearman, limits=(-1, 1)),
            name("mae"): Metric(mean_error, limits=(0, np.inf), lower_is_better=True),
            name("rmse"): Metric(root_error, limits=(0, np.inf), lower_is_better=True),
        },
    )


def answered(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A reading for ``Task.official``: MAE, RMSE, Pearson and Spearman over the answers with a
    number. The others are dropped, and ``answered`` is the share that is left. A value that is not
    defined is not given."""
    pairs = [(float(r["truth"]), float(r["answer"])) for r in rows if r["status"] == "ok"]
    found = {"answered": len(pairs) / len(rows)}
    if pairs:
        truth, given = np.array(pairs).T
        found["mae"] = float(np.abs(truth - given).mean())
        found["rmse"] = float(np.sqrt(((truth - given) ** 2).mean()))
        if np.ptp(truth) > 0 and np.ptp(given) > 0:
            found["pearson"] = float(np.corrcoef(truth, given)[0, 1])
            found["spearman"] = float(stats.spearmanr(truth, given).statistic)  # pyright: ignore
    return found


def concordance(sums: Moments) -> Floats:
    """CCC, (..., 8) to (...); NaN where neither varies."""
    mean_x, mean_y, var_x, var_y, cov = _moments(sums)
    return ratio(2 * cov, var_x + var_y + (mean_x - mean_y) ** 2, np.nan)


def pearson(sums: Moments) -> Floats:
    """Pearson's r, (..., 8) to (...); NaN where one of both does not vary."""
    _, _, var_x, var_y, cov = _moments(sums)
    return ratio(cov, np.sqrt(var_x * var_y), np.nan)


def mean_error(sums: Moments) -> Floats:
    """MAE, (..., 8) to (...)."""
    return ratio(sums[..., 6], sums[..., 0], np.nan)


def root_error(sums: Moments) -> Floats:
    """RMSE, (..., 8) to (...)."""
    return np.sqrt(ratio(sums[..., 7], sums[..., 0], np.nan))


def _moments(sums: Moments) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    n = sums[..., 0]
    mean_x, mean_y, xx, yy, xy = (ratio(sums[..., i], n, np.nan) for i in range(1, 6))
    # Rounding may leave a tiny variance where all values are equal.
    var_x, var_y = (
        np.where(square - mean**2 > 1e-12 * np.maximum(1.0, square), square - mean**2, 0.0)
        for mean, square in ((mean_x, xx), (mean_y, yy))
    )
    return mean_x, mean_y, var_x, var_y, xy - mean_x * mean_y


def paired_numbers(
    rows: Sequence[Mapping[str, Any]], of: str | None = None
) -> tuple[Floats, Floats, Mask]:
    """Truth and answer of each row, (n,) each, and whether the answer has a number; 0 where there
    is none. ``of`` names one of several numbers."""

    def one(value: object) -> float:
        if of is not None and isinstance(value, dict):
            value = value.get(of)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return float(value) if isinstance(value, int | float) else float("nan")  # pyright: ignore[reportUnknownArgumentType]

    x = np.array([one(row["truth"]) for row in rows], dtype=np.float64)
    y = np.array([one(row["answer"]) for row in rows], dtype=np.float64)
    scored = ~np.isnan(x) & ~np.isnan(y)
    return np.nan_to_num(x), np.nan_to_num(y), scored
