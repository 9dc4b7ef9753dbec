"""Tables of released data sets: JSON, JSON Lines, CSV and TSV files, as they are found.

Releases do not keep to their own suffixes: a ``.jsonl`` may hold one JSON list, a ``.json`` one
object a line, or an object that maps ids to rows or has the list inside, and any of them may begin
with a byte order mark. A line that cannot be read is one :class:`~mmemo.data.adapter.Excluded`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mmemo.data.adapter import Excluded
from mmemo.errors import DataError

Values = dict[str, Any]
_LONGEST_CELL = 2**24


def read_table(path: Path) -> Iterator[Values | Excluded]:
    """The rows of a file, in order. An empty cell of CSV is a missing value.

    Raises:
        DataError: the file cannot be read, is no UTF-8 text, or holds no rows.
    """
    try:
        # read_text() would change line ends inside the cells of CSV.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check --data"
        raise DataError(message, file=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; save it as UTF-8", file=str(path)) from error
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(text, path.name, "\t" if suffix == ".tsv" else None)
    if suffix not in (".json", ".jsonl"):
        message = "must end in .json, .jsonl, .csv or .tsv; export the table as one of them"
        raise DataError(message, file=str(path))
    whole = _json(text)
    if isinstance(whole, Exception):
        # A last line without its end is no reason to lose the others, a broken list is.
        if suffix == ".json" and text.lstrip().startswith("["):
            raise DataError(f"is not JSON ({whole}); fetch it again", file=str(path))
        return _json_lines(text, path.name)
    return _json_rows(whole, path)


def tables(folder: Path, pattern: str = "*") -> list[Path]:
    """The tables in a folder and below, in the order of their names.

    Raises:
        DataError: there is none.
    """
    known = (".json", ".jsonl", ".csv", ".tsv")
    found = sorted(file for file in folder.glob(pattern) if file.suffix.lower() in known)
    if not found:
        raise DataError(f"has no table {pattern}; check --data", file=str(folder))
    return found


def _json_rows(value: Any, path: Path) -> Iterator[Values | Excluded]:
    if isinstance(value, dict):
        inside = cast("dict[str, Any]", value)
        lists = [one for one in inside.values() if isinstance(one, list)]
        if inside and all(isinstance(one, dict) for one in inside.values()):
            value = [{"id": key, **row} for key, row in inside.items()]
        elif len(lists) == 1 and all(isinstance(one, dict) for one in lists[0]):
            value = lists[0]
        else:
            value = [inside]  # a file of one row
    if not isinstance(value, list):
        raise DataError("holds no list of rows; check that it is the right file", file=str(path))
    rows = cast("list[Any]", value)
    for number, row in enumerate(rows, start=1):
        yield _row(row, f"{path.name}:{number}")


def _json_lines(text: str, name: str) -> Iterator[Values | Excluded]:
    # splitlines() would also split at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value = _json(line)
            where = f"{name}:{number}"
            failed = isinstance(value, Exception)
            yield Excluded(where, "no JSON", str(value)) if failed else _row(value, where)


def _csv_rows(text: str, name: str, delimiter: str | None) -> Iterator[Values | Excluded]:
    csv.field_size_limit(_LONGEST_CELL)  # of the whole process; the default is 131,072
    first = text.split("\n", maxsplit=1)[0]
    delimiter = delimiter or max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in reader:
            where = f"{name}:{reader.line_num}"
            if len(cells) == len(header):
                yield {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
            elif any(cell.strip() for cell in cells):
                detail = f"{len(cells)} cells under {len(header)} columns"
                yield Excluded(where, "wrong number of cells", detail)
    except csv.Error as error:
        yield Excluded(f"{name}:{reader.line_num}", "no CSV", str(error))


def _row(value: Any, where: str) -> Values | Excluded:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    return Excluded(where, "no object")


def _json(text: str) -> Any:
    """The value of a JSON text, or the error, which no JSON value is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        return error
