"""The event log of a run: one JSON object per line, only ever appended to.

It records what a run did, with which inputs, and what went wrong: the resolved config, hashes of
content files and checkpoints, sample ids of skipped steps, excluded clips, metrics. Each line is
written at once, so a killed run leaves a readable file. Only the main rank writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunRecord:
    """The event log of one run folder, ``<folder>/events.jsonl``."""

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.path = folder / "events.jsonl"
        self.enabled = enabled
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            _close_torn_line(self.path)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event. ``fields`` are JSON values; anything else, such as a path, is written
        as a string."""
        if not self.enabled:
            return
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, default=str)
        # One write of a short line on an O_APPEND descriptor does not interleave with others.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)

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
    """The complete events of a file. A line that a kill cut off is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                value: Any = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


def _close_torn_line(path: Path) -> None:
    """End an incomplete last line, so that the next event starts on a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            handle.write(b"\n")
