"""JSON: one object a line as mmemo writes it (``{"sample_id": ..., "raw": ...}``), a list of such
objects, such a list under one of a few names, or one mapping of id to text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmemo.errors import DataError
from mmemo.evaluation.elsewhere.prediction import (
    Columns,
    Prediction,
    as_text,
    predictions_of,
)
from mmemo.evaluation.elsewhere.texts import read_text

_LISTS = ("items", "predictions", "results", "samples", "responses", "data")
Located = Iterator[tuple[str, Mapping[str, Any]]]


def read(path: Path, columns: Columns) -> list[Prediction]:
    """The predictions of a JSON or JSON Lines file.

    Raises:
        DataError: it is damaged, or a row has no id or no text.
    """
    return predictions_of(rows(path), columns, file=str(path))


def rows(path: Path) -> Located:
    """Where each object stands, and the object.

    Raises:
        DataError: the file is no JSON, or holds something else than objects.
    """
    text = read_text(path)
    whole = _whole(text, path)
    if isinstance(whole, list):
        listed: list[Any] = whole  # pyright: ignore[reportUnknownVariableType]
        for number, row in enumerate(listed, start=1):
            yield f"entry {number}", _object(row, f"entry {number}", path)
        return
    if isinstance(whole, Mapping):
        yield from _mapped(whole, path)  # pyright: ignore[reportUnknownArgumentType]
        return
    # Not splitlines: a text may hold other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                message = f"{where}: is no JSON ({error}); mend or remove it"
                raise DataError(message, file=str(path)) from error
            yield where, _object(row, where, path)


def _whole(text: str, path: Path) -> Any:
    """The one value of the file; None for JSON Lines."""
    lines = text.strip().split("\n", 1)
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except _RepeatedKeyError as error:
        # Lines of their own are told apart by the caller, whose message can name one.
        if len(lines) > 1 and lines[0].strip() in ("{", "["):
            raise DataError(f"{error}", file=str(path)) from error
        return None
    except (ValueError, RecursionError):
        return None
    if isinstance(value, Mapping):
        within = (value[name] for name in _LISTS if isinstance(value.get(name), list))
        listed = next(within, None)
        if listed is not None:
            return listed  # pyright: ignore[reportUnknownVariableType]
    # One object is a row, unless it maps ids to texts.
    if isinstance(value, Mapping) and not _is_mapping_of_texts(value):  # pyright: ignore[reportUnknownArgumentType]
        return [value] if len(lines) > 1 else None
    return value


def _is_mapping_of_texts(value: Mapping[str, Any]) -> bool:
    known = {"raw", "prediction", "pred", "response", "output", "answer", "sample_id", "doc_id"}
    return bool(value) and not known & {str(key).lower() for key in value}


def _mapped(value: Mapping[str, Any], path: Path) -> Located:
    """A mapping of id to text, or of id to an object with a text."""
    for key, one in value.items():
        where = f"key '{as_text(key)}'"
        if isinstance(one, Mapping):
            yield where, {"sample_id": key, **one}
        else:
            yield where, {"sample_id": key, "raw": one}


def _object(row: Any, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: is no object with an id and a text", file=str(path))
    return row  # pyright: ignore[reportUnknownVariableType]


class _RepeatedKeyError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are unique. Python would silently keep the last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise _RepeatedKeyError(f"the key '{key}' occurs twice with different values")
        found[key] = value
    return found
