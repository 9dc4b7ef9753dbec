"""``mmemo study``: run the pipelines of a study as processes, and keep its results up to date."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from mmemo.config import Config, dump, save_resolved
from mmemo.console import Bar, console, errors, progress
from mmemo.errors import MmemoError
from mmemo.evaluation import study_table
from mmemo.evaluation.answering import versions
from mmemo.train.distributed import die_with, handling
from mmemo.train.pipeline import is_finished, locked
from mmemo.train.study_config import Cell, StudyConfig, read_study

SCHEMA = 1
_ERROR = "error.txt"


def run_study(
    path: Path,
    overrides: list[str],
    known: Mapping[str, type[Config]],
    *,
    command: Sequence[str] = (sys.executable, "-c", "from mmemo.cli import main; main()"),
    report: bool = False,
) -> Path:
    """Run what is not done of the study file at ``path``; the folder with the results.

    ``command`` is what a run's process is started with, before ``pipeline FILE``. ``report`` runs
    nothing and makes results, table and plots from what is there.

    Raises:
        ConfigError: the study or one of its stages' configs is wrong; nothing was run.
        SystemExit: 1 when a run failed (the others were run); 143 or 130 when stopped by SIGTERM
            or Ctrl-C.
    """
    study, cells = read_study(path, overrides, known)
    root = Path(study.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for cell in cells:
            _write_pipeline(cell)
        work = Study(study, cells, known)
        if not report:
            work.run(command)
        work.write(plots=not work.stopped)
        console.print(study_table.table(work.results()), markup=False, soft_wrap=True)
        console.print(f"Results: [bold]{root}[/bold] (results.json, table.md, *.png)")
        if work.stopped:
            again = "mmemo study " + " ".join([str(path), *overrides])
            console.print(f"stopped; to go on: {again}", markup=False, soft_wrap=True)
            raise SystemExit(128 + work.stopped)
    failed = [cell.label for cell in cells if work.status[cell.label] == "failed"]
    if failed and not report:
        errors.print(
            f"{len(failed)} of {len(cells)} runs failed ({'; '.join(failed)}); see error.txt and "
            "log.txt in their folders, then start the study again: only these are redone",
            markup=False,
            soft_wrap=True,
        )
        raise SystemExit(1)
    return root


def check_study(path: Path, overrides: list[str], known: Mapping[str, type[Config]]) -> None:
    """Validate every stage's config of every arm and seed, and print the runs."""
    study, cells = read_study(path, overrides, known)
    for cell in cells:
        console.print(f"{cell.label}: {', '.join(cell.stages)}  ({cell.folder})", soft_wrap=True)
    console.print(
        f"All {sum(len(cell.stages) for cell in cells)} stages have valid configs: "
        f"{len(study.arms)} arms, {len(study.seeds)} seeds, {len(cells)} pipelines."
    )


def _write_pipeline(cell: Cell) -> None:
    """The run as a pipeline file of its own, with every stage's resolved config beside it."""
    stages: list[dict[str, str]] = []
    for name, (verb, config) in cell.stages.items():
        save_resolved(config, cell.folder / "configs" / f"{name}.yaml")
        stages.append({"name": name, "verb": verb, "config": f"configs/{name}.yaml"})
    values = {
        "name": cell.label,
        "output_dir": str(cell.folder),
        "seed": cell.seed,
        "stages": stages,
    }
    (cell.folder / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


class Study:
    """The runs of a study, what has become of each, and the files about them."""

    def __init__(
        self, study: StudyConfig, cells: list[Cell], known: Mapping[str, type[Config]]
    ) -> None:
        self.study, self.cells, self.known = study, cells, known
        self.root = Path(study.output_dir)
        self.status: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.stopped = 0
        for cell in cells:
            self._look(cell)

    def _look(self, cell: Cell) -> None:
        """Set a run's status from its folder: ``done``, ``failed`` or ``waiting``."""
        self.errors.pop(cell.label, None)
        error = cell.folder / _ERROR
        if all(self.status[name] == "done" for name in cell.needs) and is_finished(
            cell.folder / "pipeline.yaml", self.known
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
        """Run every pipeline that is not done, in order, ``workers`` at a time."""
        for cell in self.cells:
            if self.status[cell.label] == "failed":
                (cell.folder / _ERROR).unlink(missing_ok=True)
                self.status[cell.label] = "waiting"
        todo = [cell for cell in self.cells if self.status[cell.label] == "waiting"]
        running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = {}

        def stop(number: int, frame: FrameType | None) -> None:
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
                while (todo and not self.stopped) or running:
                    self._start(todo, running, command)
                    self._reap(running, bar)
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
            if code and not self.stopped:
                (cell.folder / _ERROR).write_text(_reason(cell.folder / "log.txt", code) + "\n")
            self._look(cell)
            if not code and self.status[label] == "waiting":  # else it would never be told
                (cell.folder / _ERROR).write_text("its inputs changed while it ran; start again\n")
                self._look(cell)
            if self.status[label] == "failed":
                console.print(f"{label} failed: {self.errors[label]}", markup=False, soft_wrap=True)
            if self.status[label] != "waiting":
                bar.advance()
            self.write()
        bad = sum(status == "failed" for status in self.status.values())
        bar.note((f"{bad} failed; " if bad else "") + " | ".join(running))

    def results(self) -> dict[str, Any]:
        """What ``results.json`` holds. No path of this machine stands in it."""
        config = dump(self.study)
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
            "versions": {**versions(), "python": platform.python_version()},
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
                value = ...
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not number:
                raise MmemoError(
                    f"metric '{name}': {metric.stage}/{metric.file} has no number at "
                    f"'{metric.path}'; look there for the right keys"
                )
            found[name] = value if value is not None and math.isfinite(value) else None
        return found

    def _without_paths(self, value: Any) -> Any:
        if isinstance(value, str):
            places = {self.root.resolve(): "<study>", Path.cwd(): ".", Path.home(): "~"}
            for place, name in places.items():
                if place != Path(place.anchor):
                    value = value.replace(str(place), name)
            return value
        if isinstance(value, dict):
            return {key: self._without_paths(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, list):
            return [self._without_paths(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    def write(self, *, plots: bool = False) -> None:
        """Replace ``results.json`` and ``table.md`` whole; ``plots`` also draws and publishes."""
        results = self.results()
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, body in (("results.json", text), ("table.md", study_table.table(results))):
            temporary = self.root / f"{name}.tmp"
            temporary.write_text(body, encoding="utf-8")
            temporary.replace(self.root / name)
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
    """Seconds that a run's stages took; None before it is done."""
    try:
        stages: Any = json.loads((cell.folder / "state.json").read_text())["stages"]
        return round(sum(stages[name]["seconds"] for name in cell.stages), 1)
    except (OSError, ValueError, KeyError):
        return None


def _reason(log: Path, code: int) -> str:
    """The last line of a log that says what went wrong."""
    if code < 0:
        return f"was killed by signal {-code}; there may be too little memory"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")] or lines
    return said[-1].removeprefix("error: ") if said else f"ended with code {code}"
