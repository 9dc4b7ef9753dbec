"""What a captioning endpoint is asked, and how its replies are read. The wording is ours.

Picture without sound and sound without picture are described apart, each with the emotion that it
suggests, so that neither caption can borrow from the other (AVERE's pipeline, arXiv 2602.07054).
A reply is one JSON object of a fixed form; anything else is no reply.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import wave
from collections.abc import Mapping, Sequence
from typing import Any, cast

import cv2
import numpy as np

from mmemo.data.preference import Query
from mmemo.media.clip import DecodedClip
from mmemo.rl.chat import Messages

Json = dict[str, Any]

DESCRIBE: Mapping[Query, str] = {
    "video": "You see pictures of a clip of a person, in order, without its sound. Describe the "
    "face, the posture and the scene.",
    "audio": "You hear the sound of a clip of a person, without its picture. Describe the voice, "
    "the words and whatever else is heard.",
}
_REPLY = (
    " Say only what is there. Name the emotion that this channel alone suggests, one of: {labels}. "
    "List as 'relevant' the cues that speak for it, and as 'irrelevant' what is there and says "
    "nothing of how the person feels; each cue in two to six words. Answer with one JSON object "
    "with the keys caption, emotion, relevant, irrelevant."
)
WRITE = (
    "You write questions that test whether a model looks and listens. You get the emotion of a "
    "person in a clip and two descriptions, of the picture and of the sound. For each channel "
    "write {questions} questions with four choices and {probes} sets of cues. Every choice and "
    "cue has two to six words, and all are about as long. 'grounded' is a cue of that channel's "
    "description that speaks for the emotion, 'spurious' one of it that is beside the point, "
    "'hallucinated' is typical of the emotion but in neither description, 'other' is in neither "
    "and of another emotion. Answer with one JSON object with the keys video and audio, each an "
    "object with the keys questions (a list of objects with question, grounded, spurious, "
    "hallucinated, other) and probes (a list of objects with grounded, spurious, hallucinated)."
)
ASK_HASH = hashlib.sha256(json.dumps([dict(DESCRIBE), _REPLY, WRITE]).encode()).hexdigest()
"""Part of what a step's file is known by: changed wording asks again."""

ROLES = ("grounded", "spurious", "hallucinated")
_TEXT = {"type": "string"}
CAPTION_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "caption": _TEXT,
        "emotion": _TEXT,
        "relevant": {"type": "array", "items": _TEXT},
        "irrelevant": {"type": "array", "items": _TEXT},
    },
    "required": ["caption", "emotion", "relevant", "irrelevant"],
    "additionalProperties": False,
}


def _object(names: Sequence[str]) -> Json:
    properties = dict.fromkeys(names, _TEXT)
    return {
        "type": "object",
        "properties": properties,
        "required": list(names),
        "additionalProperties": False,
    }


_QUESTION = ("question", *ROLES, "other")
_CHANNEL: Json = {
    "type": "object",
    "properties": {
        "questions": {"type": "array", "items": _object(_QUESTION)},
        "probes": {"type": "array", "items": _object(ROLES)},
    },
    "required": ["questions", "probes"],
    "additionalProperties": False,
}
QUESTIONS_SCHEMA: Json = {
    "type": "object",
    "properties": {"video": _CHANNEL, "audio": _CHANNEL},
    "required": ["video", "audio"],
    "additionalProperties": False,
}


def describe(channel: Query, clip: DecodedClip, labels: Sequence[str]) -> Messages:
    """The chat that asks for a caption of one channel; the other is not sent."""
    parts: list[Json] = []
    if channel == "video":
        assert clip.frames is not None
        for frame in clip.frames:
            done, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            assert done
            address = "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": address}})
    else:
        sound = {"data": base64.b64encode(_wav(clip)).decode(), "format": "wav"}
        parts.append({"type": "input_audio", "input_audio": sound})
    text = DESCRIBE[channel] + _REPLY.format(labels=", ".join(labels))
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _wav(clip: DecodedClip) -> bytes:
    """The waveform as a 16-bit mono WAV file."""
    assert clip.waveform is not None
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.sample_rate)
        file.writeframes((np.clip(clip.waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return held.getvalue()


def write(label: str, captions: Mapping[str, Json], questions: int, probes: int) -> Messages:
    """The chat that asks for questions about a clip that has been described."""
    text = WRITE.format(questions=questions, probes=probes)
    facts = json.dumps({"emotion": label, **captions}, ensure_ascii=False, indent=1)
    return [{"role": "system", "content": text}, {"role": "user", "content": facts}]


def read_caption(reply: str, labels: Sequence[str]) -> Json | None:
    """The caption of a reply, None where it is none or its emotion is no label."""
    found = _json(reply)
    if found is None or set(found) != set(CAPTION_SCHEMA["required"]):
        return None
    by_name = {label.lower(): label for label in labels}
    emotion = found["emotion"]
    label = by_name.get(emotion.strip().lower()) if isinstance(emotion, str) else None
    lists = [_texts(found[name]) for name in ("relevant", "irrelevant")]
    if label is None or None in lists or not _texts([found["caption"]]):
        return None
    return {**found, "emotion": label}


def read_questions(reply: str, questions: int, probes: int) -> Json | None:
    """The questions of a reply: for both channels as many as were asked for, each with cues that
    differ from one another; None otherwise."""
    found = _json(reply)
    if found is None or set(found) != {"video", "audio"}:
        return None
    for channel in found.values():
        if not isinstance(channel, dict) or set(cast("Json", channel)) != {"questions", "probes"}:
            return None
        for name, keys, number in (("questions", _QUESTION, questions), ("probes", ROLES, probes)):
            listed: Any = channel[name]
            if not isinstance(listed, list) or len(cast("list[Any]", listed)) < number:
                return None
            items = cast("list[Any]", listed)[:number]
            if not all(_is_item(item, keys) for item in items):
                return None
            channel[name] = items
    return found


def _is_item(item: Any, keys: Sequence[str]) -> bool:
    if not isinstance(item, dict) or set(cast("Json", item)) != set(keys):
        return False
    values = _texts(list(cast("Json", item).values()))
    return values is not None and len({value.strip().lower() for value in values}) == len(keys)


def _texts(value: Any) -> list[str] | None:
    """A list of texts that are not blank and hold no media placeholder."""
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    good = all(isinstance(one, str) and one.strip() and "<" not in one for one in items)
    return cast("list[str]", items) if good else None


def _json(reply: str) -> Json | None:
    """The reply as one JSON object; a fence around it is taken off."""
    text = reply.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("Json", value) if isinstance(value, dict) else None
