"""The keys of a manifest row as pydantic models, and their errors as sentences.

The models are strict: a wrong type or an unknown key is an error of the row, which names file, row
and field, and is never converted. They check every field by itself; :mod:`mmemo.data.rows` checks
what depends on several fields and makes the :class:`~mmemo.data.sample.Sample`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from mmemo.config import nearest
from mmemo.data.action_units import UNITS, canonical
from mmemo.data.sample import CONFLICTS, MODALITIES, Conflict, FaceBox, MediaRef, Modality
from mmemo.errors import DataError

ACTION_UNITS: tuple[str, ...] = UNITS
CUE_KINDS = ("present", "absent", "spurious")
CUE_PLACES = ("audio", "video", "face", "text")
"""Where a cue may be said to be. A cue of the face is one of the picture."""
PLACEHOLDERS: Mapping[Modality, str] = {"video": "<video>", "audio": "<audio>", "face": "<face>"}
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

IMAGE_KEYS = ("image", "images", "rejected_images")
NO_IMAGES = "images are not supported; turn the image into a clip, or remove it"


@dataclass(slots=True)
class Row:
    """One row of a manifest as plain values, and the problems found in it so far."""

    values: Mapping[str, Any]
    file: str
    line: int
    problems: list[DataError] = field(default_factory=list[DataError])
    written: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key -> what the file calls it, where that is another name; errors use it."""

    def bad(self, field_name: str, message: str) -> None:
        """Record a problem with one field."""
        key, dot, rest = field_name.partition(".")
        field_name = f"{self.written.get(key, key)}{dot}{rest}"
        self.problems.append(DataError(message, file=self.file, line=self.line, field=field_name))

    def get(self, key: str) -> Any:
        """The value, or None when the row has none. An explicit null counts as absent."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether the row has a value that is not null."""
        return self.values.get(key) is not None


# Field types. The sentences replace pydantic's own inside pydantic-core, so that a valid value
# costs no Python call. ``{kind}`` and ``{value}`` are filled in by ``_explain``.


class Expect:
    """Annotation of a type: the sentence that reports every error inside the value."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="expected", custom_error_message=self.message
        )


class OneOf:
    """Annotation of ``str``: the value must be one of ``names``."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.custom_error_schema(
            core_schema.literal_schema([*self.names]),
            custom_error_type="one_of",
            custom_error_message="is unknown",
            custom_error_context={"names": ",".join(self.names)},
        )


def _tag(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _tag_cues(value: object) -> str:
    return "<object>" if isinstance(value, dict) else "<text>"


def _cue_list(value: object) -> object:
    if not isinstance(value, list):
        raise PydanticCustomError("cues", "must be a list of strings")
    return value


def _list_or_object(value: object) -> object:
    if not isinstance(value, list | dict):
        raise PydanticCustomError("cues", "must be a list of strings, or such lists by channel")
    return value


def _ordered(box: Sequence[float]) -> Sequence[float]:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise PydanticCustomError("box", "must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return box


# Exactly what str.strip() leaves something of: Rust's \s does not know the separators \x1c to \x1f.
Text = Annotated[str, StringConstraints(strict=True, pattern=r"[^\s\x1c-\x1f]")]
Texts = Annotated[list[Text], Expect("must be a list of strings that are not empty")]
Paths = Annotated[
    list[Text], BeforeValidator(_listed), Expect("must be a list of paths under the media root")
]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seconds = Annotated[
    Finite, Field(ge=0), Expect("must be a finite number of seconds, 0 or more, not {value}")
]
Unit = Annotated[
    Finite, Field(ge=0, le=1), Expect("must be a finite number between 0 and 1, not {value}")
]
Intensity = Annotated[
    Finite,
    Field(ge=0, le=5),
    Expect("must be a finite number between 0 and 1, or between 0 and 5, not {value}"),
]
_Point = Annotated[tuple[Finite, Finite], Expect("must be a list of 2 finite numbers")]
_Corners = Annotated[
    tuple[Finite, Finite, Finite, Finite],
    Expect("must be a list of 4 finite numbers"),
    AfterValidator(_ordered),
]
_Role = Annotated[str, OneOf(*ROLES)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ContentPart(_Model):
    """A text, or a placeholder for the file under the key named by ``type``, or ``path``."""

    model_config = ConfigDict(extra="allow")  # which keys are allowed depends on the type
    type: Annotated[Literal["text"] | Modality, OneOf("text", *MODALITIES)]
    text: str | None = None
    video: Text | None = None
    audio: Text | None = None
    face: Text | None = None
    path: Text | None = None


_Content = Annotated[
    Annotated[str, Expect("must be a string or a list of parts, not {kind}"), Tag("<text>")]
    | Annotated[list[ContentPart], Tag("<list>")],
    Discriminator(_tag),
]


class Message(_Model):
    """A chat turn. ``content``: text, or a list of parts."""

    role: _Role
    content: _Content


class ShareGptTurn(Message):
    """A chat turn under ShareGPT's names."""

    role: _Role = Field(alias="from")
    content: _Content = Field(alias="value")


_Turns = Annotated[list[Message], Field(min_length=1)]
_Answer = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[_Turns, Tag("<list>")], Discriminator(_tag)
]


class FaceBoxModel(_Model):
    """A face in pixels of the original frame, ``time`` in seconds from the file's start."""

    time: Seconds
    box: _Corners
    left_eye: _Point | None = None
    right_eye: _Point | None = None


class CueModel(_Model):
    """A cue and the channel that it is in."""

    cue: Text
    channel: Annotated[str, OneOf(*CUE_PLACES)] | None = None


_Cue = Annotated[
    Annotated[
        Text,
        Expect("must be a string that is not empty, or an object with cue and channel"),
        Tag("<text>"),
    ]
    | Annotated[CueModel, Tag("<object>")],
    Discriminator(_tag_cues),
]
_CueKey = Annotated[str, OneOf(*CUE_KINDS, *CUE_PLACES)]
_CuesInside = Annotated[list[_Cue], BeforeValidator(_cue_list)]
_Cues = Annotated[
    Annotated[list[_Cue], Tag("<text>")]
    | Annotated[dict[_CueKey, _CuesInside | None], Tag("<object>")],
    Discriminator(_tag_cues),
    BeforeValidator(_list_or_object),
]


class SpanModel(_Model):
    """The used part of a file, in seconds from its start."""

    start: Seconds | None = None
    end: Seconds | None = None

    @field_validator("end")
    @classmethod
    def _after_start(cls, end: float | None, info: ValidationInfo) -> float | None:
        start: float = info.data.get("start") or 0.0
        if end is not None and end <= start:
            message = f"is {end:g} but must be after the start, {start:g}"
            raise PydanticCustomError("span", "{message}", {"message": message})
        return end


class ClipModel(SpanModel):
    """A file, the used part of it, and its faces."""

    path: Text
    face_boxes: list[FaceBoxModel] | None = None


class RowModel(SpanModel):
    """Every key that a row may have. Each may be absent or null."""

    sample_id: Text | None = None
    id: Text | None = None
    messages: _Turns | None = None
    conversations: Annotated[list[ShareGptTurn], Field(min_length=1)] | None = None
    prompt: _Answer | None = None
    completion: _Answer | None = None
    chosen: _Answer | None = None
    rejected: _Answer | None = None
    rejected_response: _Answer | None = None
    system: Text | None = None
    videos: Paths | None = None
    audios: Paths | None = None
    faces: Paths | None = None
    video: Paths | None = None
    audio: Paths | None = None
    face: Paths | None = None
    face_boxes: list[FaceBoxModel] | None = None
    rejected_videos: Paths | None = None
    rejected_audios: Paths | None = None
    rejected_faces: Paths | None = None
    transcript: Text | None = None
    group: dict[str, Text] | None = None
    tier: Text | None = None
    difficulty: Unit | None = None
    label: Text | None = None
    labels: Texts | None = None
    aus: Annotated[
        dict[Annotated[str, OneOf(*ACTION_UNITS)], Intensity | None] | None,
        BeforeValidator(canonical),
    ] = None
    cues: dict[_CueKey, _Cues | None] | None = None
    modality_labels: dict[Annotated[str, OneOf("audio", "video", "text")], Text] | None = None
    attributes: dict[Annotated[str, OneOf(*MODALITIES)], dict[str, Unit | None] | None] | None = (
        None
    )
    conflict: Annotated[Conflict, OneOf(*CONFLICTS)] | None = None


KNOWN_KEYS: tuple[str, ...] = tuple(RowModel.model_fields)
_T = TypeVar("_T")
ROW, _CLIP, _SPAN = TypeAdapter(RowModel), TypeAdapter(ClipModel), TypeAdapter(SpanModel)
_TEXT: TypeAdapter[str | None] = TypeAdapter(Text | None)
_TEXTS: TypeAdapter[list[str] | None] = TypeAdapter(Texts | None)


def check(row: Row, kind: TypeAdapter[_T], value: object, key: str = "") -> _T | None:
    """``value`` as ``kind``. Problems go to the row, under ``key``, and give None."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        # Unknown keys first: a misspelt key is why another one is missing.
        found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != _UNKNOWN)
        for problem in found:
            row.bad(*_explain(problem, [key] if key else []))
        return None


def read_text(row: Row, key: str) -> str | None:
    """The string under ``key``, which must not be blank; None when the row has none."""
    return check(row, _TEXT, row.get(key), key)


def read_texts(row: Row, key: str, value: object) -> tuple[str, ...]:
    """A list of strings that are not blank. ``key`` names ``value`` in errors."""
    return tuple(check(row, _TEXTS, value, key) or ())


def read_boxes(boxes: Sequence[FaceBoxModel] | None) -> tuple[FaceBox, ...]:
    """Boxes in pixels of the original frames, ordered by time."""
    read = [FaceBox(box.time, box.box, box.left_eye, box.right_eye) for box in boxes or ()]
    return tuple(sorted(read, key=lambda box: box.time))


def read_clip(row: Row, key: str) -> MediaRef | None:
    """The clip under ``key``: an object of path, start, end and face_boxes, or a path alone, which
    takes the row's own start and end."""
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        silent = Row({}, row.file, row.line)  # the row's span is checked with the row
        span = check(silent, _SPAN, {"start": row.get("start"), "end": row.get("end")})
        return MediaRef(value, span.start, span.end) if span else MediaRef(value)
    if not isinstance(value, dict):
        row.bad(key, f"must be a path under the media root, not {kind_of(value)}")
        return None
    clip = check(row, _CLIP, cast("object", value), key)
    return clip and MediaRef(clip.path, clip.start, clip.end, read_boxes(clip.face_boxes))


_KINDS: Mapping[type, str] = {
    bool: "a boolean",
    str: "a string",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_UNKNOWN = "extra_forbidden"  # pydantic's word
_SENTENCES = {
    "string_type": "must be a string, not {kind}",
    "string_pattern_mismatch": "is empty; give it a value or leave it out",
    "list_type": "must be a list of {items}, not {kind}",
    "too_short": "must be a list of {items} that is not empty",
    "dict_type": "must be an object, not {kind}",
    "model_type": "must be an object, not {kind}",
    "missing": "is missing; add it",
}


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for error messages."""
    return _KINDS.get(type(value), "null")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The second half of an error about an unknown name."""
    guess = nearest(name, known)
    return f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}"


def _explain(problem: ErrorDetails, parents: Sequence[str]) -> tuple[str, str]:
    """The dotted field of one pydantic error, and the sentence about it."""
    tags = (
        "<text>",
        "<list>",
        "<object>",
        "[key]",
    )  # pydantic's marks of union members and of dict keys
    path = [*parents, *(str(step) for step in problem["loc"] if step not in tags)]
    kind, value = problem["type"], problem["input"]
    scalar = isinstance(value, str | int | float)
    shown = repr(value) if scalar else kind_of(value)
    shown = shown if len(shown) < 40 else f"{shown[:20]}..."
    if kind == _UNKNOWN:
        lists = [step for step in path[:-1] if not step.isdecimal()][len(parents) :]
        models = {"face_boxes": FaceBoxModel, "conversations": ShareGptTurn}
        model = models.get(lists[-1], Message) if lists else ClipModel
        model = CueModel if lists[:1] == ["cues"] else model
        known = [field.alias or name for name, field in model.model_fields.items()]
        message = f"is unknown; {did_you_mean(path[-1], known)}"
    elif kind == "one_of" and path[0] == "aus":
        message = f"is not a FACS action unit; {_nearest_unit(path[-1])}"
    elif kind == "one_of":
        known = problem.get("ctx", {})["names"].split(",")
        message = f"is {shown}; {did_you_mean(str(value), known)}"
        if str(value).startswith("image"):
            message = NO_IMAGES
        elif problem["loc"][-1] == "[key]":
            message = f"is unknown; {did_you_mean(path[-1], known)}"
    else:
        items = "face boxes" if path[-1] == "face_boxes" else "turns"
        message = _SENTENCES.get(kind, problem["msg"]).replace("{items}", items)
        if kind == "string_type" and isinstance(value, float) and math.isnan(value):
            message = "is NaN, which pandas writes for a missing value; leave it out"
        message = message.replace("{kind}", kind_of(value)).replace("{value}", shown)
    return ".".join(path), message


def _nearest_unit(name: str) -> str:
    digits = "".join(character for character in name if character in "0123456789").lstrip("0")
    if f"AU{digits}" in ACTION_UNITS:
        return f"did you mean 'AU{digits}'?"
    guess = nearest(name.upper(), ACTION_UNITS)
    return f"did you mean '{guess}'?" if guess else "names look like AU4 or AU12"
