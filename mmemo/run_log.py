"""The event log of a run: one JSON object per line, only ever appended to.

It records what a run did, with which inputs, and what went wrong: the resolved config, hashes of
content files and checkpoints, sample ids of skipped steps, excluded clips, metrics. Each line is
written at once, so a killed run leaves a readable file. Only the main rank writes.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo import files

_ANNOUNCED: dict[Path, dict[str, Any]] = {}
"""By log, the event that is written with its next one."""


def announce(folder: Path, kind: str, **fields: Any) -> None:
    """Have an event written together with the next one of ``folder``'s log.

    A run that is refused before its first event, because another one holds its folder or because
    its config contradicts itself, then leaves no trace of itself there.
    """
    _ANNOUNCED[folder / "events.jsonl"] = {"kind": kind, **fields}


def withdraw(folder: Path) -> dict[str, Any] | None:
    """Take back what was announced; None if it was written."""
    return _ANNOUNCED.pop(folder / "events.jsonl", None)


class RunRecord:
    """The event log of one run folder, ``<folder>/events.jsonl``."""

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.path = folder / "events.jsonl"
        self.enabled = enabled
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event. ``fields`` must be JSON values; paths are written as strings."""
        if self.enabled:
            announced = _ANNOUNCED.pop(self.path, None)
            rows = [*([] if announced is None else [announced]), {"kind": kind, **fields}]
            now = {"time": round(time.time(), 3)}
            files.append_rows(self.path, [{**now, **row} for row in rows], default=str)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All complete events so far, or those of one kind."""
        return [event for event in read_events(self.path) if kind in (None, event.get("kind"))]


def versions() -> dict[str, str]:
    """Versions of mmemo, Python and the libraries that decide a number, for records and results."""
    from mmemo import __version__

    libraries = ("torch", "transformers", "peft")
    return {
        "mmemo": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole events of a file; a line cut by a kill is skipped."""
    return (row for row in files.read_intact_rows(path) if isinstance(row, dict))
