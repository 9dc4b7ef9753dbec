"""The answer that looks at nothing: the most common label, or the mean of the numbers.

It is taken from training rows (``majority_from``). Without these it is taken from the very
questions, which no model can know: an oracle, and named so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmemo.data.manifest import DataConfig, load_samples
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import constant_rows, label_order


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant answer: its name in tables, its rows, and whether it knows the test's truths."""

    name: str
    answer: Any
    oracle: bool
    rows: list[Row]


def constant_answer(rows: Sequence[Row], training: DataConfig | None) -> Constant | None:
    """The constant answer to some questions of one task; None where their kind of answer has none.

    Ties go to the first label by name.
    """
    known = set(label_order(rows))
    truths = _training_truths(training, known) if training is not None else []
    oracle = not truths
    truths = truths or [row["truth"] for row in rows]
    if known:
        counts = Counter(str(one) for one in truths)
        label = min(counts, key=lambda name: (-counts[name], name))
        what = "most common label of these questions: oracle" if oracle else "majority of training"
        return Constant(f"always “{label}” ({what})", label, oracle, constant_rows(rows, label))
    answer = _mean(truths)
    if answer is None:
        return None
    what = "mean of these questions: oracle" if oracle else "mean of training"
    told = answer if isinstance(answer, dict) else f"{answer:g}"
    fixed = {"raw": str(answer), "answer": answer, "status": "ok"}
    name = f"always {told} ({what})" if not isinstance(answer, dict) else f"always the {what}"
    return Constant(name, answer, oracle, [{**row, **fixed} for row in rows])


def _training_truths(training: DataConfig, known: set[str]) -> list[Any]:
    """The labels of the training rows that are among ``known``, or their numbers without any."""
    columns = [*training.columns, *({"gold"} - set(training.columns))]
    samples = load_samples(training.model_copy(update={"columns": columns}))
    found = [sample.columns.get("gold", sample.truth.label) for sample in samples]
    if known:
        return [one for one in found if isinstance(one, str) and one in known]
    return [one for one in found if _is_number(one) or isinstance(one, dict)]


def _mean(truths: Sequence[Any]) -> float | dict[str, float] | None:
    if truths and all(map(_is_number, truths)):
        return round(float(sum(truths)) / len(truths), 6)
    if truths and all(
        isinstance(one, dict) and all(map(_is_number, one.values())) for one in truths
    ):
        names = dict.fromkeys(name for one in truths for name in one)
        columns = {name: [one[name] for one in truths if name in one] for name in names}
        return {name: round(float(sum(x)) / len(x), 6) for name, x in columns.items()}
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
