"""What a person at a terminal sees: progress bars with time left, tables, one-line errors."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def hush() -> None:
    """Keep out remarks that libraries make as they are imported; call it before they are."""
    for name in ("bitsandbytes", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # the run sets its own number


class Bar:
    """A running progress bar; ``advance`` moves it, ``note`` sets the short text at its end."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def progress(title: str, total: int, *, done: int = 0, unit: str = "") -> Generator[Bar]:
    """A progress bar with time left. Silent on every rank but the first."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = os.environ.get("RANK", "0") != "0"
    with Progress(*columns, console=console, disable=hidden) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")
        yield Bar(bars, task)
