"""A benchmark is a content file; this is what the engine asks of it.

The file must define

- ``samples(data: DataConfig) -> list[Sample]``: the questions, in the order they are answered;
- ``labels(sample) -> LabelSet``: what an answer may name;
- ``truth(sample) -> str``: the right label.

and may define ``prompt(sample) -> tuple[Turn, ...]`` (default: the sample's turns before its
answer), ``task(sample) -> str`` (default "emotion"; each task is scored by itself, the first one
is the headline) and ``score(sample, parsed) -> float`` (default: 1 for the right label, else 0).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmemo import content
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample, Turn
from mmemo.errors import EvaluationError
from mmemo.evaluation.parsing import LabelSet, Parsed, parse


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it will be asked and scored."""

    sample: Sample
    turns: tuple[Turn, ...]
    task: str
    labels: LabelSet
    truth: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The functions of a content file, and what names them in a record."""

    file: str
    sha256: str
    samples: Callable[[DataConfig], list[Sample]]
    labels: Callable[[Sample], LabelSet]
    truth: Callable[[Sample], str]
    prompt: Callable[[Sample], tuple[Turn, ...]]
    task: Callable[[Sample], str]
    score: Callable[[Sample, Parsed], float] | None

    def question(self, sample: Sample) -> Question:
        """Raises EvaluationError when the truth is not among the labels."""
        labels, truth = self.labels(sample), self.truth(sample)
        if truth not in labels.labels:
            raise EvaluationError(
                f"{self.file}: the truth '{truth}' of {sample.sample_id} is not one of its labels "
                f"({', '.join(labels.labels)}); fix the manifest or the benchmark's labels"
            )
        return Question(sample, self.prompt(sample), self.task(sample), labels, truth)

    def questions(self, data: DataConfig) -> list[Question]:
        """All questions. Raises EvaluationError when there is none or an id comes twice."""
        questions = [self.question(sample) for sample in self.samples(data)]
        if not questions:
            raise EvaluationError(f"{self.file}: no questions in {', '.join(data.manifests)}")
        seen: set[str] = set()
        for question in questions:
            name = question.sample.sample_id
            if name in seen:
                raise EvaluationError(
                    f"{self.file}: sample_id '{name}' comes twice; make it unique"
                )
            seen.add(name)
        return questions

    def mark(self, question: Question, parsed: Parsed) -> float:
        """The score of a parsed answer, 0 to 1."""
        if self.score is not None:
            return float(self.score(question.sample, parsed))
        return float(parsed.label == question.truth)


def load_benchmark(file: str) -> Benchmark:
    """Load the content file ``file``, again where it was edited since.

    Raises:
        ConfigError: the file is not there. EvaluationError: a function is missing.
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
    return Benchmark(
        file=file,
        sha256=digest,
        samples=module.samples,
        labels=module.labels,
        truth=module.truth,
        prompt=getattr(module, "prompt", _own_prompt),
        task=getattr(module, "task", _emotion),
        score=getattr(module, "score", None),
    )


def validate(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Prove on every question that the right answer scores 1, an empty one 0, and that naming
    all labels is malformed and scores 0.

    Raises:
        EvaluationError: names the first sample for which this fails.
    """
    for question in questions:
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


def _own_prompt(sample: Sample) -> tuple[Turn, ...]:
    return sample.prompt


def _emotion(sample: Sample) -> str:
    return "emotion"
