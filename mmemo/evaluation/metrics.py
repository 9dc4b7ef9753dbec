"""Classification metrics as functions of a confusion matrix, vectorised over leading axes.

With K classes, a counts matrix is (..., K, K + 2): rows are the true classes, columns the answered
classes followed by ``refused`` and ``malformed``. Leading axes are the answers without
each of the clusters, so that the same code computes a value and its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
Values = NDArray[np.float64]

REFUSED, MALFORMED = "refused", "malformed"


def columns(labels: Sequence[str]) -> tuple[str, ...]:
    """Names of the K + 2 columns of a counts matrix."""
    return (*labels, REFUSED, MALFORMED)


def war(counts: Counts) -> Values:
    """Weighted average recall, which equals accuracy: right answers over all answers. (...)."""
    return ratio(_right(counts).sum(-1), counts.sum((-2, -1)), np.nan)


def recall(counts: Counts) -> Values:
    """Recall of each class, NaN for a class that does not occur in the truth. (..., K)."""
    return ratio(_right(counts), counts.sum(-1), np.nan)


def precision(counts: Counts) -> Values:
    """Precision of each class, 0 for a class that was never answered. (..., K)."""
    # The columns of refused and malformed answers name no class, so they cost no precision.
    return ratio(_right(counts), counts[..., : counts.shape[-2]].sum(-2), 0.0)


def f1(counts: Counts) -> Values:
    """F1 of each class, 0 where precision and recall are 0. (..., K)."""
    answered = counts[..., : counts.shape[-2]].sum(-2)
    # This form needs neither precision nor recall, which may be undefined.
    return ratio(2 * _right(counts), counts.sum(-1) + answered, 0.0)


def uar(counts: Counts) -> Values:
    """Unweighted average recall: mean recall over the classes that occur in the truth. (...)."""
    return _mean_present(recall(counts), counts)


def macro_f1(counts: Counts) -> Values:
    """Mean F1 over the classes that occur in the truth. (...)."""
    return _mean_present(f1(counts), counts)


def weighted_f1(counts: Counts) -> Values:
    """Mean F1 weighted by the support of each class (WAF). (...)."""
    support = counts.sum(-1)
    return ratio((f1(counts) * support).sum(-1), support.sum(-1), np.nan)


SCALARS: Mapping[str, str] = {
    "war": "WAR (accuracy)",
    "uar": "UAR",
    "weighted_f1": "Weighted F1",
    "macro_f1": "Macro F1",
}
"""Key in results to name in tables. Each key is the name of a function in this module."""


def scalars(counts: Counts) -> dict[str, Values]:
    """All scalar metrics of a counts matrix."""
    return {
        "war": war(counts),
        "uar": uar(counts),
        "weighted_f1": weighted_f1(counts),
        "macro_f1": macro_f1(counts),
    }


def reliance(answers: Counts) -> Values:
    """Signed reliance, from counts (..., 3) of answers that name the label of the voice, of the
    face, or of neither: +1 is always the voice, -1 always the face, 0 is balanced. (...)."""
    return ratio(answers[..., 0] - answers[..., 1], answers.sum(-1), np.nan)


def shares(answers: Counts) -> Values:
    """Counts (..., 3) as shares of their sum."""
    return ratio(answers, answers.sum(-1, keepdims=True), np.nan)


def mean_of(values: Values) -> Values:
    """Unweighted mean over the last axis, NaN if any value is. (...)."""
    return values.mean(-1)


def mean_of_sums(values: Values) -> Values:
    """Means from (..., 2) sums and counts, NaN where the count is 0. (...)."""
    return ratio(values[..., 0], values[..., 1], np.nan)


def _right(counts: Counts) -> Values:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def ratio(numerator: Values, denominator: Values, empty: float) -> Values:
    """``numerator / denominator``, and ``empty`` where the denominator is not above 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    filled = np.full(numerator.shape, empty, dtype=np.float64)
    # np.where would compute all ratios first and warn of those with a denominator of 0.
    return np.divide(numerator, denominator, out=filled, where=denominator > 0)


def _mean_present(values: Values, counts: Counts) -> Values:
    present = counts.sum(-1) > 0
    # The recall of an absent class is NaN, and NaN times 0 would still be NaN.
    return ratio(np.where(present, values, 0.0).sum(-1), present.sum(-1).astype(float), np.nan)
