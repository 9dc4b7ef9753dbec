"""Exports of data sets: parquet files of the Hugging Face hub, JSON and JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.data.folders import read_table, read_text
from mmemo.errors import DataError
from mmemo.files import write_whole


def read_export(
    root: Path, needs: Sequence[str], sounds: Path | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the Hugging Face hub: of all parquet files in a folder, or of its
    JSONL or CSV files, into which it was exported.

    Args:
        needs: columns that every row must have.
        sounds: as for :func:`read_parquet`.

    Raises:
        DataError: there is no such file, one cannot be read, or a row lacks a column.
    """
    kinds = (".parquet", ".jsonl", ".csv")
    found = {kind: _files(root, kind) for kind in kinds}
    kind = next((kind for kind in kinds if found[kind]), None)
    if kind is None:
        raise DataError(f"has no {' or '.join(kinds)} file; check --data", file=str(root))
    for file in found[kind]:
        rows: Any
        if kind == ".parquet":
            rows = read_parquet(file, sounds)
        elif kind == ".jsonl":
            rows = read_jsonl(file)
        else:
            rows = read_table(file, needs)
        for row in rows:
            lacks = [name for name in needs if name not in row]
            if lacks:
                raise DataError(f"has a row without '{lacks[0]}'", file=str(file))
            yield row


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of a JSON file that lists them.

    Raises:
        DataError: it is something else.
    """
    if path.suffix.lower() == ".json":
        found = _json(path, _text(path))
    else:
        lines = _text(path).split("\n")
        found: Any = [_json(path, line) for line in lines if line.strip()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):  # pyright: ignore[reportUnknownVariableType]
        raise DataError("must list JSON objects", file=str(path))
    return found  # pyright: ignore[reportUnknownVariableType]


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        DataError: it is missing, or something else.
    """
    found = _json(path, _text(path))
    if not isinstance(found, dict):
        raise DataError("must be a JSON object", file=str(path))
    return found  # pyright: ignore[reportUnknownVariableType]


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", file=str(path)) from error


def read_parquet(path: Path, sounds: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as plain values.

    A sound inside the file, ``{"bytes": ..., "path": ...}`` as the datasets library writes it,
    becomes the name of its file.

    Args:
        sounds: the folder that sounds are written to, if their files are not there yet. None leaves
            them where they are.

    Raises:
        DataError: pyarrow is not installed, or the file is no parquet file.
    """
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore
    except ImportError as error:
        hint = "needs pyarrow (pip install pyarrow); or export it as JSONL"
        raise DataError(hint, file=str(path)) from error
    try:
        batches: Any = parquet.ParquetFile(path).iter_batches(64)  # pyright: ignore
        for batch in batches:
            for row in batch.to_pylist():
                yield {key: _sound_name(value, sounds) for key, value in row.items()}
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot be read as parquet ({error})", file=str(path)) from error


def _sound_name(value: Any, folder: Path | None) -> Any:
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        return value
    sound: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
    name = os.path.basename(str(sound["path"] or "").replace("\\", "/"))
    if folder is not None and name not in ("", ".", "..") and sound["bytes"]:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            write_whole(folder / name, bytes(sound["bytes"]), durable=False)
    return name


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError("is missing; check --data, or get this file of the release", file=str(path))
    return read_text(path)


def _files(root: Path, suffix: str) -> list[Path]:
    found = (path for path in root.rglob("*") if path.suffix.lower() == suffix)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
