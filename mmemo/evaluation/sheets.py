"""Small tables of text: CSV files, and the first sheet of Excel files, read without a library."""

from __future__ import annotations

import csv
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from mmemo.errors import EvaluationError

_NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LARGEST = 64 << 20  # bytes of one part of an Excel file, unpacked


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows under the header of a ``.csv`` or ``.xlsx`` file; cells as text, "" where empty.

    Raises:
        EvaluationError: the file cannot be read as a table.
    """
    try:
        cells = _xlsx(path) if path.suffix.lower() == ".xlsx" else _csv(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise EvaluationError(f"{path}: cannot be read as a table ({error})") from error
    if not cells:
        raise EvaluationError(f"{path}: has no header row")
    header = [name.strip() for name in cells[0]]
    width = len(header)
    return [
        dict(zip(header, (row + [""] * width)[:width], strict=True))
        for row in cells[1:]
        if any(row)
    ]


def _csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.reader(handle))


def _xlsx(path: Path) -> list[list[str]]:
    with zipfile.ZipFile(path) as archive:
        shared: list[str] = []
        if "xl/sharedStrings.xml" in archive.namelist():
            strings = _part(archive, "xl/sharedStrings.xml")
            shared = [_text(item) for item in strings.iter(f"{_NAMESPACE}si")]
        sheet = _part(archive, "xl/worksheets/sheet1.xml")
    rows: list[list[str]] = []
    for row in sheet.iter(f"{_NAMESPACE}row"):
        cells: list[str] = []
        for cell in row.iter(f"{_NAMESPACE}c"):
            column = _column(cell.get("r", "")) if cell.get("r") else len(cells)
            cells += [""] * (column + 1 - len(cells))
            value = _text(cell)
            cells[column] = shared[int(value)] if cell.get("t") == "s" and value else value
        rows.append(cells)
    return rows


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > _LARGEST:
        raise ValueError(f"{name} is larger than {_LARGEST} bytes")
    data = archive.read(name)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{name} declares entities")
    return ElementTree.fromstring(data)


def _text(element: ElementTree.Element) -> str:
    """All text inside, as of the runs of a formatted string; phonetic readings are left out."""
    found = [element.text or ""] if element.tag in (f"{_NAMESPACE}t", f"{_NAMESPACE}v") else []
    found += [_text(child) for child in element if child.tag != f"{_NAMESPACE}rPh"]
    return "".join(found)


def _column(reference: str) -> int:
    """0 for "A7", 26 for "AA7"."""
    letters = re.match(r"[A-Z]+", reference)
    number = 0
    for letter in letters.group() if letters else "A":
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1
