"""Sidecar files of an evaluation: further numbers about its answers, as JSON and as a CSV table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row, key_of
from mmemo.evaluation.results import EvalResult


def answers_key(rows: Sequence[Row]) -> str:
    """A hash that identifies the answers of a run."""
    return key_of([row["key"] for row in rows])


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One kind of sidecar file, and its table."""

    file: str
    """Name of the JSON file. Its ``answers`` is the :func:`answers_key` of the answers that it
    belongs to."""
    table: str
    """Name of the CSV file, in long format."""
    schema: int
    columns: Sequence[str]
    remedy: str
    """What errors advise to do about a damaged file."""

    def write(self, folder: Path, found: Mapping[str, Any], rows: Iterable[Row]) -> None:
        """Write both files, each in one step."""
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for name, body in ((self.table, table.getvalue()), (self.file, text)):
            files.write_whole(folder / name, body)

    def drop(self, folder: Path) -> None:
        """Remove both files."""
        for name in (self.file, self.table):
            (folder / name).unlink(missing_ok=True)

    def drop_other(self, folder: Path, rows: Sequence[Row]) -> None:
        """Remove both files if they belong to other answers than ``rows``."""
        try:
            found: Any = json.loads((folder / self.file).read_text(encoding="utf-8"))
            stale = found.get("answers") != answers_key(rows)
        except OSError:
            return
        except (ValueError, AttributeError):
            # A damaged file cannot be shown to belong to these answers.
            stale = True
        if stale:
            self.drop(folder)

    def read(self, result: EvalResult) -> Mapping[str, Any] | None:
        """The contents of the JSON file beside an evaluation; None if there is none.

        Raises:
            EvaluationError: the file is damaged, or belongs to other answers.
        """
        path = result.folder / self.file
        if not path.exists():
            return None
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            fits = found["schema"] == self.schema
            fits = fits and found["answers"] == answers_key(result.rows())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}: is damaged; {self.remedy}") from error
        if not fits:
            raise EvaluationError(f"{path}: does not fit the answers beside it; {self.remedy}")
        return found
