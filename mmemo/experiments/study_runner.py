"""Runs the pipelines of a study, each as a process of its own, a few at a time."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mmemo.console import Bar, console
from mmemo.errors import MmemoError
from mmemo.experiments.pipeline import is_finished
from mmemo.experiments.study_config import StudyConfig
from mmemo.experiments.study_plan import Cell
from mmemo.experiments.study_records import Records, code, read_metrics, seconds_of
from mmemo.experiments.warm import WarmProcess
from mmemo.train.distributed import die_with

_ERROR, _CODE = "error.txt", "code.txt"
KILLED = "killed by signal"


class Processes:
    """The processes that run now, and the signal that stopped the study, if one did."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Cell, subprocess.Popen[bytes] | WarmProcess, float]] = {}
        self.stopped = 0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on. The second one no longer waits for the runs to stop by themselves."""
        again, self.stopped = self.stopped != 0, number
        for _, process, _ in self.running.values():
            with suppress(ProcessLookupError):
                process.kill() if again else process.send_signal(number)

    def start(self, cell: Cell, command: Sequence[str] | None, threads: int) -> None:
        """Start a run: by a command to which ``pipeline FILE`` is appended, or warm."""
        # Each run would otherwise start a thread for every core. A log has no terminal whose width
        # the tables could take.
        own = {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "NO_COLOR": "1"}
        parent = os.getpid()
        file = cell.folder / "pipeline.yaml"
        (cell.folder / _ERROR).unlink(missing_ok=True)
        (cell.folder / _CODE).write_text(code() + "\n", encoding="utf-8")
        if command is None:
            process = WarmProcess(file, cell.folder / "log.txt", own)
            self.running[cell.label] = (cell, process, time.monotonic())
            return
        with (cell.folder / "log.txt").open("wb") as log:
            # A session of its own keeps the terminal's Ctrl-C from reaching a run twice. The
            # kernel kills the run when the study is killed, so that none holds its lock.
            process = subprocess.Popen(
                [*command, "pipeline", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        self.running[cell.label] = (cell, process, time.monotonic())


class Runs:
    """Some pipelines of a study, the status of each, and the metrics of those that are done.

    A status is ``done``, ``failed`` or ``waiting``. An arm is also done where there is a record of
    it; what it needs is then made only if another arm needs it.

    Args:
        blocked: arms that cannot run, with the reason.
    """

    def __init__(
        self,
        study: StudyConfig,
        cells: Sequence[Cell],
        records: Records,
        blocked: Mapping[str, str] | None = None,
    ) -> None:
        self.study, self.cells, self.records = study, list(cells), records
        self.blocked = blocked or {}
        self.status: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        """By label of an arm's run that is done: its metrics, seconds and version of the code."""
        self.made: dict[str, bool] = {}
        """Whether the files of a pipeline are there, for those that need it."""
        for cell in cells:
            self.look(cell)

    def look(self, cell: Cell) -> None:
        """Set the status of a run from its folder and the records."""
        label, error = cell.label, cell.folder / _ERROR
        self.errors.pop(label, None)
        self.entries.pop(label, None)
        self.made[label] = (
            all(self.made[name] for name in cell.needs)
            and (cell.folder / "state.json").exists()
            and is_finished(cell.folder / "pipeline.yaml")
        )
        record = None if cell.arm is None or self.made[label] else self.records.get(cell)
        self.status[label] = "done"
        if record is not None:
            self.entries[label] = record
        elif self.made[label] and cell.arm is not None:
            try:
                metrics = read_metrics(self.study, cell)
            except MmemoError as problem:
                self._failed(label, str(problem))
            else:
                self.entries[label] = {
                    "metrics": metrics,
                    "seconds": seconds_of(cell),
                    "code": _made_by(cell),
                }
        elif self.made[label]:
            pass
        elif cell.arm is not None and cell.arm in self.blocked:
            self._failed(label, self.blocked[cell.arm])
        elif error.exists():
            self._failed(label, error.read_text(encoding="utf-8").strip())
        else:
            self.status[label] = "waiting"

    def _failed(self, label: str, reason: str) -> None:
        self.status[label], self.errors[label] = "failed", reason

    def todo(self) -> list[Cell]:
        """The pipelines to run: arms that are not done, and what they need."""
        wanted: set[str] = set()
        for cell in reversed(self.cells):
            arm = cell.arm is not None and self.status[cell.label] == "waiting"
            if arm or (cell.label in wanted and not self.made[cell.label]):
                wanted |= {cell.label, *cell.needs}
        return [cell for cell in self.cells if cell.label in wanted and not self.made[cell.label]]

    def retry(self) -> None:
        """Forget failures, other than those of arms that cannot run."""
        for cell in self.cells:
            if self.status[cell.label] == "failed" and cell.arm not in self.blocked:
                (cell.folder / _ERROR).unlink(missing_ok=True)
                self.status[cell.label] = "waiting"

    def run(
        self,
        command: Sequence[str] | None,
        processes: Processes,
        bar: Bar,
        changed: Callable[[], None],
        later: Sequence[Cell] = (),
    ) -> None:
        """Run every unfinished pipeline, in order, ``workers`` at a time.

        Args:
            changed: called after each run.
            later: pipelines of a later part of the study, for the time that is left.
        """
        todo, running = self.todo(), processes.running
        threads = max(1, (os.cpu_count() or 1) // self.study.workers)
        told = 0.0
        # After a stop, the loop goes on until the runs have saved and ended.
        while (todo and not processes.stopped) or running:
            for cell in list(todo):
                room = len(running) < self.study.workers and not processes.stopped
                if room and self._ready(cell):
                    todo.remove(cell)
                    processes.start(cell, command, threads)
            if self._reap(processes, bar):
                changed()
                told = 0.0
            if time.monotonic() - told > 5:
                bar.note(self._note(processes, [*todo, *later]))
                told = time.monotonic()
            # What is left waits for a run that failed.
            if not running and not any(self._ready(cell) for cell in todo):
                break
            time.sleep(0.1)

    def _ready(self, cell: Cell) -> bool:
        return all(self.made[name] for name in cell.needs)

    def _reap(self, processes: Processes, bar: Bar) -> bool:
        """Look after processes that have ended. Returns whether there were any."""
        ended = 0
        for label, (cell, process, _) in list(processes.running.items()):
            code = process.poll()
            if code is None:
                continue
            ended += 1
            del processes.running[label]
            # A run that was stopped has not failed: it resumes.
            if code and not processes.stopped:
                (cell.folder / _ERROR).write_text(_reason(cell.folder / "log.txt", code) + "\n")
            self.look(cell)
            if not code and not self.made[label]:  # or it would wait forever
                sentence = "the run's inputs changed while it ran; start the study again\n"
                (cell.folder / _ERROR).write_text(sentence)
                self.look(cell)
            if self.status[label] == "failed":
                console.print(f"{label} failed: {self.errors[label]}", soft_wrap=True)
            if self.status[label] != "waiting":
                bar.advance()
        return ended > 0

    def _note(self, processes: Processes, todo: Sequence[Cell]) -> str:
        """What runs, and how long the rest takes if its runs take as long as others of the same
        arm did."""
        bad = sum(status == "failed" for status in self.status.values())
        seconds: dict[str | None, list[float]] = {}
        for cell in self.cells:
            entry = self.entries.get(cell.label)
            took = entry["seconds"] if entry else seconds_of(cell) if not cell.arm else None
            if took is not None:
                seconds.setdefault(cell.arm, []).append(took)
        parts = [f"{bad} failed"] if bad else []
        if seconds:
            means = {arm: sum(values) / len(values) for arm, values in seconds.items()}
            arms = [value for arm, value in means.items() if arm is not None] or [*means.values()]
            usual = sum(arms) / len(arms)
            left = sum(means.get(cell.arm, usual) for cell in todo)
            for cell, _, since in processes.running.values():
                left += max(0.0, means.get(cell.arm, usual) - (time.monotonic() - since))
            parts.append(f"about {math.ceil(left / self.study.workers / 60)} min left")
        return " | ".join([*parts, *processes.running])


def _made_by(cell: Cell) -> str | None:
    """The version of the code that made a run; None for a run of an older version."""
    note = cell.folder / _CODE
    return note.read_text(encoding="utf-8").strip() if note.exists() else None


def _reason(log: Path, code: int) -> str:
    """Why a run failed: the last line of its log that says so."""
    if code < 0:
        return f"{KILLED} {-code}; there may be too little memory"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error:")] or lines
    return reasons[-1].removeprefix("error: ") if reasons else f"ended with code {code}"


STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop a study."""
