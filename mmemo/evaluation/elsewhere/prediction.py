"""One prediction of a file, and how any value of a file becomes its text.

Columns and keys are known by the names that people give them. The first of a list that a row has
counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmemo.errors import DataError

IDS = (
    *("sample_id", "id", "name", "video_id", "video_name", "file_name", "filename", "file", "clip"),
    *("video", "audio", "path", "video_path", "audio_path", "utterance", "key", "index"),
)
"""Names of what identifies a row. All that a row has are tried, in this order, but ``index`` only
if it stands alone: it may be a mere place."""
TEXTS = (
    *("raw", "prediction", "pred", "predictions", "response", "output", "generated_text"),
    *("model_output", "pred_openset", "openset"),
)
"""Names of what the model wrote. ``answer`` comes last, since in many files it is the truth."""
TRUTHS = ("truth", "gold", "target", "ground_truth", "gt", "label")
"""Names of the right answer. ``answer`` is one where the row has another text."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names that the user gives, in place of the known ones."""

    id: str | None = None
    text: str | None = None
    truth: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model wrote about one question.

    ``where`` says where in the file it stands, ``ids`` are the texts that may identify the
    question, best first, and ``truth`` is the right answer as the file gives it.
    """

    where: str
    ids: tuple[str, ...]
    text: str
    truth: str | None = None
    task: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.where} ('{self.ids[0]}')" if self.ids else self.where


def as_text(value: Any) -> str:
    """A value of a file as the text that a model may have written: an empty one for a missing
    value, words for truth values, ``a, b`` for a list, ``a: 1, b: 2`` for a mapping."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        # Readers of numbers know no exponents.
        text = f"{value:.12f}" if "e" in repr(value) else repr(value)
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, Mapping):
        pairs: Mapping[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return ", ".join(f"{key}: {as_text(one)}" for key, one in pairs.items())
    if isinstance(value, list | tuple):
        listed: Sequence[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return ", ".join(map(as_text, listed))
    # JSON can hold half of a character, which no file can.
    return str(value).encode("utf-8", "replace").decode()


def predictions_of(
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    columns: Columns,
    *,
    file: str,
    ids: Sequence[str] = IDS,
    texts: Sequence[str] = (*TEXTS, "answer"),
    need_id: bool = True,
) -> list[Prediction]:
    """The predictions of rows, each with where it stands.

    Raises:
        DataError: a row has no known name for its id or its text, or an empty id.
    """
    found: list[Prediction] = []
    for where, row in rows:
        known = {str(name).strip().lower(): name for name in [*row][::-1]}  # the first one wins
        text_key = _key(known, columns.text, texts, "--text", where, file)
        id_keys = [known[name] for name in ids if name in known and known[name] != text_key]
        if len(id_keys) > 1:
            id_keys = [key for key in id_keys if key != known.get("index")]
        if columns.id is not None:
            id_keys = [_key(known, columns.id, (), "--id", where, file)]
        names = tuple(dict.fromkeys(one for key in id_keys for one in _names(row[key])))
        if not names and need_id:
            if not id_keys:
                _key(known, None, ids, "--id", where, file)
            raise DataError(f"{where}: has no id; fill in '{id_keys[0]}'", file=file)
        # The row may call its right answer "answer", but only beside a text of another name.
        truths = (*TRUTHS, "answer") if text_key != known.get("answer") else TRUTHS
        wanted = (columns.truth.lower(),) if columns.truth is not None else truths
        truth = next((row[known[name]] for name in wanted if name in known), None)
        task = row[known["task"]] if "task" in known else None
        found.append(
            Prediction(
                where,
                names,
                as_text(row[text_key]),
                None if as_text(truth) == "" else as_text(truth),
                task if isinstance(task, str) and task else None,
                row,
            )
        )
    return found


def _key(
    known: Mapping[str, str],
    given: str | None,
    names: Sequence[str],
    option: str,
    where: str,
    file: str,
) -> str:
    wanted = names if given is None else (given.strip().lower(),)
    for name in wanted:
        if name in known:
            return known[name]
    what = "id" if option == "--id" else "prediction"
    looked = f"'{given}'" if given is not None else f"{', '.join(names[:6])} or the like"
    here = ", ".join([*known.values()][::-1]) or "nothing"
    raise DataError(
        f"{where}: has no {what} ({looked}) among {here}; name it with {option} NAME",
        file=file,
    )


def _names(value: Any) -> list[str]:
    """The names in an id: a text or a number, a path in a mapping, or all of a list."""
    if isinstance(value, Mapping):
        pairs: Mapping[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [one for key in ("path", "file_name", "id") for one in _names(pairs.get(key))]
    if isinstance(value, list | tuple):
        listed: Sequence[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [one for item in listed for one in _names(item)]
    if isinstance(value, bool):
        return []
    text = as_text(value).strip()
    return [text] if text else []
