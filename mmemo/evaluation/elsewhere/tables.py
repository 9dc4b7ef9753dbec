"""Tables: CSV, TSV and Excel files, and the result files of VLMEvalKit, which are such tables.

A table has a header. Cells of missing values (empty, ``nan``, ``<NA>``, ``#N/A``) are empty texts,
which count as unreadable answers. VLMEvalKit's columns are ``index``, ``question``, ``answer`` (the
right one) and ``prediction``.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from mmemo.answers.emotion_wheels import refuse_bombs
from mmemo.errors import DataError
from mmemo.evaluation.elsewhere.prediction import Columns, Prediction, predictions_of
from mmemo.evaluation.elsewhere.texts import read_text

_MISSING = ("nan", "<na>", "#n/a")
_LONGEST = 1 << 26  # characters of a cell
_MOST_ROWS, _MOST_COLUMNS = 1_000_000, 1_000


def read(path: Path, columns: Columns) -> list[Prediction]:
    """The predictions of a table.

    Raises:
        DataError: a row is damaged, or there is no column of ids or of texts.
    """
    return predictions_of(rows(path), columns, file=str(path))


def rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, and its cells by column.

    Raises:
        DataError: the file is no table.
    """
    lines = _excel(path) if zipfile.is_zipfile(path) else _csv(path)
    header: list[str] | None = None
    for where, cells in lines:
        if header is None:
            header = [str(one or "").strip() for one in cells]
            named = [name.lower() for name in header if name]
            twice = next((name for name in named if named.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"has two columns '{twice}'; rename one", file=str(path))
            continue
        if len(cells) > len(header) and any(one not in (None, "") for one in cells[len(header) :]):
            raise DataError(
                f"{where}: has {len(cells)} cells for {len(header)} columns; put texts that hold "
                "the separator in quotes",
                file=str(path),
            )
        padded = [*cells, *[""] * (len(header) - len(cells))]
        yield where, {name: padded[place] for place, name in enumerate(header) if name}
    if header is None:
        raise DataError("is empty; give a table with a header", file=str(path))


def header_of(path: Path) -> list[str]:
    """The names of the columns, in lower case."""
    lines = _excel(path) if zipfile.is_zipfile(path) else _csv(path)
    return [str(one or "").strip().lower() for one in next(lines, ("", []))[1]]


def _csv(path: Path) -> Iterator[tuple[str, list[Any]]]:
    text = read_text(path)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    hint = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own first line
    if hint:
        text, delimiter = text.lstrip("\r\n").split("\n", 1)[1], hint.group(1)
    else:
        delimiter = max("\t,;", key=first.count)
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1 + bool(hint)
    try:
        for cells in reader:
            if any(one.strip() for one in cells):
                yield f"line {start}", [_missing(one) for one in cells]
            start = reader.line_num + 1 + bool(hint)
    except csv.Error as error:
        raise DataError(
            f"line {start}: is no row of a table ({error}); check its quotes", file=str(path)
        ) from error


def _missing(cell: str) -> str:
    return "" if cell.strip().lower() in _MISSING else cell


def _excel(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """The rows of the first sheet.

    Formulas are refused: the file may hold no value for them, and an answer that begins with "="
    becomes one. So are dates, into which Excel turns answers such as "1-2".
    """
    from openpyxl import load_workbook

    try:
        refuse_bombs(path)
        with warnings.catch_warnings(action="ignore"):  # about styles, not about cells
            book = load_workbook(path, read_only=True, data_only=False, keep_links=False)
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some writers declare the sheet's size wrongly
        found: Iterator[Any] = sheet.iter_rows()
        for number, row in enumerate(found, start=1):
            if number > _MOST_ROWS or len(row) > _MOST_COLUMNS:
                raise ValueError(f"it has over {_MOST_ROWS} rows or {_MOST_COLUMNS} columns")
            where = f"row {number}"
            cells = [_cell(one, where, path) for one in row]
            if any(one not in (None, "") for one in cells):
                yield where, cells
        book.close()
    except DataError:
        raise
    # openpyxl raises whatever a damaged workbook makes it stumble over.
    except Exception as error:
        raise DataError(
            f"cannot be read as an Excel table ({error}); save it as CSV", file=str(path)
        ) from error


def _cell(cell: Any, where: str, path: Path) -> Any:
    from openpyxl.utils.escape import unescape

    value: Any = getattr(cell, "value", None)
    kind = getattr(cell, "data_type", "n")
    if kind == "f" or isinstance(value, date | datetime | time | timedelta):
        what = "a formula" if kind == "f" else "a date"
        raise DataError(
            f"{where}: cell {cell.coordinate} is {what}, not a text; format it as text, or save "
            "the table as CSV",
            file=str(path),
        )
    if kind == "e" and str(value).lower() not in _MISSING:
        raise DataError(
            f"{where}: cell {cell.coordinate} holds the error {value}; type its text anew",
            file=str(path),
        )
    if isinstance(value, str):
        return _missing(unescape(value))
    return value
