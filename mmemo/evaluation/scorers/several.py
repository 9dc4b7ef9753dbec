"""Several labels for each answer: multi-label F1, exact match, MCC, Hamming loss and error rates.

All but two metrics are functions of the confusion counts of each label, so they are of the corpus
and never means over batches. They equal scikit-learn's with ``zero_division=0``:

- ``micro_f1`` of the pooled counts, and ``macro_f1``, the mean over all labels, where a label that
  neither occurs nor is answered has F1 0;
- ``samples_f1``: the mean over answers of 2 |A ∩ T| / (|A| + |T|), 1 where both are empty (as in
  ``zero_division=1``: an answer without labels is then right);
- ``exact_match``: the share of answers that name just the true labels;
- ``mcc``: the mean over labels of Matthews' correlation, 0 for a label that does not vary;
- ``hamming_loss``: the share of wrong decisions about one label of one answer.

``fnr`` is the share of the true labels that are missed, ``fpr`` the share of the others that are
named, both as means over the labels where they are defined, and ``fnr_minus_fpr`` their
difference: above 0, a model that moderates or recognises emotion says too little.

An answer that cannot be read names no label and stays in every metric; or it is ``left_out``, as in
released scripts, and counted.

Shapes: n answers, K labels; sums (..., 4 K + 3): true positives, false positives, false negatives
and true negatives of each label, and then answers, samples' F1 and exact matches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mmemo.answers.label_sets import emotion_set
from mmemo.errors import EvaluationError
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats, Statistic

_LAST = 3


def several(
    *,
    labels: Sequence[str] | str,
    none: str | None = None,
    unreadable: Literal["nothing", "left_out"] = "nothing",
    per_label: bool = False,
) -> Scorer:
    """The scorer of several labels. Truths and answers are lists of labels, or one label.

    Args:
        labels: all labels, or the name of a registered label set.
        none: the label that stands for naming nothing, such as the "no" of a yes/no question.
        unreadable: how an answer that cannot be read counts.
        per_label: whether each label's ``f1``, ``fnr``, ``fpr`` and ``fnr_minus_fpr`` are given as
            ``fnr[LABEL]``.

    Raises:
        TypeError: ``unreadable`` is unknown, or labels occur twice.
        EvaluationError: there is no label set of that name.
    """
    names = emotion_set(labels).names if isinstance(labels, str) else tuple(labels)
    if not names or len(set(names)) != len(names) or none in names:
        raise TypeError("labels must be different labels, and 'none' no one of them")
    if unreadable not in ("nothing", "left_out"):
        raise TypeError("unreadable must be 'nothing' or 'left_out'")
    named = _places(names, none)

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        truth = np.zeros((len(rows), len(names)), dtype=np.bool_)
        answer, scored = np.zeros_like(truth), np.ones(len(rows), dtype=np.bool_)
        for place, row in enumerate(rows):
            truth[place, named(row["truth"], row)] = True
            if row["status"] == "ok":
                answer[place, named(row["answer"], row)] = True
            elif unreadable == "left_out":
                scored[place] = False
        cells = [truth & answer, ~truth & answer, truth & ~answer, ~truth & ~answer]
        both, size = cells[0].sum(1), truth.sum(1) + answer.sum(1)
        last = [np.ones(len(rows)), ratio(2.0 * both, size, 1.0), (truth == answer).all(1)]
        sums = np.concatenate([*cells, np.stack(last, -1)], axis=1).astype(np.float64)
        return sums * scored[:, None], scored

    metrics = {
        "micro_f1": Metric(micro_f1, share=True),
        "macro_f1": Metric(macro_f1, share=True),
        "samples_f1": Metric(_mean(1), limits=(0, 1)),
        "exact_match": Metric(_mean(2), share=True),
        "mcc": Metric(mcc, limits=(-1, 1)),
        "hamming_loss": Metric(hamming_loss, limits=(0, 1), lower_is_better=True),
        **_rates(lambda one: lambda sums: _mean_defined(one(sums)), "{}"),
    }
    for place, name in enumerate(names) if per_label else ():
        metrics[f"f1[{name}]"] = Metric(_at(label_f1, place), share=True)
        metrics |= _rates(lambda one, place=place: _at(one, place), f"{{}}[{name}]")
    return Scorer(values, metrics)


def _places(names: Sequence[str], none: str | None) -> Callable[[object, Row], list[int]]:
    """The function that finds the places of the labels of a truth or an answer."""
    places = {name: place for place, name in enumerate(names)}

    def named(value: object, row: Row) -> list[int]:
        listed: list[object] = list(value) if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType]
        found = {str(one) for one in listed if one is not None and one != none}
        unknown = found - set(places)
        if unknown:
            raise EvaluationError(
                f"{row['sample_id']}: '{min(unknown)}' is none of the labels that 'several' was "
                f"given ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            )
        return [places[one] for one in found]

    return named


def micro_f1(sums: Floats) -> Floats:
    """F1 of all decisions together, (..., 4 K + 3) to (...)."""
    hit, false, missed, _ = (cell.sum(-1) for cell in _cells(sums))
    return _where_any(sums, ratio(2 * hit, 2 * hit + false + missed, 0.0))


def macro_f1(sums: Floats) -> Floats:
    """Mean F1 of all labels, (..., 4 K + 3) to (...)."""
    return label_f1(sums).mean(-1)


def label_f1(sums: Floats) -> Floats:
    """F1 of each label, (..., 4 K + 3) to (..., K); NaN without any answer."""
    hit, false, missed, _ = _cells(sums)
    return _where_any(sums, ratio(2 * hit, 2 * hit + false + missed, 0.0))


def mcc(sums: Floats) -> Floats:
    """Mean over labels of Matthews' correlation coefficient, (..., 4 K + 3) to (...)."""
    hit, false, missed, rest = _cells(sums)
    product = (hit + false) * (hit + missed) * (rest + false) * (rest + missed)
    found = ratio(hit * rest - false * missed, np.sqrt(np.maximum(product, 0.0)), 0.0)
    return _where_any(sums, found).mean(-1)


def hamming_loss(sums: Floats) -> Floats:
    """Share of wrong decisions about a label, (..., 4 K + 3) to (...)."""
    hit, false, missed, rest = (cell.sum(-1) for cell in _cells(sums))
    return ratio(false + missed, hit + false + missed + rest, np.nan)


def fnr(sums: Floats) -> Floats:
    """False negative rate of each label, (..., 4 K + 3) to (..., K); NaN where it never occurs."""
    hit, _, missed, _ = _cells(sums)
    return ratio(missed, hit + missed, np.nan)


def fpr(sums: Floats) -> Floats:
    """False positive rate of each label, (..., 4 K + 3) to (..., K); NaN where it always occurs."""
    _, false, _, rest = _cells(sums)
    return ratio(false, false + rest, np.nan)


def _gap(sums: Floats) -> Floats:
    return fnr(sums) - fpr(sums)


def _rates(make: Callable[[Statistic], Statistic], name: str) -> dict[str, Metric]:
    """The three error rates, each made a number of (...) by ``make``."""
    return {
        name.format("fnr"): Metric(make(fnr), share=True, lower_is_better=True),
        name.format("fpr"): Metric(make(fpr), share=True, lower_is_better=True),
        name.format("fnr_minus_fpr"): Metric(make(_gap), limits=(-1, 1), lower_is_better=True),
    }


def _cells(sums: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """True positives, false positives, false negatives and true negatives, each (..., K)."""
    size = (sums.shape[-1] - _LAST) // 4
    first, second, third, last = (sums[..., k * size : (k + 1) * size] for k in range(4))
    return first, second, third, last


def _where_any(sums: Floats, values: Floats) -> Floats:
    """The values, NaN where there is no answer at all."""
    answers = sums[..., -_LAST]
    present = answers.reshape(answers.shape + (1,) * (values.ndim - answers.ndim))
    return np.where(present > 0, values, np.nan)


def _mean(place: int) -> Statistic:
    return lambda sums: ratio(sums[..., place - _LAST], sums[..., -_LAST], np.nan)


def _at(statistic: Statistic, place: int) -> Statistic:
    return lambda sums: statistic(sums)[..., place]


def _mean_defined(values: Floats) -> Floats:
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1).astype(float), np.nan)
