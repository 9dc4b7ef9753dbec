"""Studies: arms times seeds, each an ordinary pipeline that runs as a process of its own.

A study is three levels of pipelines, each in its own folder::

    <output_dir>/shared               made once
    <output_dir>/seeds/<seed>/start   made once for each seed
    <output_dir>/seeds/<seed>/<arm>   one for each arm and seed

``results.json`` and ``table.md`` are kept up to date while the runs finish.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator
from rich.text import Text

from mmemo import content, files
from mmemo.config import Config, apply_overrides, dump, nearest, parse, read_yaml, save_resolved
from mmemo.console import Bar, console, errors, progress
from mmemo.errors import ConfigError, MmemoError
from mmemo.experiments import study_table
from mmemo.experiments.pipeline import StageConfig, filled, is_finished, locked
from mmemo.run_log import versions
from mmemo.train.distributed import die_with, handling

VARIABLES = ("run", "seed", "arm", "shared", "start")
"""Names that ``${...}`` may have in the configs of a study."""
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class ArmConfig(Config):
    """One arm: how it differs from the common ``stages``."""

    overrides: dict[str, list[str]] = {}
    """Stage name to overrides, which are applied after the stage's own."""
    skip: list[str] = []
    """Common stages that this arm leaves out."""
    stages: list[StageConfig] | None = None
    """Stages of this arm, in place of the common ones."""


class MetricConfig(Config):
    """Where a number of a run is found."""

    stage: str
    """The stage whose folder holds the file: a stage of the arm or of a level above."""
    path: str
    """Keys that lead to the number, joined by dots: ``tasks.emotion.average.value``."""
    file: str = "results.json"
    """A JSON file in the stage's folder."""
    better: Literal["higher", "lower"] | None = None
    """Shown as an arrow beside the metric's name."""
    percent: bool = False
    """Show the number, a share from 0 to 1, as a percentage."""


class StudyConfig(Config):
    """Arms times seeds, each an ordinary pipeline. What they share is made once.

    In a stage's config, ``${run}`` is the folder of the level that the stage belongs to, but
    ``${run}/NAME`` is the folder of stage NAME, whichever level makes it, and ``${run}/store`` is
    the study's one feature store. So configs that were written for a single pipeline work
    unchanged. ``${seed}``, ``${arm}``, ``${shared}`` and ``${start}`` are known as well.
    """

    name: str
    output_dir: str
    seeds: list[int] = Field(min_length=1)
    """Every arm runs once with each seed. In ``shared`` stages ``${seed}`` is 0."""
    shared: list[StageConfig] = []
    """Stages that run once for the whole study: data, encoders, features."""
    start: list[StageConfig] = []
    """Stages that run once for each seed: what the arms of that seed start from."""
    stages: list[StageConfig] = []
    """Stages that every arm runs, unless it has its own."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The arms by name, in the order of the table."""
    metrics: dict[str, MetricConfig] = Field(min_length=1)
    reference: str | None = None
    """The arm that every other arm is compared with, unless ``comparisons`` is given."""
    comparisons: list[tuple[str, str]] | None = None
    """Pairs of arms to compare: the first minus the second."""
    workers: int = Field(default=1, ge=1)
    """Runs at a time. The CPU cores are divided among them."""
    publish: str | None = None
    """A folder to which the results, the table and the plots are copied at the end."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different numbers of 0 or more")
        return seeds

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons, each an arm and its reference."""
        if self.comparisons is not None:
            return self.comparisons
        return [(arm, self.reference) for arm in self.arms if self.reference not in (None, arm)]  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Cell:
    """One pipeline of the study. ``arm`` is None for what arms share. ``needs`` are the labels of
    the pipelines that must be done first."""

    label: str
    folder: Path
    stages: Mapping[str, tuple[str, Config]]
    """Stage name to what kind of stage it is and its resolved config."""
    needs: tuple[str, ...] = ()
    arm: str | None = None
    seed: int = 0
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Stage name to its folder, for this level and those above."""


def read_study(path: Path, overrides: list[str]) -> tuple[StudyConfig, list[Cell]]:
    """A study file, and its pipelines in the order to run them, every config validated.

    Raises:
        ConfigError: something is wrong; the sentence names the level or arm, and the stage.
    """
    path = content.find(path)
    given = apply_overrides(read_yaml(path, later=VARIABLES), overrides)
    study = parse(StudyConfig, given, where=str(path))
    _check_names(study, str(path))
    return study, _Planner(study, path).cells()


def arm_stages(study: StudyConfig, name: str) -> list[StageConfig]:
    """The stages of one arm, with its overrides.

    Raises:
        ConfigError: it skips or overrides a stage that is not there.
    """
    arm = study.arms[name]
    stages = study.stages if arm.stages is None else arm.stages
    names = [stage.name for stage in stages]
    for stage in arm.skip:
        _known(stage, names, f"arm '{name}' skips stage")
    left = [stage for stage in stages if stage.name not in arm.skip]
    for stage in arm.overrides:
        _known(stage, [stage.name for stage in left], f"arm '{name}' overrides stage")
    if not left:
        raise ConfigError(
            f"arm '{name}' has no stages; give it `stages` of its own, or `stages` for all arms"
        )
    return [
        stage.model_copy(
            update={"overrides": [*stage.overrides, *arm.overrides.get(stage.name, [])]}
        )
        for stage in left
    ]


def _known(name: str, names: list[str], sentence: str) -> None:
    if name not in names:
        guess = nearest(name, names)
        hint = f"did you mean '{guess}'?" if guess else f"there are: {', '.join(names) or 'none'}"
        raise ConfigError(f"{sentence} '{name}', which does not exist; {hint}")


def _check_names(study: StudyConfig, where: str) -> None:
    import re

    for arm in study.arms:
        # The folder seeds/<seed>/start holds what the arms of a seed start from.
        if arm == "start" or not re.match(_NAME, arm):
            raise ConfigError(f"{where}: '{arm}' cannot name an arm; use letters, digits, _ and -")
    arms = list(study.arms)
    for pair in study.pairs:
        for arm in pair:
            _known(arm, arms, f"{where}: a comparison names arm")
        if pair[0] == pair[1]:
            raise ConfigError(f"{where}: arm '{pair[0]}' is compared with itself; name another")
    if study.reference is not None:
        _known(study.reference, arms, f"{where}: `reference` names arm")
    for arm in arms:
        above = [stage.name for stage in [*study.shared, *study.start]]
        names = [*above, *(stage.name for stage in arm_stages(study, arm))]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{where}: arm '{arm}': stage name '{twice[0]}' is used twice, here or in the "
                "levels above; rename one"
            )
        for metric, config in study.metrics.items():
            _known(config.stage, names, f"{where}: metric '{metric}', arm '{arm}': names stage")


class _Planner:
    def __init__(self, study: StudyConfig, path: Path) -> None:
        self.study, self.path = study, path
        self.root = Path(study.output_dir)

    def cells(self) -> list[Cell]:
        study, cells = self.study, list[Cell]()
        shared = self.root / "shared"
        needs: tuple[str, ...] = ()
        places: dict[str, Path] = {"store": shared / "store"}
        variables = {"shared": str(shared)}
        if study.shared:
            cells.append(self._cell("shared", shared, study.shared, variables, places))
            needs, places = ("shared",), dict(cells[-1].places)
        for seed in study.seeds:
            folder = self.root / "seeds" / str(seed)
            mine = {**variables, "start": str(folder / "start"), "seed": str(seed)}
            after, above = needs, places
            if study.start:
                label = f"seed {seed}, start"
                cells.append(
                    self._cell(label, folder / "start", study.start, mine, places, needs, seed)
                )
                after, above = (*needs, label), cells[-1].places
            for arm in study.arms:
                stages, label = arm_stages(study, arm), f"seed {seed}, arm {arm}"
                own = {**mine, "arm": arm}
                cells.append(self._cell(label, folder / arm, stages, own, above, after, seed, arm))
        return cells

    def _cell(
        self,
        label: str,
        folder: Path,
        stages: list[StageConfig],
        variables: Mapping[str, str],
        above: Mapping[str, Path],
        needs: tuple[str, ...] = (),
        seed: int = 0,
        arm: str | None = None,
    ) -> Cell:
        where = {f"run/{name}": str(place) for name, place in above.items()}
        variables = {"seed": "0", **variables, "run": str(folder), **where}
        resolved: dict[str, tuple[str, Config]] = {}
        for stage in stages:
            title = f"{label}, stage '{stage.name}'"
            try:
                values: Any = filled(stage, self.path, variables)
            except ConfigError as error:
                raise ConfigError(f"{title}: {error}") from None
            resolved[stage.name] = (
                stage.stage,
                parse(stage.kind.config_class, values, where=title),
            )
        places = {**above, **{stage.name: folder / stage.name for stage in stages}}
        return Cell(label, folder, resolved, needs, arm, seed, places)


SCHEMA = 1
_ERROR = "error.txt"


def run_study(
    path: Path,
    overrides: list[str],
    *,
    command: Sequence[str] = (sys.executable, "-c", "from mmemo.cli import main; main()"),
    report: bool = False,
) -> Path:
    """Run the unfinished runs of the study file at ``path``; returns the folder of the results.

    Args:
        command: starts the process of a run; ``pipeline FILE`` is appended.
        report: run nothing; make results, table and plots of the finished runs.

    Raises:
        ConfigError: the study or one of its stages' configs is wrong; nothing was run.
        SystemExit: 1 if a run failed (the others were run); 143 or 130 if stopped by SIGTERM or
            Ctrl-C.
    """
    study, cells = read_study(path, overrides)
    root = Path(study.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    # Locked before any file is written, so that a second study cannot replace configs in use.
    with locked(root):
        for cell in cells:
            _write_pipeline(cell)
        work = Study(study, cells)
        if not report:
            work.run(command)
        work.write(plots=not work.stopped)
        console.print(study_table.table(work.results()), soft_wrap=True)
        console.print(
            Text.assemble("Results: ", (str(root), "bold"), " (results.json, table.md, *.png)"),
            soft_wrap=True,
        )
        if work.stopped:
            again = "mmemo study " + " ".join([str(path), *overrides])
            console.print(f"stopped; to resume: {again}", soft_wrap=True)
            # As a shell reports a process that a signal has ended.
            raise SystemExit(128 + work.stopped)
    failed = [cell.label for cell in cells if work.status[cell.label] == "failed"]
    if failed and not report:
        errors.print(
            f"{len(failed)} of {len(cells)} runs failed ({'; '.join(failed)}); see error.txt and "
            "log.txt in their folders, then start the study again: only these runs are repeated",
            soft_wrap=True,
        )
        raise SystemExit(1)
    return root


def check_study(path: Path, overrides: list[str]) -> None:
    """Validate the config of every stage of every arm and seed, and list the runs.

    Raises:
        ConfigError: the study or one of its stages' configs is wrong.
    """
    study, cells = read_study(path, overrides)
    for cell in cells:
        console.print(f"{cell.label}: {', '.join(cell.stages)}  ({cell.folder})", soft_wrap=True)
    console.print(
        f"All {sum(len(cell.stages) for cell in cells)} stages have valid configs: "
        f"{len(study.arms)} arms, {len(study.seeds)} seeds, {len(cells)} pipelines."
    )


def _write_pipeline(cell: Cell) -> None:
    """Write the run as a pipeline file, with every stage's resolved config beside it."""
    stages: list[dict[str, str]] = []
    for name, (stage, config) in cell.stages.items():
        save_resolved(config, cell.folder / "configs" / f"{name}.yaml")
        stages.append({"name": name, "stage": stage, "config": f"configs/{name}.yaml"})
    values = {
        "name": cell.label,
        "output_dir": str(cell.folder),
        "seed": cell.seed,
        "stages": stages,
    }
    (cell.folder / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


class Study:
    """The runs of a study, the status of each, and the result files."""

    def __init__(self, study: StudyConfig, cells: list[Cell]) -> None:
        self.study, self.cells = study, cells
        self.root = Path(study.output_dir)
        self.status: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.stopped = 0
        for cell in cells:
            self._look(cell)

    def _look(self, cell: Cell) -> None:
        """Set the status of a run from its folder: ``done``, ``failed`` or ``waiting``."""
        self.errors.pop(cell.label, None)
        error = cell.folder / _ERROR
        if all(self.status[name] == "done" for name in cell.needs) and is_finished(
            cell.folder / "pipeline.yaml"
        ):
            self.status[cell.label] = "done"
            if cell.arm is not None:
                try:
                    self._metrics(cell)
                except MmemoError as problem:
                    self.status[cell.label] = "failed"
                    self.errors[cell.label] = str(problem)
        elif error.exists():
            self.status[cell.label] = "failed"
            self.errors[cell.label] = error.read_text(encoding="utf-8").strip()
        else:
            self.status[cell.label] = "waiting"

    def run(self, command: Sequence[str]) -> None:
        """Run every unfinished pipeline, in order, ``workers`` at a time."""
        for cell in self.cells:
            if self.status[cell.label] == "failed":
                (cell.folder / _ERROR).unlink(missing_ok=True)
                self.status[cell.label] = "waiting"
        todo = [cell for cell in self.cells if self.status[cell.label] == "waiting"]
        running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            # The second signal no longer waits for the runs to stop by themselves.
            again, self.stopped = self.stopped != 0, number
            for _, process in running.values():
                with suppress(ProcessLookupError):
                    process.kill() if again else process.send_signal(number)

        done = len(self.cells) - len(todo)
        with (
            handling({signal.SIGTERM: stop, signal.SIGINT: stop}),
            progress("study", len(self.cells), done=done, unit="runs") as bar,
        ):
            try:
                # After a stop, the loop goes on until the runs have saved and ended.
                while (todo and not self.stopped) or running:
                    self._start(todo, running, command)
                    self._reap(running, bar)
                    # What is left waits for a run that failed.
                    if not running and not any(self._ready(cell) for cell in todo):
                        break
                    time.sleep(0.1)
            finally:
                for _, process in running.values():
                    process.kill()

    def _ready(self, cell: Cell) -> bool:
        return all(self.status[name] == "done" for name in cell.needs)

    def _start(
        self,
        todo: list[Cell],
        running: dict[str, tuple[Cell, subprocess.Popen[bytes]]],
        command: Sequence[str],
    ) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.study.workers))
        # Each run would otherwise start a thread for every core. A log has no terminal whose width
        # the tables could take.
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "COLUMNS": "120"}
        parent = os.getpid()
        for cell in list(todo):
            if self.stopped or len(running) >= self.study.workers:
                return
            if not self._ready(cell):
                continue
            todo.remove(cell)
            (cell.folder / _ERROR).unlink(missing_ok=True)
            with (cell.folder / "log.txt").open("wb") as log:
                # A session of its own keeps the terminal's Ctrl-C from reaching a run twice. The
                # kernel kills the run when the study is killed, so that none holds its lock.
                process = subprocess.Popen(
                    [*command, "pipeline", str(cell.folder / "pipeline.yaml")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=lambda: die_with(parent),
                )
            running[cell.label] = (cell, process)

    def _reap(self, running: dict[str, tuple[Cell, subprocess.Popen[bytes]]], bar: Bar) -> None:
        for label, (cell, process) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[label]
            # A run that was stopped has not failed: it resumes.
            if code and not self.stopped:
                (cell.folder / _ERROR).write_text(_reason(cell.folder / "log.txt", code) + "\n")
            self._look(cell)
            if not code and self.status[label] == "waiting":  # or it would wait forever
                sentence = "the run's inputs changed while it ran; start the study again\n"
                (cell.folder / _ERROR).write_text(sentence)
                self._look(cell)
            if self.status[label] == "failed":
                console.print(f"{label} failed: {self.errors[label]}", soft_wrap=True)
            if self.status[label] != "waiting":
                bar.advance()
            self.write()
        bad = sum(status == "failed" for status in self.status.values())
        bar.note((f"{bad} failed; " if bad else "") + " | ".join(running))

    def results(self) -> dict[str, Any]:
        """The content of ``results.json``, without any path of this machine."""
        config = dump(self.study)
        # Where and how the study ran is no part of its results, and names places of this machine.
        del config["output_dir"], config["publish"], config["workers"]
        runs: list[dict[str, Any]] = []
        shared: list[dict[str, Any]] = []
        for cell in self.cells:
            status = self.status[cell.label]
            entry: dict[str, Any] = {"seed": cell.seed, "status": status, "seconds": _seconds(cell)}
            if cell.arm is None:
                entry = {"pipeline": cell.label, **entry}
            else:
                metrics = self._metrics(cell) if status == "done" else {}
                entry = {"arm": cell.arm, **entry, "metrics": metrics}
            if status == "failed":
                entry["error"] = self.errors[cell.label]
            (shared if cell.arm is None else runs).append(entry)
        found = study_table.summary(
            runs, list(self.study.arms), list(self.study.metrics), self.study.pairs
        )
        values = {
            "schema": SCHEMA,
            "name": self.study.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": runs,
            "shared": shared,
            "summary": found,
            "versions": versions(),
            "config": config,
        }
        return self._without_paths(values)

    def _metrics(self, cell: Cell) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, metric in self.study.metrics.items():
            file = cell.places[metric.stage] / metric.file
            try:
                value: Any = json.loads(file.read_text(encoding="utf-8"))
                for key in metric.path.split("."):
                    value = value[int(key) if isinstance(value, list) else key]
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                # None is a value too, that of an undefined number, so a missing number is marked by
                # "...".
                value = ...
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not number:
                raise MmemoError(
                    f"metric '{name}': {metric.stage}/{metric.file} has no number at "
                    f"'{metric.path}'; look up the right keys in that file"
                )
            found[name] = value if value is not None and math.isfinite(value) else None
        return found

    def _without_paths(self, value: Any) -> Any:
        if isinstance(value, str):
            places = {self.root.resolve(): "<study>", Path.cwd(): ".", Path.home(): "~"}
            for place, name in places.items():
                # The root of the file system would replace every slash.
                if place != Path(place.anchor):
                    value = value.replace(str(place), name)
            return value
        if isinstance(value, dict):
            return {key: self._without_paths(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, list):
            return [self._without_paths(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    def write(self, *, plots: bool = False) -> None:
        """Replace ``results.json`` and ``table.md``. ``plots``: also draw the plots and publish."""
        results = self.results()
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, body in (("results.json", text), ("table.md", study_table.table(results))):
            files.write_whole(self.root / name, body)
        if not plots:
            return
        names = ["results.json", "table.md"]
        for metric in self.study.metrics:
            study_table.plot(results, metric, self.root / f"{metric}.png")
            names.append(f"{metric}.png")
        if self.study.publish is not None:
            folder = Path(self.study.publish)
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(self.root / name, folder / name)


def _seconds(cell: Cell) -> float | None:
    """Seconds that the stages of a run took; None before it is done."""
    try:
        stages: Any = json.loads((cell.folder / "state.json").read_text())["stages"]
        return round(sum(stages[name]["seconds"] for name in cell.stages), 1)
    except (OSError, ValueError, KeyError):
        return None


def _reason(log: Path, code: int) -> str:
    """Why a run failed: the last line of its log that says so."""
    if code < 0:
        return f"killed by signal {-code}; there may be too little memory"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error:")] or lines
    return reasons[-1].removeprefix("error: ") if reasons else f"ended with code {code}"
