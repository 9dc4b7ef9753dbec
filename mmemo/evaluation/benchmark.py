"""What the engine requires of a benchmark, which is a content file such as ``eval/dfew.py``.

Most files declare ``TASKS``, see :mod:`mmemo.evaluation.task`. A file may define functions instead
where it needs more:

- ``samples(data: DataConfig, **params)``: the questions in the order in which they are asked, as a
  list of samples, or as :class:`Selected`, which also lists the rows left out, and why;
- ``labels(sample) -> LabelSet | None``: the labels that an answer may name; None for an open
  question, which may be answered in any words;
- ``truth(sample) -> str``: the right label, or the right words.

It may define

- ``prompt(sample) -> tuple[Turn, ...]``: the turns to ask; the sample's turns before its answer by
  default;
- ``task(sample) -> str``: the task of the question, "emotion" by default. Each task is scored
  separately, and the first one is the headline;
- ``score(sample, parsed) -> float``: the score of an answer; 1 for the right label and else 0 by
  default;
- ``readings``: a sequence of :class:`Reading`. The headline is then the mean over the tasks, once
  for each way of reading the answers.

Only the evaluation's ``scores`` rate the answers to open questions. They have no accuracy that
could be confused with another task's.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.text import Text

from mmemo import content
from mmemo.answers.kinds import AnswerKind
from mmemo.answers.parsing import LabelSet, Parsed, normalise, parse
from mmemo.config import nearest
from mmemo.console import console
from mmemo.data.adapter import Excluded
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Spec
from mmemo.evaluation.task import (
    Task,
    declared_tasks,
    extra_of,
    labels_of,
    samples_of,
    task_of,
    truth_of,
)
from mmemo.formats import counted

__all__ = ["Benchmark", "Excluded", "Question", "Reading", "Selected", "load_benchmark", "validate"]

_PLACEHOLDERS = re.compile(r"<(?:video|audio|face)>")


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it is asked and scored. ``labels`` is None for an open question, and
    ``kind`` says how its answer is read, if not as plain words."""

    sample: Sample
    turns: tuple[Turn, ...]
    task: str
    labels: LabelSet | None
    truth: Any
    kind: AnswerKind | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further JSON values of its row, which scorers read."""

    @property
    def modality_labels(self) -> dict[str, str]:
        """The known labels of voice (``audio``), face (``video``) and words (``text``), in the
        spelling of the benchmark's labels where they are among them."""
        known = dict(self.sample.truth.modality_labels)
        if self.labels is None:
            return known
        exact = self.labels.exact
        return {name: exact(normalise(label)) or label for name, label in known.items()}

    def row(self) -> Row:
        """The part of its row in ``predictions.jsonl`` that does not depend on the answer."""
        sample = self.sample
        ref = next(iter(sample.media.values()), None)
        text = next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")
        return {
            "sample_id": sample.sample_id,
            "task": self.task,
            "labels": [] if self.labels is None else list(self.labels.labels),
            "question": _PLACEHOLDERS.sub("", text).strip(),
            "truth": self.truth,
            "conflict": sample.truth.conflict,
            "modality_labels": self.modality_labels,
            "group": dict(sample.group),
            "media": {modality: ref.path for modality, ref in sample.media.items()},
            "start": None if ref is None else ref.start,
            "end": None if ref is None else ref.end,
            **({} if self.kind is None else {"kind": self.kind.name}),
            **self.extra,
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """A way of reading and counting the answers of a benchmark with several tasks."""

    name: str
    parser: str
    """A description of the parser, for tables."""
    missing: Literal["wrong", "skipped"]
    """How questions without an answer count, whose clip could not be read."""
    read: Callable[[str, Question], Parsed] | None = None
    """Parses the text of an answer. None uses the standard parser."""


@dataclass(frozen=True, slots=True)
class Selected:
    """The samples that a benchmark selects from its data, and the rows that it leaves out."""

    samples: list[Sample]
    excluded: list[Excluded] = field(default_factory=list[Excluded])

    @property
    def reasons(self) -> dict[str, int]:
        """The number of excluded rows by reason."""
        return dict(sorted(Counter(row.reason for row in self.excluded).items()))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The functions of a benchmark's content file, and what identifies them in a record."""

    file: str
    sha256: str
    samples: Callable[..., list[Sample] | Selected]
    labels: Callable[[Sample], LabelSet | None]
    truth: Callable[[Sample], Any]
    prompt: Callable[[Sample], tuple[Turn, ...]]
    task: Callable[[Sample], str]
    score: Callable[[Sample, Parsed], float] | None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    readings: tuple[Reading, ...] = ()
    tasks: Mapping[str, Task] = field(default_factory=dict[str, Task])
    """The tasks that the file declares; none where it defines functions."""

    def specs(self) -> dict[str, tuple[Spec, ...]]:
        """The scorers of each declared task."""
        return {name: task.scorers for name, task in self.tasks.items()}

    def slices(self) -> dict[str, tuple[str, ...]]:
        """The fields of ``group`` by which results of each declared task are also given."""
        return {name: task.slices for name, task in self.tasks.items()}

    def question(self, sample: Sample) -> Question:
        """The question about a sample.

        Raises:
            EvaluationError: the truth is not among the labels.
        """
        labels, truth = self.labels(sample), self.truth(sample)
        if labels is not None and truth not in labels.labels:
            raise EvaluationError(
                f"{self.file}: the truth '{truth}' of {sample.sample_id} is not one of its labels "
                f"({', '.join(labels.labels)}); fix the manifest or the benchmark's labels"
            )
        name = self.task(sample)
        kind, extra = None, {}
        if name in self.tasks:
            kind, extra = self.tasks[name].answers, extra_of(sample)
        return Question(sample, self.prompt(sample), name, labels, truth, kind, extra)

    def select(self, data: DataConfig) -> Selected:
        """The samples to ask about, and the rows left out."""
        found = self.samples(data, **self.params)
        return found if isinstance(found, Selected) else Selected(found)

    def questions(self, data: DataConfig) -> list[Question]:
        """All questions; see :meth:`ask`."""
        return self.ask(self.select(data), data)

    def ask(self, selected: Selected, data: DataConfig) -> list[Question]:
        """The questions of the selected samples.

        Raises:
            EvaluationError: there is none, an id occurs twice, or the first question is open.
        """
        questions = [self.question(sample) for sample in selected.samples]
        if not questions:
            why = ", ".join(f"{n} {reason}" for reason, n in selected.reasons.items())
            left = f" (rows left out: {why})" if why else ""
            raise EvaluationError(f"{self.file}: no questions in {', '.join(data.manifests)}{left}")
        names: set[str] = set()
        for question in questions:
            name = question.sample.sample_id
            if name in names:
                raise EvaluationError(
                    f"{self.file}: sample_id '{name}' occurs twice; make it unique"
                )
            names.add(name)
        scored = self.tasks[questions[0].task].scorers if self.tasks else ()
        if questions[0].labels is None and not scored:
            raise EvaluationError(
                f"{self.file}: the first question is open, but the first task is the headline and "
                "needs labels; put a task with labels first"
            )
        return questions

    def grade(self, question: Question, parsed: Parsed) -> float:
        """The score of a parsed answer, from 0 to 1."""
        if self.score is not None:
            return float(self.score(question.sample, parsed))
        return float(parsed.label == question.truth)


def load_benchmark(file: str, params: Mapping[str, Any] | None = None) -> Benchmark:
    """Load the content file ``file``, anew if it was edited since it was last loaded.

    Args:
        params: keyword arguments for the file's ``samples``.

    Raises:
        ConfigError: the file does not exist, or ``samples`` has no such parameter.
        EvaluationError: a function is missing.
    """
    module: Any = content.load_module(file)
    digest = content.sha256(content.find(file))
    # Python would go on returning the module from before an edit, so the module remembers its hash.
    if vars(module).setdefault("_loaded_sha256", digest) != digest:
        del sys.modules[module.__name__]
        module = content.load_module(file)
        module._loaded_sha256 = digest
    declared = declared_tasks(module)
    if declared is not None:
        return _declared(file, digest, declared, params or {})
    for name in ("samples", "labels", "truth"):
        if not callable(getattr(module, name, None)):
            raise EvaluationError(
                f"{file} has no function '{name}', which a benchmark needs; add it"
            )
    _check_params(file, module.samples, params or {})
    return Benchmark(
        file=file,
        sha256=digest,
        samples=module.samples,
        labels=module.labels,
        truth=module.truth,
        prompt=getattr(module, "prompt", _own_prompt),
        task=getattr(module, "task", _emotion),
        score=getattr(module, "score", None),
        params=dict(params or {}),
        readings=tuple(getattr(module, "readings", ())),
    )


def _declared(
    file: str, digest: str, tasks: Mapping[str, Task], params: Mapping[str, Any]
) -> Benchmark:
    """The benchmark of a file with ``TASKS``."""
    if params:
        raise ConfigError(
            f"'benchmark.params': {file} takes none; options of its data go to --option KEY=VALUE"
        )
    if not tasks:
        raise EvaluationError(f"{file}: TASKS is empty; declare a task")

    def samples(data: DataConfig) -> Selected:
        return Selected(*samples_of(tasks, data))

    def labels(sample: Sample) -> LabelSet | None:
        return labels_of(sample, tasks[task_of(sample, tasks)])

    def truth(sample: Sample) -> Any:
        return truth_of(sample, tasks[task_of(sample, tasks)])

    return Benchmark(
        file=file,
        sha256=digest,
        samples=samples,
        labels=labels,
        truth=truth,
        prompt=_own_prompt,
        task=lambda sample: task_of(sample, tasks),
        score=None,
        tasks=tasks,
    )


def _check_params(file: str, samples: Callable[..., Any], params: Mapping[str, Any]) -> None:
    # The first parameter is the data config, which params cannot set.
    own = list(inspect.signature(samples).parameters.values())[1:]
    if any(one.kind is one.VAR_KEYWORD for one in own):
        return
    known = [one.name for one in own]
    for name in params:
        if name not in known:
            guess = nearest(name, known)
            hint = (
                f"its parameters are {', '.join(known)}" if known else "it has none, so remove it"
            )
            hint = f"did you mean '{guess}'?" if guess else hint
            raise ConfigError(f"'benchmark.params': {file} has no parameter '{name}'; {hint}")


def validate(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Check on every question with labels that the right answer scores 1, and that an empty answer
    and one that names all labels are malformed and score 0.

    Raises:
        EvaluationError: the check fails; the message names the first sample.
    """
    for question in questions:
        if question.labels is None:
            continue
        # The reasoning names every label, none of which may count as the answer.
        everything = ", ".join(question.labels.labels)
        trials = (
            (question.truth, "ok", 1.0),
            ("", "malformed", 0.0),
            (everything, "malformed", 0.0),
        )
        for answer, status, score in trials:
            parsed = parse(f"<think>{everything}</think><answer>{answer}</answer>", question.labels)
            got = benchmark.grade(question, parsed)
            if parsed.status != status or got != score:
                raise EvaluationError(
                    f"{benchmark.file}: {question.sample.sample_id}: the answer '{answer}' is "
                    f"{parsed.status} and scores {got:g}, not {status} and {score:g}; "
                    "fix the benchmark's labels or score function"
                )


def tell_excluded(selected: Selected) -> None:
    """Print how many rows are left out for each reason, with an example."""
    for reason, count in selected.reasons.items():
        first = next(row for row in selected.excluded if row.reason == reason)
        example = f"{first.row}: {first.detail}" if first.detail else first.row
        told = f"{counted(count, 'row')} left out ({reason}):"
        console.print(Text.assemble((told, "yellow"), f" {example}"))


def _own_prompt(sample: Sample) -> tuple[Turn, ...]:
    return sample.prompt


def _emotion(sample: Sample) -> str:
    return "emotion"
