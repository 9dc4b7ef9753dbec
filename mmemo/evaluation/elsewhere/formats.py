"""The formats of prediction files, told apart by their content."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mmemo.config import nearest
from mmemo.errors import ConfigError, DataError, EvaluationError
from mmemo.evaluation.elsewhere import affectgpt, jsonl, lmms_eval, tables
from mmemo.evaluation.elsewhere.prediction import Columns, Prediction
from mmemo.evaluation.elsewhere.texts import read_text

Reader = Callable[[Path, Columns], list[Prediction]]

FORMATS: Mapping[str, Reader] = {
    "jsonl": jsonl.read,
    "table": tables.read,
    "vlmevalkit": tables.read,
    "lmms-eval": lmms_eval.read,
    "affectgpt": affectgpt.read,
}
"""Name of each format to its reader."""

_NOT_READ = {
    b"\xd0\xcf\x11\xe0": "is an old Excel file (xls); save it as xlsx or CSV",
    b"\x1f\x8b": "is compressed; unpack it first",
    b"PAR1": "is a Parquet file; save it as JSON Lines or CSV",
}


def read_predictions_file(
    path: Path, format: str | None = None, columns: Columns | None = None
) -> tuple[str, list[Prediction]]:
    """The format of a file, and its predictions.

    Args:
        format: one of ``FORMATS``; told from the content unless given.

    Raises:
        ConfigError: there is no such format.
        DataError: the file is missing, damaged, or has no predictions.
    """
    if not path.is_file():
        raise DataError("is no file; give the file of the predictions", file=str(path))
    if format is not None and format not in FORMATS:
        guess = nearest(format, list(FORMATS))
        hint = f"did you mean '{guess}'?" if guess else f"use one of {', '.join(FORMATS)}"
        raise ConfigError(f"there is no format '{format}'; {hint}")
    name = format or format_of(path)
    try:
        found = FORMATS[name](path, columns or Columns())
    except EvaluationError as error:
        raise DataError(str(error)) from error
    if not found:
        raise DataError("holds no predictions", file=str(path))
    return name, found


def format_of(path: Path) -> str:
    """The format of a file, by its content.

    Raises:
        DataError: it is of a kind that is not read.
    """
    with path.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _of_archive(path)
    if head.startswith(b"\x80") or path.suffix.lower() in (".pkl", ".pickle", ".npy", ".pt"):
        raise DataError(
            "is a pickle or an array, which can run any code when it is opened; save the "
            "predictions as JSON Lines or CSV",
            file=str(path),
        )
    for start, what in _NOT_READ.items():
        if head.startswith(start):
            raise DataError(what, file=str(path))
    text = read_text(path)
    if not text.strip():
        raise DataError("is empty", file=str(path))
    if text.lstrip()[0] in "{[":
        first = next(jsonl.rows(path), ("", {}))[1]
        logged = "doc_id" in first and ("resps" in first or "filtered_resps" in first)
        return "lmms-eval" if logged else "jsonl"
    return _of_table(path)


def _of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(f"is a damaged archive ({error}); copy it again", file=str(path)) from error
    if names and all(name.endswith(".npy") for name in names):
        return "affectgpt"
    if any(name.startswith("xl/") for name in names):
        return _of_table(path)
    raise DataError("is an archive; give the file of the predictions itself", file=str(path))


def _of_table(path: Path) -> str:
    header = set(tables.header_of(path))
    return "vlmevalkit" if {"index", "question", "prediction"} <= header else "table"
