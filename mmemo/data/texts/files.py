"""Tables of text data sets as they are released: CSV, TSV with or without a header, JSON Lines.

A byte order mark, Windows line ends, blank lines, spaces around the names of columns, and columns
without a name are no reason to fail. A line that cannot be read becomes an
:class:`~mmemo.data.adapter.Excluded`, never a wrong row.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from mmemo.config import nearest
from mmemo.data.adapter import Excluded
from mmemo.errors import DataError

Cells = dict[str, str]


def read_cells(
    path: Path,
    needs: Sequence[str],
    *,
    quoted: bool = True,
    columns: Sequence[str] | None = None,
) -> Iterator[Cells | Excluded]:
    """The rows of a table by column, without spaces around the cells.

    Args:
        path: a file with commas between its cells, or with tabs if it ends in .tsv.
        needs: columns that each row must have. They are found in any case.
        quoted: whether a quotation mark begins a cell that may hold separators. Off, it is text.
        columns: the names of the columns of a file without a header.

    Raises:
        DataError: the file is missing, is no UTF-8 text, or lacks a column.
    """
    text = read_text(path)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    csv.field_size_limit(sys.maxsize)  # of the whole process; the default is too short for texts
    header = list(columns) if columns is not None else [name.strip() for name in next(reader, [])]
    header = [next((n for n in needs if n.casefold() == h.casefold()), h) for h in header]
    missing = [name for name in needs if name not in header]
    if missing:
        guess = nearest(missing[0], header)
        has = f"it has {', '.join(filter(None, header)) or 'none'}"
        hint = f"did you mean '{guess}'?" if guess else has
        raise DataError(f"has no column '{missing[0]}'; {hint}", file=str(path))
    return _rows(reader, header, max(header.index(name) for name in needs), path.name)


def _rows(reader: Any, header: list[str], last: int, file: str) -> Iterator[Cells | Excluded]:
    try:
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if last < len(cells) <= len(header):
                yield {
                    name: cell.strip() for name, cell in zip(header, cells, strict=False) if name
                }
            else:
                detail = f"{len(cells)} cells under {len(header)} columns"
                yield Excluded(where, "wrong number of cells", detail)
    except csv.Error as error:
        yield Excluded(f"{file}:{reader.line_num}", "cannot be read", str(error))


def read_objects(path: Path) -> Iterator[dict[str, Any] | Excluded]:
    """The objects of a JSON Lines file, or of a file with one JSON list.

    Raises:
        DataError: the file is missing or is no UTF-8 text.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _listed(read_json(path), path.name)
    return _lines(text, path.name)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: the file is missing, is no UTF-8 text, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error}); fetch it again", file=str(path)) from error


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: the file is missing or is no UTF-8 text.
    """
    try:
        # read_text() would change line ends inside of cells.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}); give the folder of the release", file=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; save it as UTF-8", file=str(path)) from error


def find_file(root: Path, *names: str) -> Path:
    """The file in ``root`` or below that the first of these names (patterns) with any names.

    Raises:
        DataError: there is none, or there are several beside each other.
    """
    for name in names:
        found = [
            path
            for path in sorted(root.rglob(name))
            if path.is_file() and not path.name.startswith(".")
        ]
        if found:
            depth = min(len(path.parts) for path in found)
            nearest_ones = [path for path in found if len(path.parts) == depth]
            if len(nearest_ones) > 1:
                told = ", ".join(path.name for path in nearest_ones[:3])
                raise DataError(f"has several files {name} ({told}); name one", file=str(root))
            return nearest_ones[0]
    raise DataError(f"has no file {' or '.join(names)}; fetch it again", file=str(root))


def plain(text: str) -> str:
    """A text to compare: one Unicode form, no double spaces, no case."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _lines(text: str, file: str) -> Iterator[dict[str, Any] | Excluded]:
    # splitlines() would also split at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Excluded(f"{file}:{number}", "no JSON", str(error))
            continue
        yield from _listed([value], file, number)


def _listed(value: Any, file: str, start: int = 1) -> Iterator[dict[str, Any] | Excluded]:
    for number, one in enumerate(cast("list[Any]", value), start=start):
        if isinstance(one, dict):
            yield cast("dict[str, Any]", one)
        else:
            yield Excluded(f"{file}:{number}", "no object")
