"""Studies: arms times seeds, each an ordinary pipeline that runs as a process of its own.

First every arm is tuned on worlds of its own, if the study asks for it, then every arm runs with
every seed. ``results.json`` and ``table.md``, and ``tuning.json`` and ``tuning.md``, are kept up to
date while the runs finish, also in the folder where they are published.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from mmemo import files
from mmemo.config import dump
from mmemo.console import console, errors, progress
from mmemo.experiments import study_table
from mmemo.experiments.pipeline import locked
from mmemo.experiments.study_config import VARIABLES as VARIABLES
from mmemo.experiments.study_config import StudyConfig, grid_of
from mmemo.experiments.study_plan import Cell, Planner, write_pipeline
from mmemo.experiments.study_records import Records, code, delete, seconds_of, strip
from mmemo.experiments.study_runner import STOPS, Processes, Runs
from mmemo.experiments.study_tuning import choose, tuning_results, tuning_table
from mmemo.formats import counted
from mmemo.run_log import versions
from mmemo.train.distributed import handling

SCHEMA = 1


def read_study(path: Path, overrides: list[str]) -> tuple[StudyConfig, list[Cell]]:
    """A study file and all of its pipelines, every config validated.

    Raises:
        ConfigError: something is wrong; the sentence names the level or arm, and the stage.
    """
    planner = Planner(path, overrides)
    return planner.study, planner.check()


COLD = (sys.executable, "-c", "from mmemo.cli import main; main()")
"""Starts a run in a Python of its own."""


def run_study(
    path: Path,
    overrides: list[str],
    *,
    command: Sequence[str] | None = None,
    report: bool = False,
    fresh: bool = False,
) -> Path:
    """Run the unfinished runs of the study file at ``path``; returns the folder of the results.

    Args:
        command: starts the process of a run; ``pipeline FILE`` is appended. None forks it from a
            process that has imported the libraries (:mod:`mmemo.experiments.warm`).
        report: run nothing; make results, table and plots of the finished runs.
        fresh: take no run from results that were published before.

    Raises:
        ConfigError: the study or one of its stages' configs is wrong; nothing was run.
        SystemExit: 1 if a run failed (the others were run); 143 or 130 if stopped by SIGTERM or
            Ctrl-C.
    """
    planner = Planner(path, overrides)
    planner.check()
    planner.root.mkdir(parents=True, exist_ok=True)
    # Locked before any file is written, so that a second study cannot replace configs in use.
    with locked(planner.root):
        work = Study(planner, fresh=fresh)
        if fresh:  # or what was published would be taken after a kill
            work.write()
        if not report:
            work.run(command)
        work.write(plots=True)
        console.print(study_table.table(work.results()), soft_wrap=True)
        console.print(
            Text.assemble(
                "Results: ", (str(work.root), "bold"), " (results.json, table.md, *.png)"
            ),
            soft_wrap=True,
        )
        stopped = work.processes.stopped
        if stopped:
            again = "mmemo study " + " ".join([str(path), *overrides])
            console.print(f"stopped; to resume: {again}", soft_wrap=True)
            # As a shell reports a process that a signal has ended.
            raise SystemExit(128 + stopped)
    failed = work.failed()
    if failed and not report:
        errors.print(
            f"{counted(len(failed), 'run')} failed ({'; '.join(failed)}); see error.txt and "
            "log.txt in their folders, then start the study again: only these runs are repeated",
            soft_wrap=True,
        )
        raise SystemExit(1)
    return work.root


def check_study(path: Path, overrides: list[str]) -> None:
    """Validate the config of every stage of every arm and seed, and list the runs.

    Raises:
        ConfigError: the study or one of its stages' configs is wrong.
    """
    study, cells = read_study(path, overrides)
    for cell in cells:
        console.print(f"{cell.label}: {', '.join(cell.stages)}  ({cell.folder})", soft_wrap=True)
    tuned = sum(bool(grid_of(study, arm)) for arm in study.arms)
    console.print(
        f"All {sum(len(cell.stages) for cell in cells)} stages have valid configs: "
        f"{len(study.arms)} arms ({tuned} tuned), {len(study.seeds)} seeds, {len(cells)} pipelines."
    )


class Study:
    """The runs of a study: first those of tuning, in two parts, then the arms with the seeds."""

    def __init__(self, planner: Planner, *, fresh: bool) -> None:
        self.planner, self.study, self.root = planner, planner.study, planner.root
        self.processes = Processes()
        publish = self.study.publish
        self.published = None if publish is None else Path(publish)
        places = [self.root] if self.study.keep == "results" else []
        places += [] if self.published is None else [self.published]
        names = {"tuning": "tuning.json", "main": "results.json"}
        self.records = {
            part: Records(self.study, [] if fresh else [place / name for place in places])
            for part, name in names.items()
        }
        self.parts: list[Runs] = []
        self._written: dict[str, Cell] = {}
        self._look(0)

    def _look(self, known: int) -> None:
        """See what is done: the parts of tuning after the first ``known``, and the arms with the
        choices that these make."""
        self.parts = self.parts[:known]
        for dependent in (False, True)[known:]:
            chosen, _ = choose(self.study, self.parts)
            self.parts.append(
                self._runs(self.planner.tuning(chosen, dependent=dependent), "tuning")
            )
        self.chosen, blocked = choose(self.study, self.parts)
        self.main = self._runs(self.planner.main(self.chosen), "main", blocked)

    def _runs(self, cells: list[Cell], part: str, blocked: dict[str, str] | None = None) -> Runs:
        for cell in cells:
            if self._written.get(cell.label) is not cell:
                write_pipeline(cell)
            self._written[cell.label] = cell
        return Runs(self.study, cells, self.records[part], blocked)

    def run(self, command: Sequence[str] | None) -> None:
        """Run every unfinished pipeline: tuning first, since the arms wait for its choices."""
        for runs in (*self.parts, self.main):
            runs.retry()
        self._tell()
        total = sum(len(runs.cells) for runs in (*self.parts, self.main))
        todo = sum(len(runs.todo()) for runs in (*self.parts, self.main))
        with (
            handling(dict.fromkeys(STOPS, self.processes.stop)),
            progress("study", total, done=total - todo, unit="runs", left=False) as bar,
        ):
            try:
                for number in range(len(self.parts)):
                    later = [c for r in (*self.parts[number + 1 :], self.main) for c in r.todo()]
                    self.parts[number].run(command, self.processes, bar, self._changed, later)
                    before = len(later)
                    self._look(number + 1)
                    parts = (*self.parts[number + 1 :], self.main)
                    bar.advance(max(0, before - sum(len(runs.todo()) for runs in parts)))
                    if self.processes.stopped:
                        return
                waiting = [arm for arm in self.study.arms if self._is_untuned(arm)]
                self.main.blocked = {
                    **dict.fromkeys(waiting, "its tuning is not done; see the tuning runs"),
                    **self.main.blocked,
                }
                for cell in self.main.cells:
                    self.main.look(cell)
                self.main.run(command, self.processes, bar, self._changed)
            finally:
                for _, process, _ in self.processes.running.values():
                    process.kill()
        self._tidy()

    def _is_untuned(self, arm: str) -> bool:
        return bool(grid_of(self.study, arm)) and arm not in self.chosen

    def _tell(self) -> None:
        """Say which runs are taken from results that were published, and which cannot be."""
        for runs in (*self.parts, self.main):
            taken = [c for c in runs.cells if c.label in runs.entries and not runs.made[c.label]]
            stale = [
                cell.label
                for cell in runs.cells
                if runs.status[cell.label] != "done" and runs.records.is_stale(cell)
            ]
            if taken:
                other = sum(runs.entries[cell.label]["code"] != code() for cell in taken)
                told = f", {other} of them made with other code of mmemo (--fresh runs all again)"
                console.print(
                    f"{counted(len(taken), 'run')} done before, taken from the results"
                    + (told if other else ""),
                    soft_wrap=True,
                )
            if stale:
                console.print(
                    f"{counted(len(stale), 'run')} in the results made with another config, and "
                    f"run again: {'; '.join(stale[:3])}{' ...' if len(stale) > 3 else ''}",
                    soft_wrap=True,
                )

    def failed(self) -> list[str]:
        """The labels of all runs that failed."""
        parts = (*self.parts, self.main)
        return list(dict.fromkeys(name for runs in parts for name in runs.errors))

    def _changed(self) -> None:
        self.write()
        self._tidy()

    def _tidy(self) -> None:
        """Delete what is large and no longer needed. The results are on disk by then."""
        if self.study.keep != "results":
            return
        tuned = not any(runs.todo() for runs in self.parts)
        for runs in (*self.parts, self.main):
            needed = {
                name
                for cell in runs.cells
                if runs.status[cell.label] != "done" or cell.label in self.processes.running
                for name in (cell.label, *cell.needs)
            }
            for cell in runs.cells:
                tuning = "tuning" in cell.folder.relative_to(self.root).parts[:1]
                if cell.label in needed or (tuning and not tuned) or cell.label == "shared":
                    continue
                if runs.made[cell.label]:
                    strip(cell.folder)
                    runs.made[cell.label] = False
                    if cell.arm is None:
                        delete(cell.folder.parent / "store")

    def results(self) -> dict[str, Any]:
        """The content of ``results.json``, without any path of this machine."""
        study, runs = self.study, self.main
        config = dump(study)
        # Where and how the study ran is no part of its results, and names places of this machine.
        del config["output_dir"], config["publish"], config["workers"], config["keep"]
        rows: list[dict[str, Any]] = []
        shared: list[dict[str, Any]] = []
        todo = {cell.label for cell in runs.todo()}
        for cell in runs.cells:
            status = runs.status[cell.label]
            if cell.arm is None and status == "waiting" and cell.label not in todo:
                status = "not needed"  # its arms are done, and their results are kept
            entry: dict[str, Any] = {"seed": cell.seed, "status": status}
            if cell.arm is None:
                entry = {"pipeline": cell.label, **entry, "seconds": seconds_of(cell)}
            else:
                found = runs.entries.get(cell.label, {"seconds": None, "metrics": {}})
                entry = {"arm": cell.arm, **entry, "fingerprint": cell.fingerprint, **found}
            if status == "failed":
                entry["error"] = runs.errors[cell.label]
            (shared if cell.arm is None else rows).append(entry)
        kinds = list(dict.fromkeys(stage.stage for stage in study.start))
        tuned = {arm: grid_of(study, arm)[point] for arm, point in self.chosen.items()}
        values = {
            "schema": SCHEMA,
            "name": study.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": rows,
            "shared": shared,
            "seed_has": kinds,
            "tuned": tuned,
            "summary": study_table.summary(rows, list(study.arms), config["metrics"], study.pairs),
            "versions": versions(),
            "config": config,
        }
        return self._without_paths(values)

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
        """Replace the result files here and where they are published. ``plots``: also draw the
        plots."""
        results = self.results()
        bodies = {"results.json": _json(results), "table.md": study_table.table(results)}
        if self.study.tuning is not None:
            tuned = self._without_paths(tuning_results(self.study, self.parts, self.chosen))
            bodies |= {"tuning.json": _json(tuned), "tuning.md": tuning_table(tuned)}
        for place in (self.root, self.published):
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
                for name, body in bodies.items():
                    files.write_whole(place / name, body)
        for metric in self.study.metrics if plots else ():
            study_table.plot(results, metric, self.root / f"{metric}.png")
            if self.published is not None:
                shutil.copyfile(self.root / f"{metric}.png", self.published / f"{metric}.png")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
