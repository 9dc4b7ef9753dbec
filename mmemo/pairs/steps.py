"""One step of a long job on disk: a line for each finished item, so that a kill costs one item."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.run_log import read_events


class StepFile:
    """Results by key in a JSONL file whose first line says what they are results of.

    A file of something else (other settings, another model) is begun anew; a line that a kill has
    cut is dropped.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self.path = path
        lines = list(read_events(path))
        self.known: dict[str, Any] = {}
        if lines and lines[0].get("fingerprint") == mark:
            self.known = {
                line["key"]: line["value"] for line in lines if {"key", "value"} <= {*line}
            }
        whole = [{"fingerprint": mark}]
        whole += [{"key": key, "value": value} for key, value in self.known.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_rows(path, whole)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep results; they are on disk when this returns."""
        rows = [{"key": key, "value": value} for key, value in found.items()]
        files.append_rows(self.path, rows)
        self.known.update(found)
