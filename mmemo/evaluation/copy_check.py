"""``--dry-run`` of a benchmark: checks a user's copy of a release without a model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from mmemo.console import console, progress
from mmemo.data.adapter import Excluded, run_manifest
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.evaluation.benchmark import load_benchmark, validate
from mmemo.evaluation.script import adapter_of, columns_of_adapter, options_of
from mmemo.evaluation.task import write_excluded
from mmemo.formats import counted
from mmemo.media.probe import probe

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a dry run found. ``silent`` and ``blind`` are clips without sound or picture, ``broken``
    clips that cannot be opened; ``ok``: nothing is missing, broken or unlike the published counts,
    and nothing is left out that is not left out of every copy."""

    questions: int
    missing: tuple[str, ...]
    excluded: tuple[Excluded, ...]
    silent: tuple[str, ...]
    blind: tuple[str, ...]
    broken: tuple[str, ...]
    unlike: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether this copy is whole."""
        left_out = [one for one in self.excluded if not one.expected]
        return not any((self.missing, left_out, self.silent, self.blind, self.broken, self.unlike))


def check_copy(benchmark: str, data: Sequence[str], options: Mapping[str, str]) -> CopyReport:
    """Make the manifest, ask nothing, open every clip, and print what is wrong.

    Raises:
        ConfigError, DataError, EvaluationError: nothing can be asked about these data.
    """
    if len(data) != 1 or not Path(data[0]).is_dir():
        raise ConfigError("--dry-run checks one folder of a release; give it after --data")
    root = Path(data[0])
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "benchmark.jsonl"
        adapter = adapter_of(benchmark)
        made = run_manifest(adapter, root, manifest, options_of(benchmark, options))
        write_excluded(manifest, made.excluded)
        loaded = load_benchmark(benchmark)
        config = DataConfig(
            manifests=[str(manifest)], media_root=str(root), columns=columns_of_adapter(adapter)
        )
        questions = loaded.questions(config)
        validate(loaded, questions)
    silent, blind, broken = _clips(root, [question.sample for question in questions])
    report = CopyReport(
        questions=len(questions),
        missing=made.missing,
        excluded=made.excluded,
        silent=silent,
        blind=blind,
        broken=broken,
        unlike=tuple(made.unlike_published()),
    )
    _tell(report, Counter(question.task for question in questions))
    return report


def _clips(root: Path, samples: Sequence[Sample]) -> tuple[tuple[str, ...], ...]:
    """The files whose rows need sound, or picture, that they do not have; and the broken ones."""
    needs: dict[str, set[Modality]] = {}
    for sample in samples:
        for modality, ref in sample.media.items():
            needs.setdefault(ref.path, set()).add(modality)
    silent: list[str] = []
    blind: list[str] = []
    broken: list[str] = []
    with progress("clips", len(needs), unit="clips") as bar:
        for path, modalities in needs.items():
            try:
                found = probe(root / path, path)
            except MediaError as error:
                broken.append(f"{path} ({error})")
            else:
                if "audio" in modalities and found.audio is None:
                    silent.append(path)
                if modalities - {"audio"} and found.video is None:
                    blind.append(path)
            bar.advance(1)
    return tuple(silent), tuple(blind), tuple(broken)


def _tell(report: CopyReport, tasks: Mapping[str, int]) -> None:
    for name, number in tasks.items():
        console.print(f"  {name}: {counted(number, 'question')}")
    lists = {
        "without sound": report.silent,
        "without a picture": report.blind,
        "that cannot be opened": report.broken,
    }
    for what, listed in lists.items():
        if listed:
            more = ", ..." if len(listed) > _SHOWN else ""
            told = f"{counted(len(listed), 'clip')} {what}:"
            shown = f" {', '.join(listed[:_SHOWN])}{more}"
            console.print(Text.assemble((told, "yellow"), shown), soft_wrap=True)
    verdict = "This copy is whole." if report.ok else "This copy is not whole; see above."
    console.print(verdict, style="bold")
