"""The file that a challenge wants: one row for each clip of its list of candidates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmemo import files
from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row


@dataclass(frozen=True, slots=True)
class Submission:
    """What was written: all rows, and those that got the fallback because there is no answer for
    them, or none that names a label."""

    rows: int
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]


def write_submission(
    output: Path,
    candidates: Sequence[Mapping[str, str]],
    answers: Mapping[str, Row],
    *,
    column: str,
    fallback: str,
    write: Callable[[object], str] = str,
) -> Submission:
    """Write ``output``, a CSV file: the columns of ``candidates``, with ``column`` filled in.

    Args:
        candidates: the rows of the challenge's list, each with ``id``, under which its answer is,
            and which is not written. Their order is kept.
        answers: the answers of a run by id.
        fallback: what is written where there is no answer.
        write: the text of an answer in the file.

    Raises:
        EvaluationError: there is no candidate, or no answer for any.
    """
    missing: list[str] = []
    unreadable: list[str] = []
    lines: list[dict[str, str]] = []
    for candidate in candidates:
        name = candidate["id"]
        row = answers.get(name)
        if row is None:
            missing.append(name)
        elif row["status"] != "ok":
            unreadable.append(name)
        read = row is not None and row["status"] == "ok"
        value = write(row["answer"]) if row is not None and read else fallback
        kept = {key: text for key, text in candidate.items() if key != "id"}
        lines.append({**kept, column: value})
    if len(missing) == len(lines):
        raise EvaluationError(
            "the run has no answer for any candidate; ask them with --option split=candidates"
        )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    files.write_whole(output, text.getvalue().encode("utf-8"))
    return Submission(len(lines), tuple(missing), tuple(unreadable))
