"""Pairs with the help of a chat endpoint: captions of each channel, then questions about cues.

Steps, each a JSONL file in the run folder that a killed run goes on with: ``captions.jsonl``
(picture without sound and sound without picture, described apart) and ``questions.jsonl`` (what the
endpoint writes from the two captions and the label). Questions come in the cells of AVERE's
pipeline (arXiv 2602.07054): {audio-, video-driven} by which caption suggests the clip's label,
times {visual, audio cue}, times {no_hallucination: yes; visual_relevant or audio_relevant: there,
but beside the point: no; emotion_relevant: typical, but absent: no}. The cell is in ``group.cell``.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import wave
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from mmemo.config import dump
from mmemo.console import progress
from mmemo.data.preference import Answer, Query
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES, Modality, Sample, Turn
from mmemo.errors import DataError, MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.paths import resolve
from mmemo.pairs.config import CaptionSource, PairsConfig
from mmemo.pairs.rows import Draft, Left
from mmemo.pairs.steps import StepFile
from mmemo.rewards.judge.openai_client import ChatClient, Messages
from mmemo.run_log import RunRecord

# What a captioning endpoint is asked, and how its replies are read. The wording is ours.
#
# Picture without sound and sound without picture are described apart, each with the emotion that it
# suggests, so that neither caption can borrow from the other (AVERE's pipeline, arXiv 2602.07054).
# A reply is one JSON object of a fixed form; anything else is no reply.

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


CAPTIONS, QUESTIONS = "captions.jsonl", "questions.jsonl"
_CHANNELS: tuple[Query, ...] = ("video", "audio")
_CUE_NAMES: Mapping[Query, str] = {"video": "visual", "audio": "audio"}


def from_captions(
    config: PairsConfig,
    source: CaptionSource,
    samples: Sequence[Sample],
    left: Left,
    record: RunRecord,
) -> list[Draft]:
    """Drafts of all questions about all clips that have a label, a picture and a sound.

    Left out and counted: ``no_label``, ``one_channel``, ``bad_clip``, ``no_caption``,
    ``no_questions``, ``neither_channel`` (no caption suggests the label).

    Raises:
        ConfigError: the endpoint's key is not set.
        DataError: the endpoint failed on more clips than ``max_failure_share``.
    """
    clips = _clips(samples, left)
    labels = source.labels or sorted({one.truth.label for one in clips.values() if one.truth.label})
    counts: Counter[str] = Counter()
    chat = ChatClient(source.endpoint, counts, "the captioning endpoint")
    folder = Path(config.output_dir)
    captions = StepFile(
        folder / CAPTIONS, _mark(source, [labels, source.frames, source.frame_size])
    )
    asyncio.run(_caption(config, source, clips, labels, chat, captions, left))
    whole = {
        name: {channel: captions.known[f"{name}/{channel}"] for channel in _CHANNELS}
        for name in clips
        if all(f"{name}/{channel}" in captions.known for channel in _CHANNELS)
    }
    questions = StepFile(folder / QUESTIONS, _mark(source, [source.questions, source.probes]))
    asyncio.run(_question(source, clips, whole, chat, questions, left))
    record.event("endpoint", **counts)
    failed = left.counts["no_caption"] + left.counts["no_questions"]
    if failed > source.max_failure_share * len(clips):
        seen = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise DataError(
            f"the captioning endpoint failed on {failed} of {len(clips)} clips ({seen}); see to it "
            "and run again, which asks only for what is missing"
        )
    drafts: list[Draft] = []
    for name, sample in clips.items():
        key = _question_key(name, sample, whole.get(name))
        if key in questions.known:
            drafts += _drafts(config, sample, whole[name], questions.known[key], left)
    return drafts


def _clips(samples: Sequence[Sample], left: Left) -> dict[str, Sample]:
    """Name of each clip -> the first of its rows that has the most streams."""
    found: dict[str, Sample] = {}
    for sample in samples:
        seen = {"video", "face"} & set(sample.media)
        if sample.truth.label is None:
            left.out("no_label", sample.sample_id)
        elif not seen or "audio" not in sample.media:
            left.out("one_channel", sample.sample_id)
        else:
            ref = sample.media["audio"]
            name = f"{ref.path}#{ref.start}#{ref.end}"
            if name not in found or len(found[name].media) < len(sample.media):
                found[name] = sample
    return found


async def _caption(
    config: PairsConfig,
    source: CaptionSource,
    clips: Mapping[str, Sample],
    labels: Sequence[str],
    chat: ChatClient,
    file: StepFile,
    left: Left,
) -> None:
    """Ask for the captions that are not in the file, some clips at a time."""
    sampling = source.endpoint.request("caption", CAPTION_SCHEMA)

    async def one(name: str, channel: Query, clip: DecodedClip) -> bool:
        key = f"{name}/{channel}"
        if key not in file.known:
            found = await chat.ask(
                lambda: describe(channel, clip, labels),
                sampling,
                lambda reply: read_caption(reply, labels),
            )
            if found is None:
                return False
            file.add({key: found})
        return True

    async def both(name: str, clip: DecodedClip | None) -> None:
        if clip is None:
            left.out("bad_clip", clips[name].sample_id)
        elif not all(await asyncio.gather(*(one(name, channel, clip) for channel in _CHANNELS))):
            left.out("no_caption", clips[name].sample_id)
        bar.advance()

    todo = [name for name in clips if not {f"{name}/{c}" for c in _CHANNELS} <= {*file.known}]
    step = max(1, source.endpoint.concurrency // 2)
    with (
        progress("captions", len(clips), done=len(clips) - len(todo), unit="clips") as bar,
        DecodePool(config.decode) as pool,
    ):
        async with chat.connected():
            for start in range(0, len(todo), step):
                names = todo[start : start + step]
                decoded = _decoded(config, source, clips, names, pool)
                await asyncio.gather(*map(both, names, decoded))


def _decoded(
    config: PairsConfig,
    source: CaptionSource,
    clips: Mapping[str, Sample],
    names: Sequence[str],
    pool: DecodePool,
) -> list[DecodedClip | None]:
    """The clips with picture and sound; None for one that cannot be used."""
    sampling = SamplingConfig(frames=source.frames, max_side=source.frame_size)
    jobs: dict[str, DecodeJob] = {}
    for name in names:
        ref = clips[name].media["audio"]
        try:
            path = resolve(Path(config.data.media_root), ref.path)
        except MediaError:
            continue
        want: frozenset[Modality] = frozenset(("video", "audio"))
        jobs[name] = DecodeJob(path, ref.path, want, sampling, config.decode, ref.start, ref.end)
    made = dict(zip(jobs, pool.map(list(jobs.values())), strict=True))
    found = [made.get(name) for name in names]
    return [None if isinstance(one, BadClip) else one for one in found]


async def _question(
    source: CaptionSource,
    clips: Mapping[str, Sample],
    captions: Mapping[str, Mapping[str, Any]],
    chat: ChatClient,
    file: StepFile,
    left: Left,
) -> None:
    """Ask for the questions that are not in the file."""
    sampling = source.endpoint.request("questions", QUESTIONS_SCHEMA)
    todo = {
        name: key
        for name, known in captions.items()
        if (key := _question_key(name, clips[name], known)) not in file.known
    }

    with progress("questions", len(captions), done=len(captions) - len(todo), unit="clips") as bar:

        async def one(name: str, key: str) -> None:
            label = clips[name].truth.label or ""
            found = await chat.ask(
                lambda: write(label, captions[name], source.questions, source.probes),
                sampling,
                lambda reply: read_questions(reply, source.questions, source.probes),
            )
            if found is None:
                left.out("no_questions", clips[name].sample_id)
            else:
                file.add({key: found})
            bar.advance()

        async with chat.connected():
            await asyncio.gather(*(one(name, key) for name, key in todo.items()))


def _drafts(
    config: PairsConfig,
    sample: Sample,
    captions: Mapping[str, Any],
    written: Mapping[str, Any],
    left: Left,
) -> list[Draft]:
    """A clip's questions, the letters of their choices drawn by the config's seed."""
    driving = [name for name in _CHANNELS if captions[name]["emotion"] == sample.truth.label]
    if not driving:
        left.out("neither_channel", sample.sample_id)
        return []
    driven = "both" if len(driving) == 2 else driving[0]
    heard = {name: captions[name]["emotion"] for name in _CHANNELS}
    labels = {**heard, **sample.truth.modality_labels}
    base = replace(sample, truth=replace(sample.truth, modality_labels=labels))
    found: list[Draft] = []
    for channel in _CHANNELS:
        if channel not in config.queries:
            continue
        cell = f"{driven}-driven/{_CUE_NAMES[channel]} cue"
        for number, one in enumerate(written[channel]["questions"]):
            name = f"{sample.sample_id}-{channel}-choice-{number}"
            found.append(_choice(base, channel, name, f"{cell}/choice", one, config.seed))
        for number, one in enumerate(written[channel]["probes"]):
            for role in ROLES:
                name = f"{sample.sample_id}-{channel}-{role}-{number}"
                found.append(_probe(base, channel, name, cell, role, one[role]))
    return found


def _choice(
    sample: Sample, channel: Query, name: str, cell: str, one: Mapping[str, str], seed: int
) -> Draft:
    roles = [*ROLES, "other"]
    random.Random(f"{seed}/{name}").shuffle(roles)
    lettered = {role: f"({'ABCD'[at]}) {one[role]}" for at, role in enumerate(roles)}
    text = f"{one['question']} {' '.join(lettered[role] for role in roles)}"
    answers: dict[Answer, str] = {
        "chosen": lettered["grounded"],
        "spurious": lettered["spurious"],
        "hallucinated": lettered["hallucinated"],
    }
    return Draft(_asked(sample, name, text, cell), channel, answers, (one["grounded"],))


def _probe(sample: Sample, channel: Query, name: str, cell: str, role: str, cue: str) -> Draft:
    """A yes/no question about one cue; a cue that is there and speaks for the emotion is a yes."""
    kinds = {
        "grounded": "no_hallucination",
        "spurious": f"{_CUE_NAMES[channel]}_relevant",
        "hallucinated": "emotion_relevant",
    }
    text = f"Does this cue contribute to {sample.truth.label}: {cue}?"
    asked = _asked(sample, name, text, f"{cell}/{kinds[role]}")
    if role == "grounded":
        return Draft(asked, channel, {"chosen": "Yes.", "spurious": "No."}, (cue,), plain=True)
    place: Answer = "spurious" if role == "spurious" else "hallucinated"
    return Draft(asked, channel, {"chosen": "No.", place: "Yes."})


def _asked(sample: Sample, name: str, text: str, cell: str) -> Sample:
    marks = "".join(PLACEHOLDERS[one] for one in MODALITIES if one in sample.media)
    return replace(
        sample,
        sample_id=name,
        turns=(Turn("user", marks + text),),
        group={**sample.group, "cell": cell},
        tier=None,
    )


def _question_key(name: str, sample: Sample, captions: Mapping[str, Any] | None) -> str:
    """The clip, its label and its captions: other ones are asked about anew."""
    text = json.dumps([sample.truth.label, captions], sort_keys=True)
    return f"{name}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _mark(source: CaptionSource, parts: Sequence[Any]) -> str:
    """Of all that decides the replies beside the clip. How patiently is asked changes nothing."""
    patience = ("base_url", "api_key_env", "timeout_s", "max_retries", "backoff_s", "concurrency")
    endpoint = {key: value for key, value in dump(source.endpoint).items() if key not in patience}
    text = json.dumps([endpoint, ASK_HASH, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
