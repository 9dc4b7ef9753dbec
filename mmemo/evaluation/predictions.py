"""The predictions file: one JSON line per answer, in the benchmark's order, written as it goes.

Answers are generated in fixed batches of consecutive questions and written one whole batch at a
time. A later run keeps the leading batches whose keys are all unchanged and continues behind them,
so the finished file has the same bytes whether or not a run was killed: an answer never depends on
where a run was resumed, not even through the padding of its batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.errors import EvaluationError

Row = dict[str, Any]
PARTS = "parts"
"""Folder beside a predictions file for answers that several processes give."""


def key_of(parts: object) -> str:
    """The identity of an answer: a hash of everything that it depends on (JSON values)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class PredictionsFile:
    """The predictions file ``path`` of a run that gives answers with ``keys``.

    ``kept`` holds the answers that the run need not generate again; ``dropped`` counts those that
    it will replace. Answers of another run are cut off only when the first new one is written, so a
    run that fails before it has an answer destroys none.

    Args:
        batch_size: the number of answers that are generated and written together.
    """

    def __init__(self, path: Path, keys: Sequence[str], batch_size: int) -> None:
        self.path = path
        self._keys = keys
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(files.scan(path)) if path.exists() else []
        self.kept, self._end = _reusable(lines, keys, batch_size)
        self.dropped = sum(line.whole for line in lines[len(self.kept) :])
        # No answer will be appended that would cut off what an earlier, longer run left behind.
        if path.exists() and len(self.kept) == len(keys):
            os.truncate(path, self._end)

    def replace(self, rows: Sequence[Row]) -> None:
        """Replace the kept rows, which have the same keys but were read anew. The file is rewritten
        only if one differs."""
        if list(rows) == self.kept:
            return
        # What stands behind the kept rows may still be of use to another run.
        rest = self.path.read_bytes()[self._end :]
        self.kept = list(rows)
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        own = "".join(f"{line}\n" for line in lines).encode()
        files.write_whole(self.path, own + rest)
        self._end = len(own)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of one batch, and wait until they are on the disk.

        Raises:
            EvaluationError: the rows are not those that come next.
        """
        expected = self._keys[len(self.kept) : len(self.kept) + len(rows)]
        if [row["key"] for row in rows] != list(expected):
            raise EvaluationError(
                f"{self.path}: answers came out of order; please report this fault of mmemo"
            )
        self._end = files.append_rows(
            self.path, rows, at=self._end, durable=True, ensure_ascii=False, allow_nan=False
        )
        self.kept.extend(rows)


class Parts:
    """Answers that several processes have given for the predictions file ``path``, each in a file
    of its own beside it, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self._folder, self._stem = path.parent / PARTS, path.stem

    def read(self) -> dict[str, Row]:
        """All whole answers, by key."""
        lines = [line for one in self._files() for line in files.scan(one) if line.whole]
        found = [(_key(line), line.row) for line in lines]
        return {key: row for key, row in found if key is not None}

    def append(self, rank: int, rows: Sequence[Row]) -> None:
        """Add the answers of one process, and wait until they are on the disk."""
        self._folder.mkdir(parents=True, exist_ok=True)
        own = self._folder / f"{self._stem}-{rank}.jsonl"
        files.append_rows(own, rows, durable=True, ensure_ascii=False, allow_nan=False)

    def remove(self) -> None:
        """Remove the files, whose answers are all where they belong."""
        for one in self._files():
            one.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._stem}-*.jsonl"))


def read_predictions(path: Path) -> list[Row]:
    """All answers of a finished evaluation.

    Raises:
        EvaluationError: the file is missing, or a line is damaged, a torn last one included.
    """
    try:
        lines = list(files.scan(path))
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror}); run the evaluation first"
        ) from error
    for line in lines:
        if _key(line) is None:
            raise EvaluationError(
                f"{path}:{line.number}: is damaged; run the evaluation again, it continues from "
                "there"
            )
    return [line.row for line in lines]


def _reusable(
    lines: Sequence[files.Line], keys: Sequence[str], batch_size: int
) -> tuple[list[Row], int]:
    """Rows of the leading whole batches whose keys are as wanted, and the offset behind them."""
    kept: list[Row] = []
    end = 0
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        found = lines[start : start + len(batch)]
        # A line without its line break would take the next answer's line into itself.
        if [line.whole and _key(line) for line in found] != list(batch):
            break
        kept.extend(line.row for line in found)
        end = found[-1].end
    return kept, end


def _key(line: files.Line) -> str | None:
    return line.row.get("key") if isinstance(line.row, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
