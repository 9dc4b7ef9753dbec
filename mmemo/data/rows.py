"""The four row shapes, normalised to one :class:`Sample`.

1. ``messages`` (OpenAI, ms-swift) with ``videos``/``audios``/``faces`` lists and placeholders.
2. ``messages`` whose content is a list of parts, ``{"type": "video", "video": path}``.
3. ``conversations`` of ``from``/``value`` (ShareGPT), with one ``video`` key.
4. ``prompt`` with ``chosen`` and ``rejected``, with ``completion``, or alone (TRL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from mmemo.config import nearest
from mmemo.data.sample import (
    CONFLICTS,
    MODALITIES,
    Conflict,
    FaceBox,
    MediaRef,
    Modality,
    Sample,
    Truth,
    Turn,
)
from mmemo.errors import DataError

# Strict readers of a row's fields. A wrong value becomes a problem of the row, never a guess.

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


PLACEHOLDERS: Mapping[Modality, str] = {"video": "<video>", "audio": "<audio>", "face": "<face>"}

_CHAT = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "system")
_MEDIA = ("videos", "audios", "faces", "video", "audio", "face", "face_boxes", "start", "end")
_REJECTED = ("rejected_response", "rejected_videos", "rejected_audios", "rejected_faces")
_OTHER = ("sample_id", "id", "transcript", "group", "tier", "difficulty")
KNOWN_KEYS: tuple[str, ...] = (*_CHAT, *_MEDIA, *_REJECTED, *_OTHER, *TRUTH_FIELDS)

_NO_IMAGES = "images are not read; turn the image into a clip, or remove it"
_IMAGES = ("image", "images", "rejected_images")
Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(slots=True)
class _Chat:
    """What a row says: turns, the media named inside content parts, and the preference pair."""

    turns: list[Turn]
    parts: list[tuple[Modality, str]]
    chosen: str | None = None
    rejected: str | None = None


def read_row(
    row: Row,
    *,
    columns: Sequence[str] = (),
    video_key_means: Sequence[Modality] = ("video", "audio"),
    default_id: Callable[[], str] = str,
) -> Sample | None:
    """One row as a Sample; None when it has problems, which are then in ``row.problems``.

    ``video_key_means``: the streams that a ShareGPT row's lone ``video`` stands for.
    ``default_id`` makes the id of a row that has none.
    """
    _check_keys(row, columns)
    chat = _read_chat(row)
    paths = read_media_paths(row, chat.parts)
    turns = chat.turns
    if row.has("conversations") and "video" in paths and not {"audio", "face"} & paths.keys():
        turns = _expand_video(turns, paths, video_key_means)
    _check_turns(row, turns, preference=chat.rejected is not None)
    _check_placeholders(row, turns, paths)
    _check_answers(row, chat)
    if row.has("sample_id") and row.has("id") and "id" not in columns:
        row.bad("id", "stands beside 'sample_id'; keep one of them")
    media = read_media_refs(row, paths)
    sample = Sample(
        sample_id=read_text(row, "sample_id") or read_text(row, "id") or default_id(),
        turns=tuple(turns),
        media=media,
        truth=read_truth(row),
        transcript=read_text(row, "transcript"),
        group=read_text_map(row, "group"),
        tier=read_text(row, "tier"),
        difficulty=read_number(row, "difficulty", row.get("difficulty"), low=0, high=1),
        chosen=chat.chosen,
        rejected=chat.rejected,
        rejected_media=read_rejected_media(row, media),
        columns={key: row.values[key] for key in columns if key in row.values},
        source=(row.file, row.line),
    )
    return None if row.problems else sample


def restrict(sample: Sample, modalities: Sequence[Modality]) -> Sample:
    """The sample with only these media streams; other placeholders leave the text.

    The whitespace character after a removed placeholder goes with it. An empty list gives the
    text-only sample.
    """
    dropped: list[Modality] = [key for key in sample.media if key not in modalities]
    if not dropped:
        return sample
    turns: list[Turn] = []
    for turn in sample.turns:
        text = turn.text
        for modality in dropped:
            mark = PLACEHOLDERS[modality]
            for tail in ("\n", " ", ""):
                text = text.replace(mark + tail, "")
        if not text.strip():
            file, line = sample.source
            raise DataError(
                "a turn has no text left without its media; add text, or keep the media in "
                "data.modalities",
                file=file,
                line=line,
            )
        turns.append(replace(turn, text=text))
    media, rejected = (
        {key: ref for key, ref in refs.items() if key not in dropped}
        for refs in (sample.media, sample.rejected_media)
    )
    return replace(sample, turns=tuple(turns), media=media, rejected_media=rejected)


def _check_keys(row: Row, columns: Sequence[str]) -> None:
    for key in row.values:
        if key in columns or key in KNOWN_KEYS:
            continue
        if key in _IMAGES:
            if row.has(key) and row.values[key] != []:
                row.bad(key, _NO_IMAGES)
            continue
        hint = did_you_mean(key, (*KNOWN_KEYS, *columns))
        if not hint.startswith("did"):
            hint = "remove it"
        row.bad(key, f"is unknown; {hint} (to pass it through, list it in data.columns)")


def _read_chat(row: Row) -> _Chat:
    chat = _Chat([], [])
    given = [key for key in ("messages", "conversations", "prompt") if row.has(key)]
    if len(given) > 1:
        row.bad(given[1], f"stands beside '{given[0]}'; keep one of them")
    elif given == ["conversations"]:
        chat.turns = _read_messages(row, "conversations", chat, role="from", content="value")
    elif given == ["messages"]:
        chat.turns = _read_messages(row, "messages", chat)
    elif given == ["prompt"]:
        if isinstance(row.get("prompt"), list):
            chat.turns = _read_messages(row, "prompt", chat)
        else:
            text = read_text(row, "prompt")
            chat.turns = [Turn("user", text)] if text else []
    elif not (isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)):
        row.bad("messages", "is missing; a row needs messages, conversations or prompt")
    if row.has("system"):
        text = read_text(row, "system")
        if text and chat.turns and chat.turns[0].role == "system":
            row.bad("system", "stands beside a system turn; keep one of them")
        elif text:
            chat.turns.insert(0, Turn("system", text))
    _read_answers(row, chat)
    return chat


def _read_answers(row: Row, chat: _Chat) -> None:
    """``completion``, ``chosen``/``rejected`` and ms-swift's ``rejected_response``."""
    if row.has("rejected") and row.has("rejected_response"):
        row.bad("rejected_response", "stands beside 'rejected'; keep one of them")
    rejected_key = "rejected_response" if row.has("rejected_response") else "rejected"
    if row.has("completion"):
        if not row.has("prompt") or row.has("chosen") or row.has(rejected_key):
            row.bad("completion", "goes with 'prompt' alone; use chosen and rejected for pairs")
        answer = _read_answer(row, "completion", chat)
        chat.turns += [Turn("assistant", answer)] if answer else []
        return
    if not row.has("chosen") and not row.has(rejected_key):
        return
    if not row.has(rejected_key):
        row.bad("rejected", "is missing beside 'chosen'")
        return
    chat.rejected = _read_answer(row, rejected_key, chat)
    if row.has("chosen"):
        chat.chosen = _read_answer(row, "chosen", chat)
    elif chat.turns and chat.turns[-1].role == "assistant":
        chat.chosen = chat.turns.pop().text
    else:
        row.bad("chosen", f"is missing beside '{rejected_key}'; nor does an answer end the turns")
    other_media = any(row.has(key) for key in _REJECTED if key != "rejected_response")
    if chat.chosen is not None and chat.chosen == chat.rejected and not other_media:
        row.bad(rejected_key, "equals the chosen answer; a pair needs two different answers")


def _read_answer(row: Row, key: str, chat: _Chat) -> str | None:
    """A string, or messages that end with the answer, with or without the prompt before it."""
    if not isinstance(row.get(key), list):
        return read_text(row, key)
    turns = _read_messages(row, key, chat)
    if not turns:
        return None
    if turns[-1].role != "assistant":
        row.bad(key, "must end with an assistant turn")
        return None
    *before, last = turns
    if before and not chat.turns:
        chat.turns = before
    elif before and before != chat.turns:
        row.bad(key, "repeats a prompt that differs from the row's; both answers need one prompt")
        return None
    return last.text


def _read_messages(
    row: Row, key: str, chat: _Chat, *, role: str = "role", content: str = "content"
) -> list[Turn]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        row.bad(key, f"must be a list of turns that is not empty, not {kind_of(value)}")
        return []
    turns: list[Turn] = []
    for index, item in enumerate(cast("list[object]", value)):
        place = f"{key}.{index}"
        if not isinstance(item, dict):
            row.bad(place, f"must be an object with '{role}' and '{content}'")
            continue
        entry = cast("dict[str, object]", item)
        for name in entry:
            if name not in (role, content):
                row.bad(f"{place}.{name}", f"is unknown; {did_you_mean(name, (role, content))}")
        speaker = entry.get(role)
        if not isinstance(speaker, str) or speaker not in _ROLES:
            hint = did_you_mean(str(speaker), tuple(_ROLES))
            row.bad(f"{place}.{role}", f"is {speaker!r}; {hint}")
            continue
        text = _read_content(row, f"{place}.{content}", entry.get(content), chat)
        if text is not None:
            turns.append(Turn(_ROLES[speaker], text))
    return turns


def _read_content(row: Row, key: str, value: object, chat: _Chat) -> str | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        row.bad(key, f"must be a string or a list of parts, not {kind_of(value)}")
        return None
    text = ""
    for index, item in enumerate(cast("list[object]", value)):
        place = f"{key}.{index}"
        if not isinstance(item, dict):
            row.bad(place, "must be an object with 'type'")
            continue
        text += _read_part(row, place, cast("dict[str, object]", item), chat)
    return text


def _read_part(row: Row, place: str, part: dict[str, object], chat: _Chat) -> str:
    """One content part as text: a media part becomes its placeholder."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            row.bad(f"{place}.text", "must be a string")
            return ""
        return cast("str", part["text"])
    if isinstance(kind, str) and kind.startswith("image"):
        row.bad(f"{place}.type", _NO_IMAGES)
        return ""
    if kind not in MODALITIES:
        row.bad(f"{place}.type", f"is {kind!r}; {did_you_mean(str(kind), ('text', *MODALITIES))}")
        return ""
    modality: Modality = kind
    for name in part:
        if name not in ("type", modality, "path"):
            hint = did_you_mean(name, (modality, "path"))
            row.bad(f"{place}.{name}", f"is unknown; {hint}")
    path = part.get(modality, part.get("path"))
    if isinstance(path, str) and path.strip():
        chat.parts.append((modality, path))
    elif path is not None:
        row.bad(f"{place}.{modality}", "must be a path under the media root")
    return PLACEHOLDERS[modality]


def _expand_video(
    turns: list[Turn], paths: dict[Modality, str], means: Sequence[Modality]
) -> list[Turn]:
    """A ShareGPT row's lone ``video``: name the other streams of the file too."""
    path = paths.pop("video")
    paths.update({modality: path for modality in MODALITIES if modality in means})
    text = "".join(turn.text for turn in turns)
    marks = "".join(
        PLACEHOLDERS[modality]
        for modality in MODALITIES
        if modality in means and (modality == "video" or PLACEHOLDERS[modality] not in text)
    )
    return [replace(turn, text=turn.text.replace("<video>", marks)) for turn in turns]


def _check_turns(row: Row, turns: Sequence[Turn], *, preference: bool) -> None:
    field = next((key for key in ("messages", "conversations", "prompt") if row.has(key)), "chosen")
    if row.problems or not turns:
        return
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[index % 2] for index in range(len(body))]
    if not body or body != expected:
        row.bad(field, "turns must be user and assistant in turn, after at most one system turn")
    elif preference and body[-1] != "user":
        row.bad(field, "must end with the user's question, since chosen and rejected answer it")
    for index, turn in enumerate(turns):
        if not turn.text.strip():
            row.bad(f"{field}.{index}", f"the {turn.role} turn is empty")


def _check_answers(row: Row, chat: _Chat) -> None:
    """Answers of a pair are text: the clip is the question's."""
    for keys, text in (
        (("chosen", "messages", "conversations", "prompt"), chat.chosen),
        (("rejected_response", "rejected"), chat.rejected),
    ):
        if text is not None and any(mark in text for mark in ("<image>", *PLACEHOLDERS.values())):
            field = next(key for key in keys if row.has(key))
            row.bad(field, "has a media placeholder in an answer; move it to the user's turn")


def _check_placeholders(row: Row, turns: Sequence[Turn], paths: Mapping[Modality, str]) -> None:
    """Exactly one placeholder for each file, in a user turn."""
    field = next((key for key in ("messages", "conversations", "prompt") if row.has(key)), "chosen")
    if not turns:
        return
    for turn in turns:
        if "<image>" in turn.text:
            row.bad(field, f"has the placeholder <image>; {_NO_IMAGES}")
        if turn.role != "user" and any(mark in turn.text for mark in PLACEHOLDERS.values()):
            row.bad(field, f"has a media placeholder in a {turn.role} turn; move it to the user's")
    for modality, mark in PLACEHOLDERS.items():
        count = sum(turn.text.count(mark) for turn in turns if turn.role == "user")
        if modality in paths and count == 0:
            row.bad(
                field,
                f"has no {mark} for the {modality} '{paths[modality]}'; write {mark} where the "
                f"model should perceive it",
            )
        elif count > (modality in paths):
            files = "one file" if modality in paths else "no file"
            row.bad(field, f"has {count} x {mark} but the row names {files}; make them equal")
