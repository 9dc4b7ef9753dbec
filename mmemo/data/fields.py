"""Strict readers of a row's fields. A wrong value becomes a problem of the row, never a guess."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mmemo.config import nearest
from mmemo.data.sample import (
    CONFLICTS,
    MODALITIES,
    Conflict,
    FaceBox,
    MediaRef,
    Modality,
    Truth,
)
from mmemo.errors import DataError

# Facial Action Coding System (Ekman, Friesen, Hager 2002): action units, head and eye positions.
_UNITS = (1, 2, *range(4, 8), *range(9, 47), *range(51, 66))
ACTION_UNITS: tuple[str, ...] = tuple(f"AU{unit}" for unit in _UNITS)
CUE_KINDS = ("present", "absent", "spurious")
LABELLED = ("audio", "video", "text")
ATTRIBUTED = ("video", "audio", "face")

TRUTH_FIELDS = ("label", "labels", "aus", "cues", "modality_labels", "attributes", "conflict")


@dataclass(slots=True)
class Row:
    """One row of a manifest while it is read, with the problems found so far."""

    values: Mapping[str, Any]
    file: str
    line: int
    problems: list[DataError] = field(default_factory=list[DataError])

    def bad(self, field_name: str, message: str) -> None:
        self.problems.append(DataError(message, file=self.file, line=self.line, field=field_name))

    def get(self, key: str) -> Any:
        """The value, or None when the row has none (an explicit null counts as none)."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for error messages."""
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {
        str: "a string",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The second half of an error about an unknown name."""
    guess = nearest(name, known)
    return f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}"


def read_text(row: Row, key: str) -> str | None:
    """A string that is not blank."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        row.bad(key, f"must be a string, not {kind_of(value)}")
        return None
    if not value.strip():
        row.bad(key, "is empty; give it a value or leave it out")
        return None
    return value


def read_texts(row: Row, key: str, value: object) -> tuple[str, ...]:
    """A list of strings that are not blank."""
    if value is None:
        return ()
    if not isinstance(value, list):
        row.bad(key, f"must be a list of strings, not {kind_of(value)}")
        return ()
    items = cast("list[object]", value)
    texts = tuple(item for item in items if isinstance(item, str) and item.strip())
    if len(texts) != len(items):
        row.bad(key, "must hold only strings that are not empty")
    return texts


def is_number(value: object) -> bool:
    """A finite int or float; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def read_number(
    row: Row, key: str, value: object, *, low: float = -math.inf, high: float = math.inf
) -> float | None:
    """A finite number in [low, high]."""
    if value is None:
        return None
    if not is_number(value):
        shown = repr(value)
        shown = shown if len(shown) < 40 else f"{shown[:20]}..."
        row.bad(key, f"must be a finite number, not {shown}")
        return None
    number = float(cast("float", value))
    if not low <= number <= high:
        row.bad(key, f"is {number:g} but must lie between {low:g} and {high:g}")
        return None
    return number


def read_object(row: Row, key: str, value: object) -> dict[str, object]:
    """An object with string keys."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        row.bad(key, f"must be an object, not {kind_of(value)}")
        return {}
    return cast("dict[str, object]", value)


def read_text_map(row: Row, key: str, known: Sequence[str] = ()) -> dict[str, str]:
    """An object of strings, with keys from ``known`` when that is given."""
    result: dict[str, str] = {}
    for name, value in read_object(row, key, row.get(key)).items():
        if known and name not in known:
            row.bad(f"{key}.{name}", f"is unknown; {did_you_mean(name, known)}")
        elif not isinstance(value, str) or not value.strip():
            row.bad(f"{key}.{name}", f"must be a string that is not empty, not {value!r}")
        else:
            result[name] = value
    return result


def _read_aus(row: Row) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, value in read_object(row, "aus", row.get("aus")).items():
        key = f"aus.{name}"
        if name not in ACTION_UNITS:
            row.bad(key, f"is no FACS action unit; {_nearest_unit(name)}")
        elif is_number(value) and 1 < cast("float", value) <= 5:
            row.bad(key, f"is {value} but intensities lie between 0 and 1; divide OpenFace's by 5")
        else:
            number = read_number(row, key, value, low=0, high=1)
            if number is not None:
                result[name] = number
    return result


def _nearest_unit(name: str) -> str:
    digits = "".join(character for character in name if character in "0123456789").lstrip("0")
    if f"AU{digits}" in ACTION_UNITS:
        return f"did you mean 'AU{digits}'?"
    guess = nearest(name.upper(), ACTION_UNITS)
    return f"did you mean '{guess}'?" if guess else "names look like AU4 or AU12"


def _read_cues(row: Row) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = {}
    for name, value in read_object(row, "cues", row.get("cues")).items():
        if name not in CUE_KINDS:
            row.bad(f"cues.{name}", f"is unknown; {did_you_mean(name, CUE_KINDS)}")
        else:
            result[name] = read_texts(row, f"cues.{name}", value)
    return result


def _read_attributes(row: Row) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for modality, values in read_object(row, "attributes", row.get("attributes")).items():
        key = f"attributes.{modality}"
        if modality not in ATTRIBUTED:
            row.bad(key, f"is unknown; {did_you_mean(modality, ATTRIBUTED)}")
            continue
        result[modality] = {}
        for name, value in read_object(row, key, values).items():
            number = read_number(row, f"{key}.{name}", value, low=0, high=1)
            if number is not None:
                result[modality][name] = number
    return result


def _read_conflict(row: Row) -> Conflict | None:
    value = row.get("conflict")
    if value is None or value in CONFLICTS:
        return value
    row.bad("conflict", f"is {value!r}; {did_you_mean(str(value), CONFLICTS)}")
    return None


def read_truth(row: Row) -> Truth:
    """Everything a row says about the emotion in its clip."""
    return Truth(
        label=read_text(row, "label"),
        labels=read_texts(row, "labels", row.get("labels")),
        aus=_read_aus(row),
        cues=_read_cues(row),
        modality_labels=read_text_map(row, "modality_labels", LABELLED),
        attributes=_read_attributes(row),
        conflict=_read_conflict(row),
    )


def read_span(row: Row) -> tuple[float | None, float | None]:
    """``start`` and ``end`` in seconds, start before end."""
    start = read_number(row, "start", row.get("start"), low=0)
    end = read_number(row, "end", row.get("end"), low=0)
    if end is not None and end <= (start or 0.0):
        row.bad("end", f"is {end:g} but must be after the start, {start or 0.0:g}")
        return None, None
    return start, end


def _read_point(row: Row, key: str, value: object, size: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(cast("list[object]", value)) != size:
        row.bad(key, f"must be a list of {size} numbers")
        return None
    numbers = [read_number(row, key, item) for item in cast("list[object]", value)]
    if any(number is None for number in numbers):
        return None
    return tuple(number for number in numbers if number is not None)


_BOX_KEYS = ("time", "box", "left_eye", "right_eye")


def _read_box(row: Row, key: str, value: object) -> FaceBox | None:
    entry = read_object(row, key, value)
    for name in entry:
        if name not in _BOX_KEYS:
            row.bad(f"{key}.{name}", f"is unknown; {did_you_mean(name, _BOX_KEYS)}")
    time = read_number(row, f"{key}.time", entry.get("time"), low=0)
    box = _read_point(row, f"{key}.box", entry.get("box"), 4)
    eyes: list[tuple[float, float] | None] = []
    for name in ("left_eye", "right_eye"):
        given = entry.get(name)
        point = None if given is None else _read_point(row, f"{key}.{name}", given, 2)
        eyes.append(None if point is None else (point[0], point[1]))
    if entry.get("time") is None:
        row.bad(f"{key}.time", "is missing; give the frame's time in seconds")
    if time is None or box is None:
        return None
    if box[0] >= box[2] or box[1] >= box[3]:
        row.bad(f"{key}.box", "must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        return None
    return FaceBox(time, (box[0], box[1], box[2], box[3]), eyes[0], eyes[1])


def read_face_boxes(row: Row) -> tuple[FaceBox, ...]:
    """Boxes in pixels of the original frames, ordered by time."""
    value = row.get("face_boxes")
    if value is None:
        return ()
    if not isinstance(value, list):
        row.bad("face_boxes", f"must be a list of objects, not {kind_of(value)}")
        return ()
    boxes = [
        _read_box(row, f"face_boxes.{index}", item)
        for index, item in enumerate(cast("list[object]", value))
    ]
    return tuple(sorted((box for box in boxes if box is not None), key=lambda box: box.time))


def read_media_paths(row: Row, parts: Sequence[tuple[Modality, str]]) -> dict[Modality, str]:
    """The row's one path for each modality, from its lists and its content ``parts``."""
    found: dict[Modality, str] = {}
    for modality in MODALITIES:
        key = f"{modality}s" if row.has(f"{modality}s") else modality
        if row.has(f"{modality}s") and row.has(modality):
            row.bad(modality, f"stands beside '{modality}s'; keep one of them")
        named = [path for kind, path in parts if kind == modality]
        given = _read_paths(row, key)
        if given is None:
            continue
        named += given
        # A preference pair written as two whole conversations names its clip twice.
        distinct = list(dict.fromkeys(named)) if row.has("chosen") else named
        if len(distinct) > 1:
            row.bad(key, f"names {len(distinct)} files; a row has at most one {modality}")
        elif distinct:
            found[modality] = distinct[0]
    return found


def _read_paths(row: Row, key: str) -> list[str] | None:
    """One path or a list of them; None when that is wrong."""
    value = row.get(key)
    if value is None:
        return []
    items = cast("list[object]", value if isinstance(value, list) else [value])
    paths = [item for item in items if isinstance(item, str) and item.strip()]
    if len(paths) != len(items):
        row.bad(key, "must be a list of paths under the media root")
        return None
    return paths


def read_media_refs(row: Row, paths: Mapping[Modality, str]) -> dict[Modality, MediaRef]:
    """The streams of the row's files in its span."""
    start, end = read_span(row)
    boxes = read_face_boxes(row)
    if boxes and "face" not in paths:
        row.bad("face_boxes", "has no face to go with; add faces and <face>, or remove it")
    return {
        modality: MediaRef(path, start, end, boxes if modality == "face" else ())
        for modality, path in paths.items()
    }


def read_rejected_media(row: Row, media: Mapping[Modality, MediaRef]) -> dict[Modality, MediaRef]:
    """ms-swift's ``rejected_videos`` and the like: what the rejected answer goes with, in place of
    the row's own file of that kind and in the same span."""
    found: dict[Modality, MediaRef] = {}
    for modality in MODALITIES:
        key = f"rejected_{modality}s"
        paths = _read_paths(row, key)
        if not paths:
            continue
        if len(paths) > 1:
            row.bad(key, f"names {len(paths)} files; a row has at most one {modality}")
        elif modality not in media:
            row.bad(key, f"stands in for no {modality} of the row; add {modality}s, or remove it")
        elif not row.has("rejected") and not row.has("rejected_response"):
            row.bad(key, "has no rejected answer to go with; add rejected, or remove it")
        else:
            found[modality] = replace(media[modality], path=paths[0], face_boxes=())
    return found
