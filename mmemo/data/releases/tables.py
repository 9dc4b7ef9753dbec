"""Tables of released data sets, as they are found: CSV, TSV, JSON and JSON Lines.

Releases do not keep to their own suffixes: a ``.jsonl`` may hold one JSON list, a ``.json`` one
object a line, or an object that maps ids to rows or has the list inside. Any of them may begin with
a byte order mark, or be in an encoding of its own country. A line that cannot be read is one
:class:`~mmemo.data.adapter.Excluded`, never a wrong row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmemo.data.adapter import Excluded
from mmemo.errors import DataError

Values = dict[str, Any]
TABLES = (".csv", ".json", ".jsonl", ".tsv")
_LONGEST_CELL = 2**30
# Word processors' quotes and dashes, which some releases hold as C1 control characters.
_CONTROLS = {
    code: char for code in range(0x80, 0xA0) if (char := bytes([code]).decode("cp1252", "ignore"))
}

_HIGH = re.compile(rb"[\x80-\xff]")
_MANY_BYTES = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
"""Characters that UTF-8 writes as more than one byte."""


def read_table(
    path: Path,
    needs: Sequence[str] = (),
    *,
    delimiter: str | None = None,
    quoted: bool = True,
    columns: Sequence[str] | None = None,
) -> Iterator[Values | Excluded]:
    """The rows of a file, in order. Cells of CSV are texts without surrounding spaces.

    Args:
        needs: columns that the file must have. They have that spelling in the rows, whatever their
            case is in the file, and are "" where a cell is empty; an empty cell of another column
            is no value.
        delimiter: between the cells; by default the tab of ``.tsv``, else told from the header, or
            a comma without one.
        quoted: whether a quotation mark begins a cell that may hold separators. Off, it is text.
        columns: the names of the columns of a file without a header.

    Raises:
        DataError: the file is missing, cannot be decoded, lacks a column, or holds no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        message = f"must end in {', '.join(TABLES)}; export the table as one of them"
        raise DataError(message, file=str(path))
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        # Of the whole process; the default is too short for texts.
        csv.field_size_limit(_LONGEST_CELL)
        first = text.split("\n", maxsplit=1)[0]
        told = "," if columns is not None else max(",;\t", key=first.count)
        delimiter = delimiter or ("\t" if suffix == ".tsv" else told)
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        header = _header(reader, needs, columns, path)
        return _csv_rows(reader, header, needs, path.name)
    whole = _json(text)
    if not isinstance(whole, Exception):
        return _json_rows(whole, path)
    # A last line without its end is no reason to lose the others, a broken list is.
    if suffix == ".json" and text.lstrip().startswith("["):
        raise DataError(f"is not JSON ({whole}); fetch it again", file=str(path))
    return _json_lines(text, path.name)


def whole_table(path: Path, needs: Sequence[str] = (), *, optional: bool = False) -> list[Values]:
    """The rows of a file that is joined with another one, so that none may be missing.

    Args:
        optional: return no rows if the file does not exist.

    Raises:
        DataError: as for :func:`read_table`, or a line cannot be read.
    """
    if optional and not path.is_file():
        return []
    rows = list(read_table(path, needs))
    for row in rows:
        if isinstance(row, Excluded):
            told = f"{row.reason} ({row.detail})" if row.detail else row.reason
            raise DataError(f"line {row.row.rpartition(':')[2]}: {told}; mend it", file=str(path))
    return cast("list[Values]", rows)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: the file is missing, cannot be decoded, or is no JSON.
    """
    value = _json(read_text(path))
    if isinstance(value, Exception):
        raise DataError(f"is not JSON ({value}); fetch it again", file=str(path))
    return value


def read_object(path: Path) -> Values:
    """The object of a JSON file.

    Raises:
        DataError: as for :func:`read_json`, or it is something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError("must be a JSON object", file=str(path))
    return cast(Values, value)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark, in the encoding that it must have.

    Raises:
        DataError: the file is missing, is damaged, or is neither Unicode, GB 18030 nor
            Windows-1252.
    """
    try:
        # Path.read_text() would change line ends inside the cells of CSV.
        data = path.read_bytes()
    except FileNotFoundError as error:
        hint = "is missing; check --data, or get this file of the release"
        raise DataError(hint, file=str(path)) from error
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check --data"
        raise DataError(message, file=str(path)) from error
    # Excel saves its "Unicode text" so.
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        pass
    # Chinese is in pairs of high bytes, while a quote of Windows-1252 stands alone: in GB 18030 it
    # would become a Chinese character together with the next letter.
    paired = 2 * len(re.findall(rb"[\x81-\xfe][\xa1-\xfe]", data))
    chinese = paired >= 0.9 * len(_HIGH.findall(data))
    # One damaged byte must not turn a whole file of UTF-8 into other letters.
    if not chinese and len(_MANY_BYTES.findall(data)) > len(
        _HIGH.findall(_MANY_BYTES.sub(b"", data))
    ):
        raise DataError("is damaged UTF-8; fetch it again", file=str(path))
    try:
        return data.decode("gb18030" if chinese else "cp1252")
    except UnicodeDecodeError as error:
        message = "is in no encoding that is known here; save it as UTF-8"
        raise DataError(message, file=str(path)) from error


def tables(folder: Path, pattern: str = "*") -> list[Path]:
    """The tables in a folder and below, in the order of their names.

    Raises:
        DataError: there is none.
    """
    found = sorted(file for file in folder.glob(pattern) if file.suffix.lower() in TABLES)
    if not found:
        raise DataError(f"has no table {pattern}; check --data", file=str(folder))
    return found


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


def _header(
    reader: Iterator[list[str]], needs: Sequence[str], columns: Sequence[str] | None, path: Path
) -> list[str]:
    found = [one.strip() for one in next(reader, [])] if columns is None else list(columns)
    spelt = {name.casefold(): name for name in needs}
    header = [spelt.get(name.casefold(), name) for name in found]
    lacks = [name for name in needs if name not in header]
    if lacks:
        told = ", ".join(filter(None, found)) or "none"
        message = f"has no column '{lacks[0]}' (it has {told})"
        raise DataError(f"{message}; this is another form of the release", file=str(path))
    return header


def _csv_rows(
    reader: Any, header: Sequence[str], needs: Sequence[str], name: str
) -> Iterator[Values | Excluded]:
    # Cells that are left away at the end of a line are empty if no needed one is among them.
    least = max((header.index(name) + 1 for name in needs), default=len(header))
    try:
        for line in reader:
            cells = [cell.translate(_CONTROLS).strip() for cell in line]
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            if least <= len(cells) <= len(header):
                pairs = zip(header, cells, strict=False)
                row = {key: cell for key, cell in pairs if key and (cell or key in needs)}
                if any(row.values()):
                    yield row
            elif any(cells):
                detail = f"{len(cells)} cells under {len(header)} columns"
                yield Excluded(f"{name}:{reader.line_num}", "wrong number of cells", detail)
    except csv.Error as error:
        yield Excluded(f"{name}:{reader.line_num}", "no CSV", str(error))


def _json_rows(value: Any, path: Path) -> Iterator[Values | Excluded]:
    if isinstance(value, dict) and path.suffix.lower() == ".jsonl":
        value = [value]  # one line, whatever it holds
    elif isinstance(value, dict):
        inside = cast(Values, value)
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
