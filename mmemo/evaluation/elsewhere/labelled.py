"""Files that hold the right answers beside the predictions, so that no benchmark is needed.

A row has an id, ``truth`` and ``prediction``, and perhaps ``speaker`` and other fields to group by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmemo.answers.label_sets import emotion_set
from mmemo.answers.parsing import LabelSet, label_set, normalise, yes_no
from mmemo.data.adapter import Excluded
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample, Truth, Turn
from mmemo.errors import EvaluationError
from mmemo.evaluation.benchmark import Benchmark, Selected
from mmemo.evaluation.elsewhere.prediction import Prediction, as_text
from mmemo.evaluation.predictions import key_of
from mmemo.evaluation.task import Task

GROUPS = ("speaker", "gender", "age", "language", "session", "fold", "corpus")
"""Columns that become fields of ``group``."""


def labelled_benchmark(
    file: Path, labels: str, predictions: Sequence[Prediction]
) -> tuple[Benchmark, Selected, list[Prediction]]:
    """The benchmark that a file with truths is, its samples, and their predictions with codes of
    the label set written as labels.

    Args:
        labels: a registered label set (``mmemo labels``), ``yes_no``, or labels between commas.

    Raises:
        EvaluationError: there is no such set, or no row has a truth.
    """
    found, codes = _labels(labels)
    samples: dict[str, Sample] = {}
    excluded: list[Excluded] = []
    kept: list[Prediction] = []
    for place, one in enumerate(predictions, start=1):
        truth = None if one.truth is None else _truth(one.truth, found, codes)
        if truth is None:
            told = "no truth" if one.truth is None else "label outside the set"
            excluded.append(Excluded(one.name, told, one.truth or ""))
            continue
        kept.append(replace(one, text=codes.get(one.text.strip(), one.text), task=None))
        sample = _sample(one, truth, (str(file), place))
        other = samples.setdefault(sample.sample_id, sample)
        if other.truth.label != truth:
            raise EvaluationError(
                f"{file}: {one.name} has another truth than an earlier row of this id; keep one"
            )
    if all(one.truth is None for one in predictions):
        raise EvaluationError(
            f"{file} has no truths; add a column 'truth', or give the benchmark with --benchmark"
        )

    def every(data: DataConfig) -> list[Sample]:
        return list(samples.values())

    name = f"labels:{labels}"
    task = Task(labels=found)
    benchmark = Benchmark(
        file=name,
        sha256=key_of([name, *found.labels]),
        samples=every,
        labels=lambda sample: found,
        truth=lambda sample: sample.truth.label,
        prompt=lambda sample: sample.prompt,
        task=lambda sample: "emotion",
        score=None,
        tasks={"emotion": task},
    )
    return benchmark, Selected(list(samples.values()), excluded), kept


def _labels(labels: str) -> tuple[LabelSet, dict[str, str]]:
    """The labels, and how files write each of them as a code."""
    if labels == "yes_no":
        return yes_no(), {"1": "yes", "0": "no"}
    if "," in labels:
        listed = [one.strip() for one in labels.split(",")]
        return label_set([one for one in dict.fromkeys(listed) if one]), {}
    return label_set(labels), emotion_set(labels).by_code


def _truth(written: str, labels: LabelSet, codes: dict[str, str]) -> str | None:
    """The label that a file writes; codes first, as in the set's own files."""
    code = codes.get(written.strip())
    return code if code is not None else labels.exact(normalise(written))


def _sample(one: Prediction, truth: str, source: tuple[str, int]) -> Sample:
    fields = {str(name).strip().lower(): value for name, value in one.row.items()}
    group = {name: as_text(fields[name]).strip() for name in GROUPS if name in fields}
    return Sample(
        sample_id=one.ids[0],
        turns=(Turn("user", ""),),
        media={},
        truth=Truth(label=truth),
        group={name: value for name, value in group.items() if value},
        source=source,
    )
