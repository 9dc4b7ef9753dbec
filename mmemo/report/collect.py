"""Collects the contents of a finished run folder for the report and the terminal table.

A run folder has one folder per stage, ``events.jsonl`` and, if a pipeline made it, ``state.json``.
Evaluations are the folders with a ``results.json``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmemo.errors import EvaluationError
from mmemo.evaluation.results import (
    RESULTS,
    EvalResult,
    EvaluatedRun,
    evaluated_runs,
    read_results,
)
from mmemo.report.grpo import GrpoLog, read_grpo
from mmemo.rewards.judge.calibration import read_headline
from mmemo.run_log import read_events
from mmemo.stages import recorded, trains


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run. ``kind`` names it in the registry of stages, and is empty where that is
    unknown. ``losses`` maps a split to its (step, loss) points. ``grpo``: the log of a stage that
    learns from rewards. ``trained_on``: the config of every training run in the folder, which is
    empty where the config is unknown."""

    name: str
    kind: str
    folder: Path
    status: str
    seconds: float | None
    config: Mapping[str, Any]
    losses: Mapping[str, Sequence[tuple[float, float]]]
    bad: Sequence[Mapping[str, Any]]
    grpo: GrpoLog | None = None
    trained_on: Sequence[Mapping[str, Any]] = ()
    calibration: str = ""
    """Of a reward model: whether it reads the facts."""


@dataclass(frozen=True, slots=True)
class ManifestCounts:
    """What one manifest contains."""

    name: str
    rows: int
    clips: int
    speakers: frozenset[str]
    tiers: Mapping[str, int]
    conflicts: Mapping[str, int]
    used_by: Sequence[str]
    unnamed: int = 0
    """Rows that name no speaker."""


@dataclass(frozen=True, slots=True)
class Overview:
    """``runs``: models, then baselines, then the majority answer. ``bad`` maps the name of a stage
    or evaluation to the clips that it left out. ``held_out``: all rows that the model was
    trained on are known, and name no speaker of the evaluation's."""

    folder: Path
    stages: Sequence[Stage]
    runs: Sequence[EvaluatedRun]
    manifests: Sequence[ManifestCounts]
    bad: Mapping[str, Sequence[Mapping[str, Any]]]
    held_out: bool
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def main(self) -> EvalResult:
        """The first model's evaluation."""
        return self.results[0]

    @property
    def results(self) -> list[EvalResult]:
        """The evaluations, that of the first model first."""
        return [run.result for run in self.runs if run.result is not None]


def read_run(folder: Path, evaluations: Sequence[Path] = ()) -> Overview:
    """Read a run folder. ``evaluations`` names the evaluation folders to show, by default all.

    Raises:
        EvaluationError: nothing in the folder has been evaluated.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: is not a folder; give the output folder of a run")
    stages = read_stages(folder)
    found = list(evaluations) or _evaluations(folder, stages)
    if not found:
        raise EvaluationError(
            f"{folder}: contains no evaluation; run `mmemo eval` with an output_dir in it first"
        )
    # A stable sort, which keeps the order of the models and of the baselines.
    results = sorted((read_results(path) for path in found), key=lambda r: r.role != "model")
    bad = {stage.name: stage.bad for stage in stages}
    bad |= {r.folder.name: _bad_clips(r.folder) for r in results if r.folder.name not in bad}
    return Overview(
        folder=folder,
        stages=stages,
        runs=evaluated_runs(results),
        manifests=_manifests(stages, results),
        bad={name: clips for name, clips in bad.items() if clips},
        held_out=_held_out(stages, results[0]),
        versions=results[0].made.get("versions", {}),
    )


def read_stages(folder: Path) -> list[Stage]:
    """The stages in the order in which they ran."""
    state: dict[str, dict[str, Any]] = {}
    if (folder / "state.json").exists():
        state = _read_state(folder / "state.json")
    # A stage that was run by hand has no entry. Whom it was trained on counts all the same.
    state |= {path.name: {} for path in _by_start(folder) if path.name not in state}
    started: dict[str, list[Mapping[str, Any]]] = {}
    for event in read_events(folder / "events.jsonl"):
        name = str(event.get("stage"))
        # The folder that these configs made has been moved away, so they trained nothing that is
        # here.
        if event.get("kind") == "stage_replaced":
            started.pop(name, None)
        if event.get("kind") == "stage_started":
            started.setdefault(name, []).append(event.get("config") or {})
    return [_stage(folder / name, entry, started.get(name, [])) for name, entry in state.items()]


def _stage(folder: Path, entry: Mapping[str, Any], started: Sequence[Mapping[str, Any]]) -> Stage:
    """``entry``: what a pipeline noted. ``started``: the configs with which it ran the stage."""
    by_hand = _own_runs(folder)
    # State files of older versions say "verb" in place of "stage".
    kind = str(entry.get("stage") or entry.get("verb") or "")
    kind = kind or (by_hand[-1][0] if by_hand else _kind_by_traces(folder))
    runs = [*((kind, config) for config in started), *by_hand]
    # An empty config stands for a training run that is not recorded, of which nothing can be
    # claimed.
    if trains(kind) and not any(trains(name) for name, _ in runs):
        runs.append((kind, {}))
    configs = [*(config for _, config in by_hand), *started]
    return Stage(
        name=folder.name,
        kind=kind,
        folder=folder,
        status=str(entry.get("status", "")),
        seconds=entry.get("seconds"),
        config=configs[-1] if configs else {},
        losses=read_losses(folder / "metrics.jsonl"),
        bad=_bad_clips(folder),
        grpo=read_grpo(folder),
        trained_on=[config for name, config in runs if trains(name)],
        calibration=read_headline(folder),
    )


def _own_runs(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Stage and config of each run that the folder's own record names, in order."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for event in read_events(folder / "events.jsonl"):
        config: Any = event.get("config")
        name = str(event.get("stage") if event.get("kind") == "stage" else event.get("kind"))
        if isinstance(config, Mapping) and (event.get("kind") == "stage" or recorded(name)):
            found.append((name, config))  # pyright: ignore[reportUnknownArgumentType]
    return found


def _kind_by_traces(folder: Path) -> str:
    """What made a folder whose record does not say it, as in older versions; empty if unknown."""
    kinds = {str(event.get("kind")) for event in read_events(folder / "events.jsonl")}
    if (folder / RESULTS).exists() or "benchmark" in kinds:
        return "eval"
    if "manifests" in kinds:
        return "pairs"
    return "encode" if kinds and kinds <= {"ingest", "bad_clip"} else ""


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    """The state that a pipeline recorded for each of its stages.

    Raises:
        EvaluationError: the file is damaged.
    """
    try:
        stages: Any = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {str(name): dict(entry) for name, entry in stages.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path}: is damaged; delete it and build the report without it (a pipeline would "
            "then run every stage again)"
        ) from error


def _by_start(folder: Path) -> list[Path]:
    """Subfolders with a record, the earliest first."""
    found: list[tuple[float, Path]] = []
    for path in sorted(folder.glob("*/events.jsonl")):
        first = next(read_events(path), None)
        if first is not None:
            found.append((float(first.get("time", 0.0)), path.parent))
    return [path for _, path in sorted(found)]


def read_losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Training and validation loss by step of a training stage.

    A step that was repeated after a kill counts once. A line that has both losses only repeats the
    last validation loss, so it is not taken for a new validation.
    """
    points: dict[str, dict[float, float]] = {}
    for event in read_events(path):
        step: Any = event.get("step")
        for key, split in (("loss", "training"), ("eval_loss", "validation")):
            loss: Any = event.get(key)
            if split == "validation" and "loss" in event:
                continue
            numbers = isinstance(step, int | float) and isinstance(loss, int | float)
            if numbers and math.isfinite(loss):
                points.setdefault(split, {})[step] = float(loss)
    return {split: sorted(by_step.items()) for split, by_step in points.items()}


def _bad_clips(folder: Path) -> list[Mapping[str, Any]]:
    """Path, reason and detail of the clips that a stage left out, from ``bad_clips.jsonl`` and from
    its event log."""
    listed = [{**row, "reason": row.get("kind")} for row in read_events(folder / "bad_clips.jsonl")]
    noted = [e for e in read_events(folder / "events.jsonl") if e.get("kind") == "bad_clip"]
    found: dict[str, Mapping[str, Any]] = {}
    for clip in (*noted, *listed):
        named = {key: str(clip.get(key) or "unknown") for key in ("path", "reason", "detail")}
        found[named["path"]] = named
    return list(found.values())


def _evaluations(folder: Path, stages: Sequence[Stage]) -> list[Path]:
    if (folder / RESULTS).exists():
        return [folder]
    ordered = [stage.folder for stage in stages]
    others = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    names = dict.fromkeys([*ordered, *others])
    return [path for path in names if (path / RESULTS).exists()]


def _manifests(stages: Sequence[Stage], results: Sequence[EvalResult]) -> list[ManifestCounts]:
    used: dict[str, list[str]] = {}
    for stage in stages:
        for name in _manifest_names(stage.config):
            used.setdefault(name, []).append(stage.name)
    for result in results:
        for name in result.made.get("data", {}).get("manifests", []):
            used.setdefault(name, []).append(result.folder.name)
    counts = [count_manifest(Path(name), list(dict.fromkeys(by))) for name, by in used.items()]
    return [found for found in counts if found is not None]


def _held_out(stages: Sequence[Stage], main: EvalResult) -> bool:
    """Whether the evaluation's speakers are known to occur in no row that the model or a part of it
    was trained on. Rows, speakers or configs that are not known make it False."""
    task = next(iter(main.tasks))
    ours = {row["group"].get(main.bootstrap.cluster) for row in main.rows(task)}
    if None in ours or main.bootstrap.cluster != "speaker":
        return False
    names: set[str] = set()
    for config in _training_runs(stages, main):
        used = _manifest_names({k: v for k, v in config.items() if k not in _NOT_TRAINED_ON})
        if not used:
            return False
        names |= set(used)
    counts = [count_manifest(Path(name), ()) for name in names]
    if not counts or any(one is None or one.unnamed or not one.speakers for one in counts):
        return False
    return not any(ours & one.speakers for one in counts if one is not None)


_NOT_TRAINED_ON = ("eval_data", "test_data")


def _training_runs(stages: Sequence[Stage], main: EvalResult) -> list[Mapping[str, Any]]:
    """Configs of the training runs in this folder, and of those elsewhere that made the evaluated
    model or a part of it. An empty one stands for a run whose config is not known."""
    found = [config for stage in stages for config in stage.trained_on]
    visited = {stage.folder.resolve() for stage in stages}
    starts: list[Any] = [main.made.get("model"), *(config.get("model") for config in found)]
    while starts:
        for name in _texts(starts.pop()):
            path = Path(name)
            if visited & {path.resolve(), path.resolve().parent}:
                continue
            folder = next((p for p in (path, path.parent) if (p / "events.jsonl").exists()), None)
            if folder is None:
                found += [{}] if path.name == "final" and not path.exists() else []  # it is gone
                continue
            visited.add(folder.resolve())
            elsewhere = _stage(folder, {}, [])
            found += elsewhere.trained_on
            starts += [config.get("model") for config in elsewhere.trained_on]
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts: Any = value.values() if isinstance(value, Mapping) else ()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return [text for part in parts for text in _texts(part)]


def _manifest_names(value: Any) -> list[str]:
    """All ``manifests`` lists anywhere in a stage's config."""
    if isinstance(value, Mapping):
        own: Any = value.get("manifests", [])  # pyright: ignore[reportUnknownMemberType]
        inner: list[str] = [
            name
            for key, part in value.items()  # pyright: ignore[reportUnknownVariableType]
            if key != "manifests"
            for name in _manifest_names(part)
        ]
        return [*map(str, own), *inner]
    return []


def count_manifest(path: Path, used_by: Sequence[str]) -> ManifestCounts | None:
    """Counts of a JSONL manifest; None if it has another format or no longer exists."""
    if path.suffix != ".jsonl" or not path.exists():
        return None
    rows = list(read_events(path))
    clips = {
        str(media) for row in rows for key in ("videos", "audios") for media in row.get(key, [])
    }
    groups = [row["group"] for row in rows if row.get("group")]
    speakers = frozenset(str(group["speaker"]) for group in groups if "speaker" in group)
    return ManifestCounts(
        name=path.name,
        rows=len(rows),
        clips=len(clips),
        speakers=speakers,
        tiers=dict(Counter(str(row["tier"]) for row in rows if row.get("tier"))),
        conflicts=dict(Counter(str(row["conflict"]) for row in rows if row.get("conflict"))),
        used_by=used_by,
        unnamed=sum("speaker" not in (row.get("group") or {}) for row in rows),
    )
