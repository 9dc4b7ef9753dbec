"""``--dry-run`` of a benchmark: checks a user's copy of a release without a model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from mmemo import content
from mmemo.config import apply_overrides, parse
from mmemo.console import console, progress
from mmemo.data.adapter import Excluded, run_manifest
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.evaluation.benchmark import load_benchmark, tell_excluded, validate
from mmemo.evaluation.script import adapter_of
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


def check_copy(
    benchmark: str,
    data: Sequence[str],
    options: Mapping[str, str],
    media_root: str | None = None,
) -> CopyReport:
    """Make the manifest, ask nothing, open every clip, and print what is wrong. ``media_root`` is
    only for a benchmark that reads the release's files itself.

    Raises:
        ConfigError, DataError, EvaluationError: nothing can be asked about these data.
    """
    module = content.load_module(benchmark)
    if hasattr(module, "samples"):
        return _check_manifests(benchmark, data, options, media_root)
    if len(data) != 1 or not Path(data[0]).is_dir():
        raise ConfigError("--dry-run checks one folder of a release; give it after --data")
    root = Path(data[0])
    adapter = content.load_module(adapter_of(benchmark))
    if hasattr(adapter, "counts"):
        counted_rows: Mapping[str, int] = adapter.counts(root)
        for name, number in counted_rows.items():
            console.print(f"  {name}: {number}")
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "benchmark.jsonl"
        made = run_manifest(adapter_of(benchmark), root, manifest, options)
        write_excluded(manifest, made.excluded)
        loaded = load_benchmark(benchmark)
        config = DataConfig(manifests=[str(manifest)], media_root=str(root))
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


def _check_manifests(
    benchmark: str, data: Sequence[str], options: Mapping[str, str], media_root: str | None
) -> CopyReport:
    """:func:`check_copy` of a benchmark that reads the release's files itself."""
    module = content.load_module(benchmark)
    find_data = getattr(module, "find_data", None)
    values: Mapping[str, Any] = find_data(data) if find_data else {"manifests": list(data)}
    values = {**getattr(module, "DEFAULTS", {}).get("data", {}), **values}
    if media_root is not None:
        values["media_root"] = media_root
    config = parse(DataConfig, values)
    params = apply_overrides({}, [f"--params.{key}={value}" for key, value in options.items()])
    loaded = load_benchmark(benchmark, params.get("params"))
    selected = loaded.select(config)
    questions = loaded.ask(selected, config)
    validate(loaded, questions)
    tell_excluded(selected)
    root = Path(config.media_root)
    samples = [question.sample for question in questions]
    paths = dict.fromkeys(ref.path for sample in samples for ref in sample.media.values())
    missing = tuple(path for path in paths if not (root / path).is_file())
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        console.print(
            f"{counted(len(missing), 'clip')} missing: {', '.join(missing[:_SHOWN])}{more}"
        )
    there = [s for s in samples if not any(ref.path in missing for ref in s.media.values())]
    silent, blind, broken = _clips(root, there)
    excluded = tuple(selected.excluded)
    report = CopyReport(len(questions), missing, excluded, silent, blind, broken, ())
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
