"""The predictions file: one JSON line an answer, in the benchmark's order, written as it goes.

Answers are made in fixed batches of consecutive questions and written a whole batch at a time. A
later run keeps the leading batches whose keys are all unchanged and goes on behind them, so the
finished file has the same bytes whether or not a run was killed: an answer never depends on where
a run was resumed, not even through the padding of its batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmemo.errors import EvaluationError

Row = dict[str, Any]


def key_of(parts: object) -> str:
    """The identity of an answer: a hash of all that it depends on (JSON values)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class PredictionsFile:
    """``path`` opened for a run that will give answers with ``keys``, in batches of
    ``batch_size``. What it holds of another run from the first difference on is cut off before the
    first new answer is written: a run that fails before it has one destroys none."""

    def __init__(self, path: Path, keys: Sequence[str], batch_size: int) -> None:
        self.path = path
        self._keys = keys
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept, self._end = _reusable(path, keys, batch_size)
        self.dropped = 0
        if path.exists():
            with path.open("rb") as handle:
                handle.seek(self._end)
                self.dropped = sum(line.endswith(b"\n") for line in handle)
            if len(self.kept) == len(keys):
                os.truncate(path, self._end)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of one batch, and wait until they are on the disk."""
        expected = self._keys[len(self.kept) : len(self.kept) + len(rows)]
        if [row["key"] for row in rows] != list(expected):
            raise EvaluationError(f"{self.path}: answers came out of order; report this")
        data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("rb+" if self.path.exists() else "wb") as handle:
            handle.seek(self._end)
            handle.truncate()
            handle.write(data.encode())
            self._end = handle.tell()
            handle.flush()
            os.fsync(handle.fileno())
        self.kept.extend(rows)


def read_predictions(path: Path) -> list[Row]:
    """All answers of a finished evaluation.

    Raises:
        EvaluationError: the file is missing or a line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror}); run the evaluation first"
        ) from error
    rows = [_row(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if row is None:
            raise EvaluationError(
                f"{path}:{number}: is damaged; run the evaluation again, it will go on from there"
            )
    return [row for row in rows if row is not None]


def _reusable(path: Path, keys: Sequence[str], batch_size: int) -> tuple[list[Row], int]:
    """Rows of the leading whole batches that are as asked, and the offset where they end."""
    if not path.exists():
        return [], 0
    kept: list[Row] = []
    end = 0
    with path.open("rb") as handle:
        for start in range(0, len(keys), batch_size):
            wanted = keys[start : start + batch_size]
            lines = [handle.readline() for _ in wanted]
            # A line without its end would take the next answer's line into itself.
            batch = [_row(line) if line.endswith(b"\n") else None for line in lines]
            if [row and row["key"] for row in batch] != list(wanted):
                break
            kept.extend(row for row in batch if row is not None)
            end = handle.tell()
    return kept, end


def _row(line: bytes) -> Row | None:
    """The row of a whole line, or None."""
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) and "key" in value else None  # pyright: ignore[reportUnknownVariableType]
