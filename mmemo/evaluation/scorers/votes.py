"""Votes: answers against the distribution of several raters' labels.

``votes`` maps labels to numbers of raters. An answer is a label, some labels (which share alike),
or a distribution. What raters say becomes a target by one of three rules (Chou, arXiv
2510.05934):

- majority: the label of more than half of the raters. Other rows are left out.
- plurality: the label with the most votes. Ties are left out.
- all-inclusive: every label whose share is greater than 1/C, strictly, of C labels. No row is left
  out but one whose raters are spread evenly, which has no target; it counts for the KL only.

``kl`` is KL(human || model) in nats. A model's zero would make it infinite, so a share s of the
answer's distribution is spread evenly over the C labels (``smoothing``, ours). ``macro_f1``
compares the labels above 1/C in the answer with the all-inclusive target, from counts over all
rows: a mean over batches, as released code has it, depends on their order.

An answer that cannot be read names no label: it is wrong under every rule. Its KL is that of the
worst answer, all on the label with the fewest votes, or it is left out of the KL with
``unreadable: left_out``.

Shapes: n answers, C labels; a row's values are [1, KL, known, majority, plurality, with a target],
then C x 3 for true, false and missed labels above 1/C, then two confusion matrices C x (C + 2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from mmemo.answers.label_set import label_set
from mmemo.errors import EvaluationError
from mmemo.evaluation import metrics
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats

Votes = Mapping[str, float]


def majority_rule(votes: Votes) -> str | None:
    """The label of more than half of the votes; None if there is none."""
    total = sum(votes.values())
    return next((label for label, count in votes.items() if 2 * count > total), None)


def plurality_rule(votes: Votes) -> str | None:
    """The label with the most votes; None if there is a tie, or no vote."""
    ranked = Counter(votes).most_common(2)
    if not ranked or ranked[0][1] <= 0 or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def all_inclusive_rule(votes: Votes, classes: int) -> set[str]:
    """The labels whose share of the votes is greater than 1 / ``classes``."""
    total = sum(votes.values())
    # Multiplied and not divided: five votes of fifteen are a third, whatever the rounding says.
    return {label for label, count in votes.items() if count * classes > total * (1 + 1e-9)}


def votes(
    *,
    labels: str | Sequence[str],
    smoothing: float = 0.05,
    unreadable: Literal["worst", "left_out"] = "worst",
) -> Scorer:
    """The scorer of votes.

    Args:
        labels: the labels that raters chose from, or the name of a registered set.
        smoothing: the share of an answer's distribution that is spread evenly, above 0 and below 1.
        unreadable: how an answer that cannot be read counts in ``kl``.

    Raises:
        TypeError: a value is out of bounds.
    """
    if not 0 < smoothing < 1 or unreadable not in ("worst", "left_out"):
        raise TypeError("needs smoothing between 0 and 1, and unreadable: worst or left_out")
    names = label_set(labels if isinstance(labels, str) else tuple(labels)).labels
    return Scorer(_Values(names, smoothing, unreadable == "worst"), _metrics(len(names)))


@dataclass(frozen=True)
class _Values:
    """Maps answers to what each adds to the sums."""

    names: tuple[str, ...]
    smoothing: float
    worst: bool

    def __call__(self, rows: Sequence[Row]) -> tuple[Floats, Mask]:
        size = len(self.names)
        places = {name: place for place, name in enumerate(self.names)}
        found = np.zeros((len(rows), 6 + 3 * size + 2 * size * (size + 2)))
        for row, one in zip(rows, found, strict=True):
            human, model = _votes(row, places), _shares(row["answer"], places)
            if not human:
                continue
            one[:6] = self._scalars(human, model)
            above, *matrices = _parts(one, size)
            above[:] = self._above(human, model)
            for rule, matrix in zip((majority_rule, plurality_rule), matrices, strict=True):
                target, said = rule(human), plurality_rule(model or {})
                if target is not None:
                    # An answer with a tie names no single label, as one that cannot be read.
                    matrix[places[target], size if said is None else places[said]] = 1
        return found, found[:, 0] > 0

    def _scalars(self, human: Votes, model: Votes | None) -> list[float]:
        """1, the KL, whether it is known, and whether each rule keeps the row."""
        size = len(self.names)
        kl, known = 0.0, model is not None or self.worst
        if known:
            fewest = min(self.names, key=lambda name: human.get(name, 0))
            kl = _divergence(human, {fewest: 1.0} if model is None else model, self.smoothing, size)
        kept = (majority_rule(human), plurality_rule(human), all_inclusive_rule(human, size))
        return [1.0, kl, float(known), *(float(bool(one)) for one in kept)]

    def _above(self, human: Votes, model: Votes | None) -> list[list[bool]]:
        """For each label, whether it is rightly, wrongly and not said to be above 1/C."""
        wanted = all_inclusive_rule(human, len(self.names))
        said = all_inclusive_rule(model or {}, len(self.names)) if wanted else set[str]()
        return [
            [name in wanted & said, name in said - wanted, name in wanted - said]
            for name in self.names
        ]


def _metrics(size: int) -> dict[str, Metric]:
    def part(sums: Floats, index: int) -> Floats:
        return _parts(sums, size)[index]

    found: dict[str, Metric] = {
        "kl": Metric(
            lambda sums: ratio(sums[..., 1], sums[..., 2], np.nan),
            limits=(0, np.inf),
            lower_is_better=True,
        ),
        "macro_f1": Metric(lambda sums: _macro_f1(part(sums, 0)), share=True),
    }
    for index, rule in enumerate(("majority", "plurality"), start=1):
        for name, metric in (
            ("accuracy", metrics.war),
            ("uar", metrics.uar),
            ("macro_f1", metrics.macro_f1),
        ):
            found[f"{rule}_{name}"] = Metric(
                lambda sums, metric=metric, index=index: metric(part(sums, index)), share=True
            )
    for place, rule in enumerate(("majority", "plurality", "all_inclusive"), start=3):
        found[f"{rule}_kept"] = Metric(
            lambda sums, place=place: ratio(sums[..., place], sums[..., 0], np.nan), share=True
        )
    return found


def _parts(values: Floats, size: int) -> tuple[Floats, Floats, Floats]:
    """Views of the counts above 1/C, (..., C, 3), and of both matrices, (..., C, C + 2)."""
    start = 6 + 3 * size
    middle = start + size * (size + 2)
    lead = values.shape[:-1]
    return (
        values[..., 6:start].reshape(*lead, size, 3),
        values[..., start:middle].reshape(*lead, size, size + 2),
        values[..., middle:].reshape(*lead, size, size + 2),
    )


def _macro_f1(counts: Floats) -> Floats:
    """Mean F1 over the labels that are in some target, (..., C, 3) to (...)."""
    right, false, missed = (counts[..., place] for place in range(3))
    f1 = ratio(2 * right, 2 * right + false + missed, 0.0)
    present = right + missed > 0
    return ratio(np.where(present, f1, 0.0).sum(-1), present.sum(-1).astype(float), np.nan)


def _divergence(human: Votes, model: Votes, smoothing: float, classes: int) -> float:
    total = sum(human.values())
    divergence = 0.0
    for name, count in human.items():
        share = count / total
        said = (1 - smoothing) * model.get(name, 0.0) + smoothing / classes
        divergence += share * float(np.log(share / said)) if count > 0 else 0.0
    return max(0.0, divergence)


def _votes(row: Row, places: Mapping[str, int]) -> dict[str, float]:
    """The votes of a row that has any.

    Raises:
        EvaluationError: they are not numbers of raters by label.
    """
    given: Any = row.get("votes") or {}
    if not isinstance(given, dict):
        raise EvaluationError(f"{row['sample_id']}: 'votes' must map labels to numbers of raters")
    found = cast("dict[Any, Any]", given)
    for name, count in found.items():
        number = isinstance(count, int | float) and not isinstance(count, bool)
        if name not in places or not number or not 0 <= count < np.inf:
            raise EvaluationError(
                f"{row['sample_id']}: 'votes' has {name!r}: {count!r}; give numbers of raters for "
                f"{', '.join(places)}"
            )
    return {str(name): float(count) for name, count in found.items() if count > 0}


def _shares(answer: object, places: Mapping[str, int]) -> dict[str, float] | None:
    """The distribution that an answer gives; None for one that gives none."""
    if isinstance(answer, str):
        answer = [answer]
    if isinstance(answer, list):
        named = cast("list[Any]", answer)
        answer = dict.fromkeys(named, 1 / len(named)) if named else {}
    if not isinstance(answer, dict):
        return None
    known = {str(k): float(v) for k, v in cast("dict[Any, Any]", answer).items() if k in places}
    return known or None
