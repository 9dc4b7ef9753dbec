"""Benchmarks of a release's folder without a model: what is asked, and what given answers score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import parse, parse_open
from mmemo.data.adapter import AdaptedManifest, Excluded, write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Benchmark, Question, load_benchmark, validate
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import adapter_of, columns_of_adapter
from mmemo.statistics import BootstrapConfig


@dataclass(frozen=True)
class Asked:
    """The questions of a benchmark about one folder, and what the adapter left out."""

    benchmark: Benchmark
    made: AdaptedManifest
    questions: Sequence[Question]

    @property
    def excluded(self) -> dict[str, Excluded]:
        return {one.row: one for one in self.made.excluded}

    def by_id(self) -> dict[str, Question]:
        return {one.sample.sample_id: one for one in self.questions}

    def rows(self, answer: Callable[[Question], str] | Mapping[str, str]) -> list[dict[str, Any]]:
        """The rows of ``predictions.jsonl`` for the texts that are answered, by id or question."""
        rows: list[dict[str, Any]] = []
        for one in self.questions:
            text = answer(one) if callable(answer) else answer[one.sample.sample_id]
            rows.append({**one.row(), "raw": text, **read(one, text)})
        return rows

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The blocks of the tasks, with ``official`` as an evaluation adds it."""
        own, benchmark = [dict(row) for row in rows], self.benchmark
        config = BootstrapConfig(resamples=100)
        blocks = score_rows(own, config, benchmark.specs(), benchmark.slices())
        for name, block in blocks.items():
            official = benchmark.tasks[name].official
            if official is not None:
                block["official"] = official([row for row in own if row["task"] == name])
        return blocks


def read(question: Question, text: str) -> dict[str, Any]:
    """How an evaluation reads the text of an answer."""
    if question.kind is not None:
        found = question.kind.read(text)
        return {"status": found.status, "answer": found.answer, "score": None}
    if question.labels is None:
        return {"status": parse_open(text).status, "answer": None, "score": None}
    parsed = parse(text, question.labels)
    right = float(parsed.label == question.truth)
    return {"status": parsed.status, "answer": parsed.label, "score": right}


def ask(file: str, root: Path, **options: str) -> Asked:
    """Read a release's folder and ask."""
    manifest = root.parent / "manifest.jsonl"
    adapter = adapter_of(file)
    made = write_manifest(adapter, root, manifest, options)
    benchmark = load_benchmark(file)
    columns = columns_of_adapter(adapter)
    data = DataConfig(manifests=[str(manifest)], media_root=str(root), columns=columns)
    questions = benchmark.questions(data)
    validate(benchmark, questions)
    return Asked(benchmark, made, questions)
