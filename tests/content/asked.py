"""From a release's folder to questions, and from texts to scores, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import parse
from mmemo.data.adapter import write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Question, load_benchmark, validate
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import adapter_of
from mmemo.statistics import BootstrapConfig


def questions_of(file: str, root: Path, **options: str) -> list[Question]:
    """The questions of a benchmark about a release, after checking how they are scored."""
    manifest = root.parent / "benchmark.jsonl"
    write_manifest(adapter_of(file), root, manifest, options)
    benchmark = load_benchmark(file)
    questions = benchmark.questions(DataConfig(manifests=[str(manifest)], media_root=str(root)))
    validate(benchmark, questions)
    return questions


def answered(question: Question, raw: str) -> dict[str, Any]:
    """The row of an answer, read as an evaluation reads it."""
    if question.kind is not None:
        read = question.kind.read(raw)
        return {**question.row(), "status": read.status, "answer": read.answer, "score": None}
    assert question.labels is not None
    found = parse(raw, question.labels)
    score = float(found.label == question.truth)
    return {**question.row(), "status": found.status, "answer": found.label, "score": score}


def scored(file: str, questions: list[Question], say: Callable[[Question], str]) -> dict[str, Any]:
    """The numbers of each task, of what ``say`` answers."""
    rows = [answered(question, say(question)) for question in questions]
    return score_rows(rows, BootstrapConfig(resamples=100), load_benchmark(file).specs())
