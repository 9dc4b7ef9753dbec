"""Output to the terminal: progress bars with the time left, tables, and errors of one line.

Paths, ids, labels and answers are printed as they are: no text is read as markup, in which ``[a]``
would vanish, or as the name of an emoji. Styles are given by ``style=`` or ``Text.assemble``.
"""

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

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def hush() -> None:
    """Silence remarks that libraries make on import. Call it before they are imported."""
    for name in ("bitsandbytes", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # runs set it themselves


class Bar:
    """A progress bar: ``advance`` moves it, and ``note`` sets the short text at its end."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def progress(
    title: str, total: int, *, done: int = 0, unit: str = "", left: bool = True
) -> Generator[Bar]:
    """Show a progress bar with the time left. Only the first rank shows it.

    Args:
        done: steps that are done already, for a run that resumes.
        unit: what a step is: ``clips``.
        left: estimate the time left, from steps of seconds that take about as long as each other.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if left else ()),
        TextColumn("{task.fields[note]}", markup=False),
    )
    hidden = os.environ.get("RANK", "0") != "0"
    with Progress(*columns, console=console, disable=hidden) as bars:
        task = bars.add_task(title, total=total, completed=done, note="", unit=unit)
        yield Bar(bars, task)
