"""Benchmarks that are declared: where the samples are, how they are asked, read and scored.

A benchmark's file has ``TASKS``, and usually ``rows``, which reads a release's own folder as a data
set adapter does (:mod:`mmemo.data.adapter`; ``ADAPTER`` names one of ``data/`` instead)::

    \"\"\"DFEW: ... what it is, its licence, where to get it, the layout of its folder.\"\"\"

    ADAPTER = "data/dfew.py"
    OPTIONS = {"split": "test"}  # of the adapter, unless others are given
    TASKS = {"emotion": Task(labels="dfew", question="Which emotion ...? One of {labels}.")}

Rows may have these columns beside the known ones; only the first that apply are needed:

- ``task``: the name of the row's task, where there are several;
- ``gold``: the right answer as the task's kind of answer gives it (a label, a letter, yes or no, a
  number, a list of labels, a list of reference texts); the row's ``label`` by default;
- ``choices``: the texts of the options, asked after the question as ``A. ...``;
- ``votes``: label -> number of raters;
- ``facts``: what a judge is told of the row beside its right answer, as text.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.answers.kinds import AnswerKind
from mmemo.answers.label_set import ChoiceSet
from mmemo.answers.parsing import LabelSet, label_set, yes_no
from mmemo.data.adapter import Excluded
from mmemo.data.folders import words_of
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES, Sample, Turn
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.scorer import Spec

COLUMNS = ("task", "gold", "choices", "votes", "facts")
LETTERS = string.ascii_uppercase
Official = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float]]
"""The numbers that a benchmark's released scorer gives some rows of ``predictions.jsonl``, with its
defects."""


@dataclass(frozen=True)
class Task:
    """How the questions of one task are asked, read and scored.

    Exactly one of ``labels`` and ``answers`` is set.
    """

    labels: str | tuple[str, ...] | LabelSet | Callable[[Sample], LabelSet] | None = None
    """The labels that an answer may name: those of a registered label set (``mmemo labels``), a
    list, ``yes_no``, ``choices`` for the letters of each row's options, or a function of the
    row."""
    answers: AnswerKind | None = None
    """Any other kind of answer (:mod:`mmemo.answers.kinds`)."""
    question: str | None = None
    """What is asked; ``{labels}`` is replaced by the labels, and ``{transcript}`` by a line that
    quotes the row's words, or by nothing. None asks the row's own prompt."""
    paraphrases: tuple[str, ...] = ()
    """The same question in other words, for ``--paraphrases``."""
    scorers: tuple[Spec, ...] = ()
    """Scorers (:mod:`mmemo.evaluation.scorer`), beside WAR, UAR and F1 for labels."""
    official: Official | None = None
    """The released scorer's reading of the same answers."""
    slices: tuple[str, ...] = ()
    """Fields of ``group`` by which results are also given."""
    measure: Callable[[Any, Sample], Mapping[str, float | None]] | None = None
    """What is measured on each question's clips with the model's encoders, before it is answered
    (:mod:`mmemo.evaluation.scorers.measured`)."""

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.answers is None):
            raise EvaluationError("a task needs either labels or a kind of answers")


def declared_tasks(module: Any) -> Mapping[str, Task] | None:
    """The ``TASKS`` of a benchmark's module; None if it declares none."""
    found = getattr(module, "TASKS", None)
    if not isinstance(found, Mapping):
        return None
    tasks: Mapping[str, Any] = found  # pyright: ignore[reportUnknownVariableType]
    return tasks if all(isinstance(one, Task) for one in tasks.values()) else None


def samples_of(tasks: Mapping[str, Task], data: DataConfig) -> tuple[list[Sample], list[Excluded]]:
    """The rows of the manifests, grouped by task in the order of ``tasks``, with what is asked; and
    the rows that the adapter left out (``NAME.excluded.jsonl`` beside a manifest)."""
    columns = [*data.columns, *(name for name in COLUMNS if name not in data.columns)]
    rows = load_samples(data.model_copy(update={"columns": columns}))
    order = {name: place for place, name in enumerate(tasks)}
    unknown = next((row for row in rows if task_of(row, tasks) not in order), None)
    if unknown is not None:
        raise EvaluationError(
            f"{unknown.sample_id} is of task '{unknown.columns['task']}', which the benchmark does "
            f"not have ({', '.join(tasks)})"
        )
    asked = [_ask(row, tasks[task_of(row, tasks)]) for row in rows]
    asked.sort(key=lambda row: order[task_of(row, tasks)])  # a stable sort
    return asked, [one for file in data.manifests for one in _excluded(Path(file))]


def task_of(sample: Sample, tasks: Mapping[str, Task]) -> str:
    """The name of the row's task; the first one if the row names none."""
    return str(sample.columns.get("task") or next(iter(tasks)))


def labels_of(sample: Sample, task: Task) -> LabelSet | None:
    """The labels that an answer may name; None for other kinds of answers."""
    if task.labels is None or isinstance(task.labels, LabelSet):
        return task.labels
    if callable(task.labels):
        return task.labels(sample)
    if task.labels == "choices":
        return _letters(tuple(str(one) for one in _choices(sample)))
    return _label_set(task.labels)


def truth_of(sample: Sample, task: Task) -> Any:
    """The right answer: the column ``gold``, or else the label.

    Raises:
        EvaluationError: the row has neither.
    """
    gold = sample.columns.get("gold")
    if gold is None:
        gold = sample.truth.label
    if gold is None:
        raise EvaluationError(f"{sample.sample_id} has neither 'gold' nor 'label'; give one")
    if task.labels == "choices" and gold not in LETTERS[: len(_choices(sample))]:
        texts = [str(one).strip() for one in _choices(sample)]
        if str(gold).strip() not in texts:
            raise EvaluationError(f"{sample.sample_id}: '{gold}' is none of its choices")
        gold = LETTERS[texts.index(str(gold).strip())]
    return gold


def extra_of(sample: Sample) -> dict[str, Any]:
    """What scorers read of a row beside its truth."""
    keys = ("choices", "votes", "facts")
    return {key: sample.columns[key] for key in keys if sample.columns.get(key)}


def write_excluded(manifest: Path, excluded: Sequence[Excluded]) -> None:
    """Write the rows that an adapter left out beside the manifest that it made."""
    rows = ({"row": one.row, "reason": one.reason, "detail": one.detail} for one in excluded)
    files.write_rows(_beside(manifest), rows, ensure_ascii=False)


def _excluded(manifest: Path) -> list[Excluded]:
    path = _beside(manifest)
    return [Excluded(**row) for row in files.read_rows(path)] if path.exists() else []


def _beside(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}.excluded.jsonl")


def _ask(row: Sample, task: Task) -> Sample:
    """The row with the turns that are asked."""
    if task.question is None:
        text = next((turn.text for turn in reversed(row.prompt) if turn.role == "user"), "")
        before = row.prompt[:-1]
    else:
        labels = labels_of(row, task)
        names = ", ".join(labels.labels) if labels is not None else ""
        placeholders = "".join(PLACEHOLDERS[one] for one in MODALITIES if one in row.media)
        asked = task.question.replace("{labels}", names).replace("{transcript}", said(row))
        text, before = placeholders + asked, ()
    if task.labels == "choices":
        listed = zip(LETTERS, _choices(row), strict=False)
        text += "".join(f"\n{letter}. {choice}" for letter, choice in listed)
    return replace(row, turns=(*before, Turn("user", text)))


def said(sample: Sample) -> str:
    """A line that quotes what is said in the clip; "" where the words are not known."""
    words = words_of(sample.transcript or "")
    return f'The person says: "{words}"\n' if words else ""


def _choices(sample: Sample, most: int = len(LETTERS)) -> Sequence[Any]:
    found = sample.columns.get("choices")
    if not isinstance(found, list) or not 2 <= len(found) <= most:  # pyright: ignore[reportUnknownArgumentType]
        raise ConfigError(f"{sample.sample_id} needs 'choices', a list of 2 to {most} texts")
    return found  # pyright: ignore[reportUnknownVariableType]


@lru_cache(maxsize=512)
def _letters(choices: tuple[str, ...]) -> LabelSet:
    return ChoiceSet(choices)


@lru_cache(maxsize=32)
def _label_set(labels: str | tuple[str, ...]) -> LabelSet:
    return yes_no() if labels == "yes_no" else label_set(labels)
