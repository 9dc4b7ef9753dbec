"""Reads the text of a file in the encodings that spreadsheets write."""

from __future__ import annotations

import codecs
from pathlib import Path

from mmemo.errors import DataError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LARGEST = 2 << 30  # bytes


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: it is in another encoding, or too large.
    """
    if path.stat().st_size > _LARGEST:
        raise DataError("is larger than 2 GiB; split it", file=str(path))
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"line {line}: is no {encoding.upper()} text; save the file as UTF-8", file=str(path)
        ) from error
    if "\0" in text:
        raise DataError("holds NUL characters, so it is no text; save it as UTF-8", file=str(path))
    return text
