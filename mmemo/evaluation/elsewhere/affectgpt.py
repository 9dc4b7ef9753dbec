"""AffectGPT's prediction files (``.npz``): ``name2reason``, a mapping of clip to text, or
``filenames`` with ``fileitems``, the words that were extracted for each clip.

The arrays hold pickled objects. They are read by a reader that makes plain values only and runs no
code.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmemo.errors import DataError
from mmemo.evaluation.elsewhere.prediction import Columns, Prediction, as_text


def read(path: Path, columns: Columns) -> list[Prediction]:
    """The predictions of a file.

    Raises:
        DataError: it cannot be read, or holds neither form.
    """
    try:
        reader: Any = importlib.import_module("mmemo.data.releases.npz")
    except ModuleNotFoundError as error:
        raise DataError(
            "is an npz of Python objects, which this version does not read; save the predictions "
            "as CSV with the columns sample_id and prediction",
            file=str(path),
        ) from error
    return _predictions(reader.read_npz_objects(path), path)


def _predictions(arrays: Mapping[str, Any], path: Path) -> list[Prediction]:
    reasons = arrays.get("name2reason")
    if isinstance(reasons, Mapping):
        pairs: list[tuple[Any, Any]] = [*reasons.items()]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    elif "filenames" in arrays and "fileitems" in arrays:
        names, items = [*arrays["filenames"]], [*arrays["fileitems"]]
        if len(names) != len(items):
            message = f"has {len(names)} filenames and {len(items)} fileitems"
            raise DataError(message, file=str(path))
        pairs = [*zip(names, items, strict=True)]
    else:
        raise DataError(
            f"has neither 'name2reason' nor 'filenames' with 'fileitems', but {', '.join(arrays)}",
            file=str(path),
        )
    return [
        Prediction(f"entry {number}", (as_text(name).strip(),), as_text(text))
        for number, (name, text) in enumerate(pairs, start=1)
    ]
