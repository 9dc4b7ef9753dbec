"""A benchmark is a content file; this is what the engine asks of it.

The file must define

- ``samples(data: DataConfig, **params)``: the questions, in the order they are answered, as a list
  of samples, or as :class:`Selected`, which also says what rows are no questions, and why;
- ``labels(sample) -> LabelSet | None``: what an answer may name; None where it may name any words;
- ``truth(sample) -> str``: the right label, or the right words.

and may define ``prompt(sample) -> tuple[Turn, ...]`` (default: the sample's turns before its
answer), ``task(sample) -> str`` (default "emotion"; each task is scored by itself, the first one
is the headline), ``score(sample, parsed) -> float`` (default: 1 for the right label, else 0), and
``readings``, a sequence of :class:`Reading`: then the headline is the mean over the tasks, once for
each way to read the answers.

A question without labels is open: only the evaluation's ``scores`` say how good its answer is, so
it has no accuracy that could be taken for another task's.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmemo import content
from mmemo.answers.parsing import LabelSet, Parsed, normalise, parse
from mmemo.config import nearest
from mmemo.console import console
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.formats import counted

_PLACEHOLDERS = re.compile(r"<(?:video|audio|face)>")


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it will be asked and scored. ``labels`` is None where it is open."""

    sample: Sample
    turns: tuple[Turn, ...]
    task: str
    labels: LabelSet | None
    truth: str

    @property
    def modality_labels(self) -> dict[str, str]:
        """The labels of voice (``audio``), face (``video``) and words (``text``), as far as they
        are known, spelt as the benchmark's labels where they are among them."""
        known = dict(self.sample.truth.modality_labels)
        if self.labels is None:
            return known
        exact = self.labels.exact
        return {name: exact(normalise(label)) or label for name, label in known.items()}

    def row(self) -> Row:
        """The part of its line in ``predictions.jsonl`` that is known before the answer."""
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
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """A way to read the answers of a benchmark with several tasks, and to count them.

    ``parser`` says in words how it reads. ``missing`` is what becomes of a question that got no
    answer, because its clip is bad. ``read`` is None where answers are read as always.
    """

    name: str
    parser: str
    missing: Literal["wrong", "skipped"]
    read: Callable[[str, Question], Parsed] | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that is no question: what it is called, a short name to count by, and the details."""

    row: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Selected:
    """What a benchmark makes of its data."""

    samples: list[Sample]
    excluded: list[Excluded] = field(default_factory=list[Excluded])

    @property
    def reasons(self) -> dict[str, int]:
        """Excluded rows by reason."""
        return dict(sorted(Counter(row.reason for row in self.excluded).items()))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The functions of a content file, and what names them in a record."""

    file: str
    sha256: str
    samples: Callable[..., list[Sample] | Selected]
    labels: Callable[[Sample], LabelSet | None]
    truth: Callable[[Sample], str]
    prompt: Callable[[Sample], tuple[Turn, ...]]
    task: Callable[[Sample], str]
    score: Callable[[Sample, Parsed], float] | None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    readings: tuple[Reading, ...] = ()

    def question(self, sample: Sample) -> Question:
        """Raises EvaluationError when the truth is not among the labels."""
        labels, truth = self.labels(sample), self.truth(sample)
        if labels is not None and truth not in labels.labels:
            raise EvaluationError(
                f"{self.file}: the truth '{truth}' of {sample.sample_id} is not one of its labels "
                f"({', '.join(labels.labels)}); fix the manifest or the benchmark's labels"
            )
        return Question(sample, self.prompt(sample), self.task(sample), labels, truth)

    def select(self, data: DataConfig) -> Selected:
        """The samples, and the rows that are no questions."""
        found = self.samples(data, **self.params)
        return found if isinstance(found, Selected) else Selected(found)

    def questions(self, data: DataConfig) -> list[Question]:
        """All questions; see :meth:`ask`."""
        return self.ask(self.select(data), data)

    def ask(self, selected: Selected, data: DataConfig) -> list[Question]:
        """The questions of the selected samples.

        Raises:
            EvaluationError: there is none, an id comes twice, or the first question is open.
        """
        questions = [self.question(sample) for sample in selected.samples]
        if not questions:
            why = ", ".join(f"{n} {reason}" for reason, n in selected.reasons.items())
            left = f" (rows left out: {why})" if why else ""
            raise EvaluationError(f"{self.file}: no questions in {', '.join(data.manifests)}{left}")
        seen: set[str] = set()
        for question in questions:
            name = question.sample.sample_id
            if name in seen:
                raise EvaluationError(
                    f"{self.file}: sample_id '{name}' comes twice; make it unique"
                )
            seen.add(name)
        if questions[0].labels is None:
            raise EvaluationError(
                f"{self.file}: its first question is open, but the first task is the headline and "
                "needs labels; put a task with labels first"
            )
        return questions

    def mark(self, question: Question, parsed: Parsed) -> float:
        """The score of a parsed answer, 0 to 1."""
        if self.score is not None:
            return float(self.score(question.sample, parsed))
        return float(parsed.label == question.truth)


def load_benchmark(file: str, params: Mapping[str, Any] | None = None) -> Benchmark:
    """Load the content file ``file``, again where it was edited since.

    ``params`` are keyword arguments for its ``samples``.

    Raises:
        ConfigError: the file is not there, or ``samples`` does not know a parameter.
        EvaluationError: a function is missing.
    """
    module: Any = content.load_module(file)
    digest = content.sha256(content.find(file))
    if vars(module).setdefault("_loaded_sha256", digest) != digest:
        del sys.modules[module.__name__]
        module = content.load_module(file)
        module._loaded_sha256 = digest
    for name in ("samples", "labels", "truth"):
        if not callable(getattr(module, name, None)):
            raise EvaluationError(f"{file} has no function '{name}'; a benchmark needs it")
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


def _check_params(file: str, samples: Callable[..., Any], params: Mapping[str, Any]) -> None:
    listed = list(inspect.signature(samples).parameters.values())[1:]
    if any(one.kind is one.VAR_KEYWORD for one in listed):
        return
    known = [one.name for one in listed]
    for name in params:
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean '{guess}'?" if guess else f"it knows {', '.join(known) or 'none'}"
            raise ConfigError(f"'benchmark.params': {file} has no parameter '{name}'; {hint}")


def validate(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Prove on every question with labels that the right answer scores 1, an empty one 0, and that
    naming all labels is malformed and scores 0.

    Raises:
        EvaluationError: names the first sample for which this fails.
    """
    for question in questions:
        if question.labels is None:
            continue
        everything = ", ".join(question.labels.labels)
        trials = (
            (question.truth, "ok", 1.0),
            ("", "malformed", 0.0),
            (everything, "malformed", 0.0),
        )
        for answer, status, score in trials:
            parsed = parse(f"<think>{everything}</think><answer>{answer}</answer>", question.labels)
            got = benchmark.mark(question, parsed)
            if parsed.status != status or got != score:
                raise EvaluationError(
                    f"{benchmark.file}: {question.sample.sample_id}: the answer '{answer}' is "
                    f"{parsed.status} and scores {got:g}, not {status} and {score:g}; "
                    "fix the benchmark's labels or score"
                )


def tell_excluded(selected: Selected) -> None:
    """Print how many rows are no questions, by reason, with an example of each."""
    for reason, count in selected.reasons.items():
        first = next(row for row in selected.excluded if row.reason == reason)
        example = f"{first.row}: {first.detail}" if first.detail else first.row
        console.print(f"[yellow]{counted(count, 'row')} left out, {reason}:[/yellow] {example}")


def _own_prompt(sample: Sample) -> tuple[Turn, ...]:
    return sample.prompt


def _emotion(sample: Sample) -> str:
    return "emotion"
