"""Asks the benchmarks of texts about a folder, and answers with given texts, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import parse
from mmemo.data.adapter import AdaptedManifest, write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Benchmark, Question, load_benchmark, validate
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import adapter_of
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=100)


class Asked:
    """A benchmark's questions about a release's folder."""

    def __init__(self, name: str, root: Path, **options: str) -> None:
        file = f"eval/texts/{name}.py"
        manifest = root.parent / f"{name}.jsonl"
        self.made: AdaptedManifest = write_manifest(adapter_of(file), root, manifest, options)
        self.benchmark: Benchmark = load_benchmark(file)
        config = DataConfig(manifests=[str(manifest)], media_root=str(root))
        self.questions: list[Question] = self.benchmark.questions(config)
        validate(self.benchmark, self.questions)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Reason and details of the rows that the adapter leaves out."""
        return [(one.reason, one.detail) for one in self.made.excluded]

    def of(self, task: str) -> list[Question]:
        """The questions of a task."""
        return [one for one in self.questions if one.task == task]

    def rows(self, task: str, answers: Sequence[str] | Callable[[Question], str]) -> list[Any]:
        """The rows of ``predictions.jsonl`` for some answers."""
        found: list[Any] = []
        for place, one in enumerate(self.of(task)):
            text = answers(one) if callable(answers) else answers[place]
            if one.kind is not None:
                read = one.kind.read(text)
                status, answer = read.status, read.answer
            else:
                assert one.labels is not None
                parsed = parse(text, one.labels)
                status, answer = parsed.status, parsed.label
            score = float(answer == one.truth)
            found.append(
                {**one.row(), "raw": text, "status": status, "answer": answer, "score": score}
            )
        return found

    def score(self, task: str, answers: Sequence[str] | Callable[[Question], str]) -> Any:
        """The block of a task in ``results.json``."""
        return score_rows(self.rows(task, answers), CONFIG, self.benchmark.specs())[task]

    def official(self, task: str, answers: Sequence[str]) -> Any:
        """The official reading of some answers."""
        official = self.benchmark.tasks[task].official
        assert official is not None
        return official(self.rows(task, answers))
