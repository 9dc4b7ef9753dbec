"""Questions whose choices are columns of a table: ``choice_a``, ``choice_b`` and so on, as in MMSU
(arXiv 2506.04779). Later ones may be absent, and answers are the texts of choices, or letters."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from mmemo.answers.label_set import normalise
from mmemo.data.manifest import read_rows
from mmemo.data.row_models import Row
from mmemo.errors import DataError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv")


def tables(root: Path) -> Iterator[Row]:
    """The rows of the tables in a folder, and in its folders, in the order of their names, that
    have a question.

    Raises:
        DataError: there is no such row, or a file cannot be read.
    """
    found = False
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS):
        rows = list(_rows(path))
        if not any(row.has("question") for row in rows):
            continue
        for row in rows:
            if row.problems:
                raise row.problems[0]
            found = True
            yield row
    if not found:
        wanted = ", ".join(ENDINGS)
        raise DataError(f"has no table ({wanted}) with a column 'question'", file=str(root))


def choices_of(row: Row) -> list[str]:
    """The texts of the choices, up to the first that is empty. Numbers become texts."""
    found: list[str] = []
    for letter in string.ascii_lowercase:
        text = row.get(f"choice_{letter}")
        if text is None or not str(text).strip():
            break
        found.append(str(text).strip())
    return found


def answers_of(value: Any, choices: Sequence[str]) -> list[str]:
    """The letters of the choices that a value names: a text of a choice or its letter, or a list of
    them, also one written as JSON. Empty where one of them is no choice.

    The text counts before the letter, because a choice may itself read "B".
    """
    if value is None:
        return []
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    listed = cast("list[Any]", value) if isinstance(value, list) else [value]
    letters = string.ascii_uppercase[: len(choices)]
    by_text = {normalise(text): letter for text, letter in zip(choices, letters, strict=True)}
    if len(by_text) < len(choices):
        return []  # two choices read alike, so a text does not tell which is meant
    found = [by_text.get(normalise(str(one))) or _letter(str(one), letters) for one in listed]
    return [one for one in dict.fromkeys(found) if one] if None not in found else []


def _letter(text: str, letters: str) -> str | None:
    plain = text.strip().strip("().:").upper()
    return plain if len(plain) == 1 and plain in letters else None


def _rows(path: Path) -> list[Row]:
    """The rows of a table; none of a JSON file that holds something else."""
    try:
        return list(read_rows(path))
    except DataError:
        if path.suffix.lower() == ".json" and path.read_text("utf-8-sig").lstrip()[:1] == "{":
            return []  # such as dataset_infos.json beside the data
        raise
