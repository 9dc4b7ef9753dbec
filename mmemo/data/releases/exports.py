"""Exports of data sets of the Hugging Face hub: parquet files, JSON Lines or CSV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.releases.tables import read_table
from mmemo.errors import DataError
from mmemo.files import write_whole


def read_export(
    root: Path, needs: Sequence[str], sounds: Path | None = None
) -> Iterator[dict[str, Any] | Excluded]:
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
        rows = read_parquet(file, sounds) if kind == ".parquet" else read_table(file, needs)
        for row in rows:
            lacks = [] if isinstance(row, Excluded) else [one for one in needs if one not in row]
            if lacks:
                raise DataError(f"has a row without '{lacks[0]}'", file=str(file))
            yield row


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


def _files(root: Path, suffix: str) -> list[Path]:
    found = (path for path in root.rglob("*") if path.suffix.lower() == suffix)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
