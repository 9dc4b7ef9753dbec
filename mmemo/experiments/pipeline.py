"""Pipelines: stages that run in order, each in its own folder. Finished work is not repeated.

A stage is skipped if its config, the files and folders that the config names, and the stage's own
outputs are as they were when it finished; a setting that did not exist then does not count while it
has its default. A stage that was killed is started again in its folder
and resumes. A stage whose inputs changed starts afresh, and its old folder is moved to
``replaced/``. Only stages that keep each result with a key of its inputs (evaluations) continue in
their folder then, and keep the answers that the change does not affect.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from rich.text import Text

from mmemo import content, files, stages
from mmemo.config import Config, apply_overrides, dump, fill, parse, read_yaml, without_new
from mmemo.console import console
from mmemo.errors import ConfigError, MmemoError
from mmemo.experiments.run_stage import run_values
from mmemo.run_log import RunRecord
from mmemo.stages import Stage
from mmemo.train.nodes import nodes_of

HOW = ("run", "store", "workers")

Runner = Callable[[Stage, dict[str, Any]], None]
"""Runs one stage on plain config values."""


class StageConfig(Config):
    """One stage of a pipeline."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Name of the stage's folder, ``<output_dir>/<name>``."""
    stage: str
    """What kind of stage it is: ``sft``, or ``file.py:NAME`` for one of your own."""
    config: str | None = None
    """The stage's config file, relative to the pipeline file or the working directory."""
    overrides: list[str] = []
    """Overrides for that config, as on the command line without the dashes: ``train.seed=1``."""

    @model_validator(mode="before")
    @classmethod
    def _no_verb(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "verb" in values:
            raise ValueError("write stage: instead of verb:")
        return values  # pyright: ignore[reportUnknownVariableType]

    @field_validator("stage")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            stages.stage(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    @property
    def kind(self) -> Stage:
        """The registered stage."""
        return stages.stage(self.stage)


class PipelineConfig(Config):
    """Stages that run in order under one folder."""

    name: str
    output_dir: str
    """The folder of the run, ``${run}`` in the stages' configs."""
    seed: int = Field(default=0, ge=0)
    """The value of ``${seed}`` in the stages' configs."""
    stages: list[StageConfig] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [stage.name for stage in stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stage name '{twice[0]}' is used twice; rename one")
        return stages


def run_pipeline(
    path: Path,
    overrides: Iterable[str],
    *,
    only: str | None = None,
    run: Runner = run_values,
) -> Path:
    """Run the stages of the pipeline file at ``path`` in order and return its output folder.

    Every stage's config is validated before the first stage starts, so that a typo in the last
    one does not show after an hour.

    Args:
        only: name of the one stage to run; its inputs must be there.
        run: what runs a stage.

    Raises:
        ConfigError: a stage or its config is wrong.
        MmemoError: a stage failed, or another pipeline is running in the folder.
    """
    path = content.find(path)
    config, configs = read_pipeline(path, overrides)
    root = Path(config.output_dir)
    if only is not None and only not in configs:
        raise ConfigError(f"there is no stage '{only}'; stages: {', '.join(configs)}")
    root.mkdir(parents=True, exist_ok=True)
    with _leading() as here:
        if here:
            with locked(root):
                _run_stages(path, config, configs, root, only, run)
    return root


@contextmanager
def _leading() -> Generator[bool]:
    """Whether this node is to run the stages. On several nodes the first one does, and the others
    start their ranks whenever it does."""
    if nodes_of(os.environ).count == 1:
        yield True  # without importing torch
        return
    from mmemo.train.distributed import lead

    with lead() as here:
        yield here


def _run_stages(
    path: Path,
    config: PipelineConfig,
    configs: Mapping[str, Config],
    root: Path,
    only: str | None,
    run: Runner,
) -> None:
    record = RunRecord(root)
    record.event("pipeline", config=dump(config), file=str(path), sha256=content.sha256(path))
    state = PipelineState(root / "state.json")
    for number, stage in enumerate(config.stages, start=1):
        if only in (None, stage.name):
            title = f"[{number}/{len(config.stages)}] {stage.name}"
            _run_stage(stage, configs[stage.name], root, state, record, run, title)


def read_pipeline(path: Path, overrides: Iterable[str]) -> tuple[PipelineConfig, dict[str, Config]]:
    """A pipeline file, and each stage's validated config by name.

    Raises:
        ConfigError: a stage or its config is wrong.
    """
    path = content.find(path)
    given = apply_overrides(read_yaml(path, later=("run", "seed")), list(overrides))
    config = parse(PipelineConfig, given, where=str(path))
    configs: dict[str, Config] = {}
    for stage in config.stages:
        values = stage_values(stage, path, config)
        configs[stage.name] = parse(stage.kind.config_class, values, where=f"stage '{stage.name}'")
    return config, configs


def check_pipeline(path: Path, overrides: Iterable[str]) -> None:
    """Validate and list the stages' configs. Their data is not read: earlier stages may make it.

    Raises:
        ConfigError: a stage or its config is wrong.
    """
    pipeline, configs = read_pipeline(path, overrides)
    for stage in pipeline.stages:
        folder = dump(configs[stage.name])["output_dir"]
        console.print(f"{stage.name} ({stage.stage}): {folder}", soft_wrap=True)
    console.print(
        f"All {len(configs)} stages have valid configs. To check the data of a stage, run the "
        f"stages before it, then: mmemo check STAGE.yaml --run {pipeline.output_dir}"
    )


def stage_values(stage: StageConfig, pipeline: Path, config: PipelineConfig) -> dict[str, Any]:
    """A stage's plain config values, with ``${run}`` and ``${seed}`` replaced and ``output_dir``
    set."""
    return filled(stage, pipeline, {"run": config.output_dir, "seed": str(config.seed)})


def filled(stage: StageConfig, beside: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """A stage's plain config values; its config file is first looked up beside the file ``beside``.

    ``variables`` must hold ``run``, the folder in which the stage's own folder lies.
    """
    values: dict[str, Any] = {}
    if stage.config is not None:
        near = beside.parent / stage.config
        file = near if near.exists() else content.find(stage.config)
        values = read_yaml(file, variables)
    overrides = [fill(text, variables) for text in stage.overrides]
    values = apply_overrides(values, overrides)
    values["output_dir"] = str(Path(variables["run"]) / stage.name)
    return values


def is_finished(path: Path) -> bool:
    """True if running the pipeline file at ``path`` would find every stage done and unchanged."""
    config, configs = read_pipeline(path, [])
    root = Path(config.output_dir)
    state = PipelineState(root / "state.json")
    for stage in config.stages:
        folder, before = root / stage.name, state.get(stage.name)
        values = settings_known_to(before.get("config"), configs[stage.name])
        if not _is_done(before, inputs_fingerprint(stage.stage, values, folder), folder):
            return False
    return True


def _is_done(before: Mapping[str, Any], fingerprint: str, folder: Path) -> bool:
    same = before.get("fingerprint") == fingerprint and before.get("status") == "done"
    return same and outputs_intact(folder, before["outputs"])


def _run_stage(
    stage: StageConfig,
    config: Config,
    root: Path,
    state: PipelineState,
    record: RunRecord,
    run: Runner,
    title: str,
) -> None:
    folder, values = root / stage.name, dump(config)
    before = state.get(stage.name)
    known = settings_known_to(before.get("config"), config)
    fingerprint = inputs_fingerprint(stage.stage, known, folder)
    same_inputs = before.get("fingerprint") == fingerprint
    if not same_inputs and known != values:
        known, fingerprint = values, inputs_fingerprint(stage.stage, values, folder)
    if _is_done(before, fingerprint, folder):
        console.print(f"{title}: done before, nothing changed")
        record.event("stage_skipped", stage=stage.name, fingerprint=fingerprint)
        return
    unfinished = same_inputs and before.get("status") == "running"
    if folder.exists() and not unfinished and not _keeps_its_own(stage.kind, before, folder):
        aside = _set_aside(folder, root / "replaced")
        console.print(f"{title}: inputs or outputs changed; the old folder is now {aside}")
        record.event("stage_replaced", stage=stage.name, moved_to=str(aside))
    console.print(Text.assemble((title, "bold"), f" ({stage.stage})"))
    # Written before the work starts, so that a killed stage is known to be one that can resume.
    entry = {"status": "running", "fingerprint": fingerprint, "stage": stage.stage, "config": known}
    state.set(stage.name, entry)
    record.event("stage_started", stage=stage.name, fingerprint=fingerprint, config=values)
    started = time.monotonic()
    try:
        run(stage.kind, values)
    except MmemoError as error:
        # The state stays "running", so that the stage resumes when it is started again.
        record.event("stage_failed", stage=stage.name, error=str(error))
        raise
    seconds = round(time.monotonic() - started, 2)
    state.set(
        stage.name, {**entry, "status": "done", "seconds": seconds, "outputs": listing(folder)}
    )
    record.event("stage_done", stage=stage.name, seconds=seconds)
    console.print(f"{title}: done in {seconds:.0f} s")


def _keeps_its_own(stage: Stage, before: Mapping[str, Any], folder: Path) -> bool:
    """Whether a stage whose inputs changed may continue in its folder.

    An evaluation may: each answer there has a key of everything that it depends on, and is dropped
    if that changed. So another score or interval costs no answer. A folder that was changed by
    something other than the run is set aside all the same.
    """
    if not stage.keeps_answers:
        return False
    return before.get("status") == "running" or (
        before.get("status") == "done" and outputs_intact(folder, before["outputs"])
    )


class PipelineState:
    """``state.json``: status, inputs' fingerprint and outputs of each stage.

    The file is always replaced whole, so a kill leaves the old one or the new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stages: dict[str, dict[str, Any]] = json.loads(path.read_text())["stages"]
        except FileNotFoundError:
            self._stages = {}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: cannot be read as pipeline state; delete it to run every stage again"
            ) from error

    def get(self, stage: str) -> dict[str, Any]:
        return self._stages.get(stage, {})

    def set(self, stage: str, entry: dict[str, Any]) -> None:
        self._stages[stage] = entry
        files.write_whole(self.path, json.dumps({"stages": self._stages}, indent=1))


def settings_known_to(before: Mapping[str, Any] | None, config: Config) -> dict[str, Any]:
    """A stage's plain config values, without settings that were unknown when it was last run.

    A setting that a later version brings has a default that keeps the numbers, so finished work
    stays finished. It counts as soon as it has another value, and so does a default that changed.

    Args:
        before: the values that the stage was last run with; None if it never was.
    """
    values = dump(config)
    if before is None:
        return values
    train, then = values.get("train"), before.get("train")
    # Where it was not set, determinism was on, and was said to be; on the CPU it still is.
    if isinstance(train, dict) and isinstance(then, dict) and train.get("full_determinism") is None:
        train["full_determinism"] = then.get("full_determinism")  # pyright: ignore
    return without_new(values, before, config.model_dump(mode="json", exclude_defaults=True))


def inputs_fingerprint(stage: str, values: Mapping[str, Any], own_folder: Path) -> str:
    """Hash of a stage, its resolved config, and every existing file or folder that it names.

    What only says how a stage is carried out does not count: the feature store is a cache, and
    ``run`` may be edited between a stop and a resume.
    """
    inputs = {key: value for key, value in values.items() if key not in HOW}
    digest = hashlib.sha256(json.dumps([stage, inputs], sort_keys=True).encode())
    # A stage of the user's own changes with its file.
    if stages.is_path(stage):
        digest.update(_path_digest(content.find(stage.rpartition(":")[0])).encode())
    # The order of a set of texts differs from process to process.
    for text in sorted(set(_strings(inputs))):
        # A function is named together with its file, and the file is what counts.
        name = text.rpartition(":")[0] if re.search(r"\.py:\w+$", text) else text
        # Prompts and other long texts are no paths, and asking the file system about them is an
        # error.
        if not name or len(name) > 1024 or "\n" in name:
            continue
        try:
            path = content.find(name)
        except (ConfigError, OSError, ValueError):
            continue
        # A folder that holds the stage's own one changes with every run of it, and the working
        # directory, the default media root, with everything.
        own, found = own_folder.resolve(), path.resolve()
        if own.is_relative_to(found) or found == Path.cwd():
            continue
        digest.update(f"{text}={_path_digest(path)}".encode())
    return digest.hexdigest()


def listing(folder: Path) -> dict[str, list[Any]]:
    """Each file under ``folder`` with its size, modification time and SHA-256.

    Logs, half-written files and caches are not outputs.
    """
    found: dict[str, list[Any]] = {}
    for path in _counted(folder):
        if path.is_file():
            stat = path.stat()
            found[str(path.relative_to(folder))] = [
                stat.st_size,
                stat.st_mtime_ns,
                content.sha256(path),
            ]
    return found


def outputs_intact(folder: Path, outputs: Mapping[str, list[Any]]) -> bool:
    """True if every recorded output is there unchanged. Only files with another modification time
    are hashed."""
    for name, (size, mtime, sha256) in outputs.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != size:
            return False
        if stat.st_mtime_ns != mtime and content.sha256(path) != sha256:
            return False
    return True


def _is_log(path: Path) -> bool:
    return (
        path.name in {"events.jsonl", "exit_code"} or ".tmp" in path.name or path.suffix == ".lock"
    )


def _counted(folder: Path) -> list[Path]:
    """What lies under a folder, in order, without logs and without folders that are caches."""
    every = sorted(folder.rglob("*"))
    # Files in a cache bear the hash of what they are made of, and whoever needs one names it.
    caches = [path.parent for path in every if path.name == files.CACHE_TAG]
    return [
        path
        for path in every
        if not _is_log(path) and not any(path.is_relative_to(cache) for cache in caches)
    ]


def _path_digest(path: Path) -> str:
    if path.is_file():
        return content.sha256(path)
    entries = [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in _counted(path)
        if file.is_file()
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]  # pyright: ignore[reportUnknownArgumentType]
    return []


def _set_aside(folder: Path, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    number = 1
    while (target := into / f"{folder.name}-{number}").exists():
        number += 1
    shutil.move(folder, target)
    return target


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Allow one pipeline at a time in a folder. The kernel drops the lock when the process dies."""
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MmemoError(
                f"{root}: another pipeline is running here; wait for it or use another output_dir"
            ) from error
        yield
