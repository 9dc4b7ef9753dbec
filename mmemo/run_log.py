"""Append-only run events, one JSON object a line: what a run did, with what, and what went wrong.

The record is evidence: the resolved config, hashes of content files and checkpoints, sample ids
of skipped steps, excluded clips, metrics. Lines are written whole, so a killed run leaves a
readable file. Only the main rank of a distributed run writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo import files


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
            row = {"time": round(time.time(), 3), "kind": kind, **fields}
            files.append_rows(self.path, [row], default=str)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All whole events so far, optionally of one kind."""
        return [event for event in read_events(self.path) if kind in (None, event.get("kind"))]


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole events of a file; a line cut by a kill is skipped."""
    return (row for row in files.read_intact_rows(path) if isinstance(row, dict))
