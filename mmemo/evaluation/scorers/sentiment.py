"""Sentiment scores as MMSA rates them (thuiar/MMSA, utils/metricsTop.py): CMU-MOSI, CMU-MOSEI and
CH-SIMS v1 and v2.

On the scale of MOSI, -3 to 3, the accuracies on 7, 5 and 3 classes clip truth and answer to ±3, ±2
and ±1 and round both half to even, as NumPy does. ``acc2_has0`` counts 0 as positive, ``acc2_non0``
drops clips whose truth is 0 and counts an answer of 0 as negative. On the scale of SIMS, -1 to 1,
both are clipped to ±1, and the classes are bins that are closed at their upper end: 2 classes with
the edge 0, 3 with ±0.1, 5 with ±0.7 and ±0.1. So ``acc2_has0`` counts 0 as negative there. F1 is
weighted by the classes' support.

MMSA rates numbers that a network always gives. Here an answer that cannot be read counts as the end
of the scale that is farther from the truth, which is wrong in every accuracy; or, with
``left_out``, in no metric.

Shapes: n answers; sums (..., 18 or 19).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, r2_score

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.evaluation.scorers.numbers import mean_error, paired_numbers, pearson
from mmemo.statistics import Floats

Scale = Literal["mosi", "sims"]
ENDS: Mapping[Scale, float] = {"mosi": 3.0, "sims": 1.0}
_EDGES = {"acc3": (-0.1, 0.1), "acc5": (-0.7, -0.1, 0.1, 0.7)}
_CLIPPED = {"acc3": 1.0, "acc5": 2.0, "acc7": 3.0}
_HAS0, _NON0, _CLASSES = 8, 12, 16
"""Where the sums have, after the 8 of :mod:`mmemo.evaluation.scorers.numbers`, the tables of has0
and of non0, by truth and answer (negative, positive), and the right answers on 3, 5, 7 classes."""


def sentiment(*, scale: Scale, unreadable: Literal["left_out", "farthest"] = "farthest") -> Scorer:
    """The scorer of sentiment.

    Args:
        scale: ``mosi`` for -3 to 3, ``sims`` for -1 to 1.
        unreadable: how an answer without a number counts.

    Raises:
        TypeError: there is no such scale.
    """
    if scale not in ENDS:
        raise TypeError(f"scale is '{scale}'; use one of {', '.join(ENDS)}")
    names = [*_EDGES] if scale == "sims" else [*_CLIPPED]

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        x, y, scored = paired_numbers(rows)
        if unreadable == "farthest":
            y = np.where(scored, y, farthest(x, scale))
            scored = np.ones_like(scored)
        if scale == "sims":
            x, y = np.clip(x, -1, 1), np.clip(y, -1, 1)
        columns = [np.ones_like(x), x, y, x * x, y * y, x * y, np.abs(x - y), (x - y) ** 2]
        columns += _crossed(*has0(x, y, scale), np.ones_like(scored))
        columns += _crossed(x > 0, y > 0, x != 0)
        columns += [
            (classes(x, name, scale) == classes(y, name, scale)).astype(float) for name in names
        ]
        return np.where(scored[:, None], np.stack(columns, -1), 0.0), scored

    def class_accuracy(place: int) -> Metric:
        return Metric(lambda sums: ratio(sums[..., place], sums[..., 0], np.nan), share=True)

    return Scorer(
        values,
        {
            "acc2_has0": Metric(lambda sums: _accuracy(sums, _HAS0), share=True),
            "f1_has0": Metric(lambda sums: _weighted_f1(sums, _HAS0), share=True),
            "acc2_non0": Metric(lambda sums: _accuracy(sums, _NON0), share=True),
            "f1_non0": Metric(lambda sums: _weighted_f1(sums, _NON0), share=True),
            **{name: class_accuracy(_CLASSES + at) for at, name in enumerate(names)},
            "mae": Metric(mean_error, limits=(0, 2 * ENDS[scale]), lower_is_better=True),
            "pearson": Metric(pearson, limits=(-1, 1)),
        },
    )


def farthest(truth: Floats, scale: Scale) -> Floats:
    """The end of the scale farther from each truth, (n,). Where the truth is 0 it is the end on the
    other side of the edge between negative and positive."""
    high = truth <= 0 if scale == "sims" else truth < 0
    return np.where(high, ENDS[scale], -ENDS[scale])


def has0(x: Floats, y: Floats, scale: Scale) -> tuple[Mask, Mask]:
    """Whether truth and answer are positive, (n,) each, where clips whose truth is 0 count too."""
    return (x > 0, y > 0) if scale == "sims" else (x >= 0, y >= 0)


def classes(values: Floats, name: str, scale: Scale) -> NDArray[Any]:
    """The class of each value, (n,)."""
    if scale == "mosi":
        return np.round(np.clip(values, -_CLIPPED[name], _CLIPPED[name]))
    return np.searchsorted(_EDGES[name], np.clip(values, -1, 1), side="left")


def mmsa_mosi(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What MMSA prints for MOSI and MOSEI: its names, rounded to four digits as it does. Answers
    without a number are ``left_out``: MMSA has none, so no convention for them."""
    x, y, scored = paired_numbers(rows)
    x, y, left_out = x[scored], y[scored], int((~scored).sum())
    if not x.size:
        return {"left_out": float(left_out)}
    non0 = x != 0
    found = {
        "Has0_acc_2": accuracy_score(x >= 0, y >= 0),
        "Has0_F1_score": _f1(x >= 0, y >= 0),
        **(
            {
                "Non0_acc_2": accuracy_score(x[non0] > 0, y[non0] > 0),
                "Non0_F1_score": _f1(x[non0] > 0, y[non0] > 0),
            }
            if non0.any()
            else {}
        ),
        "Mult_acc_5": np.mean(classes(x, "acc5", "mosi") == classes(y, "acc5", "mosi")),
        "Mult_acc_7": np.mean(classes(x, "acc7", "mosi") == classes(y, "acc7", "mosi")),
        "MAE": np.mean(np.abs(y - x)),
        "Corr": _corr(x, y),
    }
    return {**_finite(found, digits=4), "left_out": float(left_out)}


def mmsa_sims(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What MMSA gives for SIMS, and thuiar/ch-sims-v2 for both versions, which adds
    ``Mult_acc_2_weak``, on clips whose truth is from -0.4 to 0.4, and ``R_squre`` (so spelt)."""
    x, y, scored = paired_numbers(rows)
    x, y = np.clip(x[scored], -1, 1), np.clip(y[scored], -1, 1)
    left_out = int((~scored).sum())
    if not x.size:
        return {"left_out": float(left_out)}
    weak = np.abs(x) <= 0.4
    found = {
        "Mult_acc_2": accuracy_score(x > 0, y > 0),
        "Mult_acc_2_weak": np.mean((x > 0)[weak] == (y > 0)[weak]) if weak.any() else math.nan,
        "Mult_acc_3": np.mean(classes(x, "acc3", "sims") == classes(y, "acc3", "sims")),
        "Mult_acc_5": np.mean(classes(x, "acc5", "sims") == classes(y, "acc5", "sims")),
        "F1_score": _f1(x > 0, y > 0),
        "MAE": np.mean(np.abs(y - x)),
        "Corr": _corr(x, y),
        "R_squre": r2_score(x, y) if x.size > 1 else math.nan,
    }
    return {**_finite(found), "left_out": float(left_out)}


def _crossed(x: Mask, y: Mask, kept: Mask) -> list[Floats]:
    """Columns of a 2 x 2 table of truth and answer."""
    return [((x == a) & (y == b) & (kept == 1)).astype(float) for a in (0, 1) for b in (0, 1)]


def _accuracy(sums: Floats, at: int) -> Floats:
    table = sums[..., at : at + 4]
    return ratio(table[..., 0] + table[..., 3], table.sum(-1), np.nan)


def _weighted_f1(sums: Floats, at: int) -> Floats:
    table = sums[..., at : at + 4]
    total = np.zeros(table.shape[:-1])
    for own in (0, 3):
        wrong = table[..., 1] + table[..., 2]
        f1 = ratio(2 * table[..., own], 2 * table[..., own] + wrong, 0.0)
        support = table[..., own] + table[..., 1 if own == 0 else 2]
        total = total + f1 * support
    return ratio(total, table.sum(-1), np.nan)


def _f1(x: Mask, y: Mask) -> float:
    return float(f1_score(x, y, average="weighted", zero_division=0))  # pyright: ignore


def _corr(x: Floats, y: Floats) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(y, x)[0][1])


def _finite(found: Mapping[str, Any], digits: int | None = None) -> dict[str, float]:
    """Without what is not defined, since JSON has no NaN."""
    values = {name: float(value) for name, value in found.items()}
    kept = {name: value for name, value in values.items() if math.isfinite(value)}
    return kept if digits is None else {name: round(value, digits) for name, value in kept.items()}
