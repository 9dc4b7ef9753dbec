"""Manifest rows of four formats, converted to one :class:`~mmemo.data.sample.Sample`.

1. ``messages`` (OpenAI, ms-swift) with ``videos``/``audios``/``faces`` lists and placeholders.
2. ``messages`` whose content is a list of parts, ``{"type": "video", "video": path}``.
3. ``conversations`` of ``from``/``value`` (ShareGPT) with a single ``video`` key.
4. ``prompt`` with ``chosen`` and ``rejected``, with ``completion``, or alone (TRL).

:mod:`mmemo.data.row_models` checks each field. Checked here is what depends on several of them: one
placeholder per file, turns that alternate, one prompt for both answers of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from mmemo.config import nearest
from mmemo.data.cues import read_cues
from mmemo.data.row_models import (
    IMAGE_KEYS,
    KNOWN_KEYS,
    NO_IMAGES,
    PLACEHOLDERS,
    ROLES,
    ROW,
    ContentPart,
    Message,
    Row,
    RowModel,
    check,
    did_you_mean,
    read_boxes,
)
from mmemo.data.sample import MODALITIES, MediaRef, Modality, Sample, Truth, Turn
from mmemo.errors import DataError

_PROMPT_KEYS = ("messages", "conversations", "prompt")


@dataclass(slots=True)
class _Chat:
    """The chat of a row: turns, the media named inside content parts, and the preference pair."""

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
    """Convert one row to a Sample.

    Args:
        row: the values; problems are added to ``row.problems``.
        columns: keys that are passed through unread.
        video_key_means: the streams that a ShareGPT row's lone ``video`` stands for.
        default_id: makes the id of a row that has none.

    Returns:
        The sample, or None when the row has problems.
    """
    fields = check(row, ROW, _known_values(row, columns))
    if fields is None:
        return None
    chat = _read_chat(row, fields)
    paths = _read_paths(row, fields, chat.parts)
    # Only a lone `video` is ambiguous; a row that names its other streams means what it says.
    if fields.conversations and "video" in paths and not {"audio", "face"} & paths.keys():
        chat.turns = _expand_video(chat.turns, paths, video_key_means)
    prompt_key = next((key for key in _PROMPT_KEYS if row.has(key)), "chosen")
    _check_turns(row, prompt_key, chat.turns, preference=chat.rejected is not None)
    _check_placeholders(row, prompt_key, chat.turns, paths)
    _check_answers(row, chat)
    boxes = read_boxes(fields.face_boxes)
    if boxes and "face" not in paths:
        row.bad("face_boxes", "has no face to go with; add faces and <face>, or remove it")
    media: dict[Modality, MediaRef] = {
        modality: MediaRef(path, fields.start, fields.end, boxes if modality == "face" else ())
        for modality, path in paths.items()
    }
    sample = Sample(
        sample_id=fields.sample_id or fields.id or default_id(),
        turns=tuple(chat.turns),
        media=media,
        truth=_truth(row, fields),
        transcript=fields.transcript,
        group=fields.group or {},
        tier=fields.tier,
        difficulty=fields.difficulty,
        chosen=chat.chosen,
        rejected=chat.rejected,
        rejected_media=_read_rejected_media(row, fields, media),
        columns={key: row.values[key] for key in columns if key in row.values},
        source=(row.file, row.line),
    )
    # The sample is made first, so that all problems of the row are reported at once.
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
            # The longer forms go first: the bare placeholder would leave their whitespace behind.
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


def _known_values(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """The values that the row model reads. Other keys must be in ``columns``."""
    values: dict[str, Any] = {}
    for key, value in row.values.items():
        if key in RowModel.model_fields:
            _refuse_missing(row, key, value)
            values[key] = value
        elif key == "AUs" and key not in columns and not row.has("aus"):
            values["aus"] = value
        elif key in columns or (key in IMAGE_KEYS and value in (None, [])):
            continue
        elif key in IMAGE_KEYS:
            row.bad(key, NO_IMAGES)
        else:
            guess = nearest(key, (*KNOWN_KEYS, *columns))
            hint = f"did you mean '{guess}'?" if guess else "remove it"
            row.bad(key, f"is unknown; {hint} (to pass it through, list it in data.columns)")
    if row.has("sample_id") and row.has("id"):
        if "id" in columns:  # an id of another meaning, which may be no string
            del values["id"]
        else:
            row.bad("id", "cannot be combined with 'sample_id'; keep one of them")
    return values


_MISSING = {"nan", "NaN", "<NA>", "NaT"}
"""How pandas and numpy write a missing value as text."""


def _refuse_missing(row: Row, key: str, value: object) -> None:
    """Refuse the words for a missing value, which would become a label, an id or an answer."""
    inside = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    places = {key: value, **{f"{key}.{name}": one for name, one in inside.items()}}
    for place, one in places.items():
        listed = cast("list[object]", one) if isinstance(one, list) else [one]
        found = next((x for x in listed if isinstance(x, str) and x.strip() in _MISSING), None)
        if found is not None:
            row.bad(
                place,
                f"is '{found}', as pandas writes a missing value; leave it out (to_csv writes an "
                "empty cell unless the column is turned into text)",
            )


def _truth(row: Row, fields: RowModel) -> Truth:
    cues, cue_channels = read_cues(row, fields.cues or {})
    return Truth(
        # " sad " of a hand-made table would be a class of its own.
        label=None if fields.label is None else fields.label.strip(),
        labels=tuple(fields.labels or ()),
        aus=_not_null(fields.aus),
        cues=cues,
        cue_channels=cue_channels,
        modality_labels=fields.modality_labels or {},
        attributes={key: _not_null(values) for key, values in (fields.attributes or {}).items()},
        conflict=fields.conflict,
    )


def _not_null(values: Mapping[str, float | None] | None) -> dict[str, float]:
    return {key: value for key, value in (values or {}).items() if value is not None}


def _read_paths(
    row: Row, fields: RowModel, parts: Sequence[tuple[Modality, str]]
) -> dict[Modality, str]:
    """The row's one path for each modality, from its lists and its content ``parts``."""
    found: dict[Modality, str] = {}
    for modality in MODALITIES:
        key = f"{modality}s" if row.has(f"{modality}s") else modality
        if row.has(f"{modality}s") and row.has(modality):
            row.bad(modality, f"cannot be combined with '{modality}s'; keep one of them")
        named = [path for kind, path in parts if kind == modality]
        named += getattr(fields, key) or []
        # A preference pair written as two whole conversations names its clip twice.
        distinct = list(dict.fromkeys(named)) if row.has("chosen") else named
        if len(distinct) > 1:
            row.bad(key, f"names {len(distinct)} files; a row has at most one {modality}")
        elif distinct:
            found[modality] = distinct[0]
    return found


def _read_rejected_media(
    row: Row, fields: RowModel, media: Mapping[Modality, MediaRef]
) -> dict[Modality, MediaRef]:
    """ms-swift's ``rejected_videos`` and its siblings: a file that replaces the row's own one of
    that kind, in the same span, for the rejected answer."""
    found: dict[Modality, MediaRef] = {}
    for modality in MODALITIES:
        key = f"rejected_{modality}s"
        paths: list[str] | None = getattr(fields, key)
        if not paths:
            continue
        if len(paths) > 1:
            row.bad(key, f"names {len(paths)} files; a row has at most one {modality}")
        elif modality not in media:
            row.bad(key, f"replaces no {modality} of the row; add {modality}s, or remove it")
        elif not row.has("rejected") and not row.has("rejected_response"):
            row.bad(key, "has no rejected answer to go with; add rejected, or remove it")
        else:
            # The boxes are those of the row's own file.
            found[modality] = replace(media[modality], path=paths[0], face_boxes=())
    return found


def _read_chat(row: Row, fields: RowModel) -> _Chat:
    chat = _Chat([], [])
    given = [key for key in _PROMPT_KEYS if row.has(key)]
    if len(given) > 1:
        row.bad(given[1], f"cannot be combined with '{given[0]}'; keep one of them")
    elif given:
        prompt: str | Sequence[Message] = getattr(fields, given[0])
        if isinstance(prompt, str):
            chat.turns = [Turn("user", prompt)]
        else:
            chat.turns = _read_turns(row, given[0], prompt, chat)
    elif not (isinstance(fields.chosen, list) and isinstance(fields.rejected, list)):
        row.bad("messages", "is missing; a row needs messages, conversations or prompt")
    if fields.system and chat.turns and chat.turns[0].role == "system":
        row.bad("system", "cannot be combined with a system turn; keep one of them")
    elif fields.system:
        chat.turns.insert(0, Turn("system", fields.system))
    _read_answers(row, fields, chat)
    return chat


def _read_turns(row: Row, key: str, messages: Sequence[Message], chat: _Chat) -> list[Turn]:
    """The turns as text. A media part becomes its placeholder, its path is added to ``chat``."""
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        content = message.content
        if not isinstance(content, str):
            place = f"{key}.{index}.{'value' if key == 'conversations' else 'content'}"
            content = "".join(
                _read_part(row, f"{place}.{number}", part, chat)
                for number, part in enumerate(content)
            )
        turns.append(Turn(ROLES[message.role], content))
    return turns


def _read_part(row: Row, place: str, part: ContentPart, chat: _Chat) -> str:
    if part.type == "text":
        if part.text is None:
            row.bad(f"{place}.text", "must be a string")
        return part.text or ""
    for name in part.model_fields_set - {"type", part.type, "path"}:
        row.bad(f"{place}.{name}", f"is unknown; {did_you_mean(name, (part.type, 'path'))}")
    path: str | None = getattr(part, part.type) or part.path
    if path is not None:
        chat.parts.append((part.type, path))
    return PLACEHOLDERS[part.type]


def _read_answers(row: Row, fields: RowModel, chat: _Chat) -> None:
    """``completion``, ``chosen``/``rejected`` and ms-swift's ``rejected_response``."""
    if row.has("rejected") and row.has("rejected_response"):
        row.bad("rejected_response", "cannot be combined with 'rejected'; keep one of them")
    rejected_key = "rejected_response" if row.has("rejected_response") else "rejected"
    if row.has("completion"):
        if not row.has("prompt") or row.has("chosen") or row.has(rejected_key):
            row.bad("completion", "goes with 'prompt' alone; use chosen and rejected for pairs")
        answer = _read_answer(row, "completion", fields, chat)
        chat.turns += [Turn("assistant", answer)] if answer else []
        return
    if not row.has("chosen") and not row.has(rejected_key):
        return
    if not row.has(rejected_key):
        row.bad("rejected", "is missing; 'chosen' needs one")
        return
    chat.rejected = _read_answer(row, rejected_key, fields, chat)
    if row.has("chosen"):
        chat.chosen = _read_answer(row, "chosen", fields, chat)
    elif chat.turns and chat.turns[-1].role == "assistant":
        chat.chosen = chat.turns.pop().text
    else:
        row.bad(
            "chosen", f"is missing; '{rejected_key}' needs it, or an answer that ends the turns"
        )
    other_media = any(row.has(f"rejected_{modality}s") for modality in MODALITIES)
    if chat.chosen is not None and chat.chosen == chat.rejected and not other_media:
        row.bad(rejected_key, "equals the chosen answer; a pair needs two different answers")


def _read_answer(row: Row, key: str, fields: RowModel, chat: _Chat) -> str | None:
    """A string, or turns that end with the answer, with or without the prompt before it."""
    answer: str | list[Message] = getattr(fields, key)
    if isinstance(answer, str):
        return answer
    *before, last = _read_turns(row, key, answer, chat)
    if last.role != "assistant":
        row.bad(key, "must end with an assistant turn")
        return None
    if before and not chat.turns:
        chat.turns = before
    elif before and before != chat.turns:
        row.bad(key, "repeats a prompt that differs from the row's; both answers need one prompt")
        return None
    return last.text


def _expand_video(
    turns: list[Turn], paths: dict[Modality, str], means: Sequence[Modality]
) -> list[Turn]:
    """Let a ShareGPT row's lone ``video`` name the other streams of its file too."""
    path = paths.pop("video")
    paths.update({modality: path for modality in MODALITIES if modality in means})
    text = "".join(turn.text for turn in turns)
    placeholders = "".join(
        PLACEHOLDERS[modality]
        for modality in MODALITIES
        if modality in means and (modality == "video" or PLACEHOLDERS[modality] not in text)
    )
    return [replace(turn, text=turn.text.replace("<video>", placeholders)) for turn in turns]


def _check_turns(row: Row, key: str, turns: Sequence[Turn], *, preference: bool) -> None:
    """User and assistant alternate, and no turn is empty."""
    if row.problems or not turns:
        return
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[index % 2] for index in range(len(body))]
    if not body or body != expected:
        row.bad(key, "must alternate user and assistant turns, after at most one system turn")
    elif preference and body[-1] != "user":
        row.bad(key, "must end with the user's question, since chosen and rejected answer it")
    for index, turn in enumerate(turns):
        if not turn.text.strip():
            row.bad(f"{key}.{index}", f"the {turn.role} turn is empty; write its text")


def _check_answers(row: Row, chat: _Chat) -> None:
    """The answers of a pair are text, because the clip belongs to the question."""
    for keys, text in (
        (("chosen", "messages", "conversations", "prompt"), chat.chosen),
        (("rejected_response", "rejected"), chat.rejected),
    ):
        if text is not None and any(mark in text for mark in ("<image>", *PLACEHOLDERS.values())):
            field = next(key for key in keys if row.has(key))
            row.bad(field, "has a media placeholder in an answer; move it to the user's turn")


def _check_placeholders(
    row: Row, key: str, turns: Sequence[Turn], paths: Mapping[Modality, str]
) -> None:
    """Each file has exactly one placeholder, in a user turn."""
    if not turns:
        return
    for turn in turns:
        if "<image>" in turn.text:
            row.bad(key, f"has the placeholder <image>; {NO_IMAGES}")
        if turn.role != "user" and any(mark in turn.text for mark in PLACEHOLDERS.values()):
            row.bad(key, f"has a media placeholder in a {turn.role} turn; move it to the user's")
    for modality, mark in PLACEHOLDERS.items():
        count = sum(turn.text.count(mark) for turn in turns if turn.role == "user")
        if modality in paths and count == 0:
            row.bad(
                key,
                f"has no {mark} for the {modality} '{paths[modality]}'; write {mark} where the "
                f"model should perceive it",
            )
        elif count > (modality in paths):
            files = "one file" if modality in paths else "no file"
            row.bad(key, f"has {count} x {mark} but the row names {files}; make them equal")
