"""The results of one step of a long job on disk, one line per item, so a kill loses one item."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.run_log import read_events


def read_steps(path: Path, fingerprint: str) -> dict[str, Any]:
    """The results at ``path`` by key, if they have this ``fingerprint``."""
    lines = list(read_events(path))
    if not lines or lines[0].get("fingerprint") != fingerprint:
        return {}
    return {line["key"]: line["value"] for line in lines if {"key", "value"} <= {*line}}


class StepFile:
    """Results by key in a JSONL file whose first line holds the fingerprint of their settings.

    A file with another fingerprint (other settings, another model) is started afresh. A line that
    was cut off by a kill is dropped.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Read the results at ``path`` if they have this ``fingerprint``."""
        self.path, self.fingerprint = path, fingerprint
        self.known = read_steps(path, fingerprint)
        whole = [{"fingerprint": fingerprint}]
        whole += [{"key": key, "value": value} for key, value in self.known.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, so that results of other settings are gone before the first new one.
        files.write_rows(path, whole)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep results; they are on disk when this returns."""
        rows = [{"key": key, "value": value} for key, value in found.items()]
        files.append_rows(self.path, rows)
        self.known.update(found)
