"""Preference pairs from a chat endpoint: captions of each modality, then questions about cues.

The steps follow AVERE's pipeline (arXiv 2602.07054); the wording of the prompts is ours.

A clip with one modality only is asked about that one.

1. *Captions.* The picture without its sound and the sound without its picture are described in
   separate requests, each with the emotion that it suggests, so that neither caption can borrow
   from the other modality (``captions.jsonl``).
2. *Questions.* From the two captions and the label, the endpoint writes questions about cues
   (``questions.jsonl``).
3. *Drafts.* Every question becomes a pair in one of the pipeline's cells, kept in ``group.cell``:
   {audio-, video-driven}, by which caption suggests the clip's label, times {visual, audio cue},
   times {no_hallucination: present, answer yes; visual_relevant or audio_relevant: present but
   irrelevant, answer no; emotion_relevant: typical of the emotion but absent, answer no}.

A reply must be one JSON object of a fixed form; anything else counts as no reply. Each step is a
JSONL file in the run folder, so a killed run resumes and asks only for what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from mmemo.config import dump
from mmemo.console import progress
from mmemo.data.preference import Answer, Query, queried
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES, CueChannel, MediaRef, Modality, Sample, Turn
from mmemo.errors import DataError, MediaError
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.config import SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.paths import resolve
from mmemo.pairs.config import CaptionSource, PairsConfig
from mmemo.pairs.rows import PairDraft, SkippedRows
from mmemo.pairs.steps import StepFile
from mmemo.rewards.judge.media import frame_part, sound_part
from mmemo.rewards.judge.openai_client import ChatClient, Messages
from mmemo.run_log import RunRecord

CAPTIONS, QUESTIONS = "captions.jsonl", "questions.jsonl"
_CHANNELS: tuple[Query, ...] = ("video", "audio")
_CUE_NAMES: Mapping[Query, str] = {"video": "visual", "audio": "audio"}
ROLES = ("grounded", "spurious", "hallucinated")
Json = dict[str, Any]

# What the endpoint is asked.

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
WRITE_ONE = (
    "You write questions that test whether a model {looks}. You get the emotion of a person in a "
    "clip and a description of the {shown}. Write {questions} questions with four choices and "
    "{probes} sets of cues. Every choice and cue has two to six words, and all are about as long. "
    "'grounded' is a cue of the description that speaks for the emotion, 'spurious' one of it that "
    "is beside the point, 'hallucinated' is typical of the emotion but not in the description, "
    "'other' is not in it and of another emotion. Answer with one JSON object with the key "
    "{channel}, an object with the keys questions (a list of objects with question, grounded, "
    "spurious, hallucinated, other) and probes (a list of objects with grounded, spurious, "
    "hallucinated)."
)
"""The same about a clip with one modality. It is part of the keys of such clips' questions."""
_SEEN: Mapping[Query, tuple[str, str]] = {
    "video": ("looks", "picture"),
    "audio": ("listens", "sound"),
}
PROMPTS_HASH = hashlib.sha256(json.dumps([dict(DESCRIBE), _REPLY, WRITE]).encode()).hexdigest()
"""Part of a step's fingerprint: if the wording changes, everything is asked again."""

# The forms of its replies, as JSON schemas.

_TEXT = {"type": "string"}
_QUESTION = ("question", *ROLES, "other")
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


def _object_schema(names: Sequence[str]) -> Json:
    properties = dict.fromkeys(names, _TEXT)
    return {
        "type": "object",
        "properties": properties,
        "required": list(names),
        "additionalProperties": False,
    }


_CHANNEL: Json = {
    "type": "object",
    "properties": {
        "questions": {"type": "array", "items": _object_schema(_QUESTION)},
        "probes": {"type": "array", "items": _object_schema(ROLES)},
    },
    "required": ["questions", "probes"],
    "additionalProperties": False,
}


def questions_schema(channels: Sequence[Query]) -> Json:
    """The form of a reply with questions about these modalities."""
    return {
        "type": "object",
        "properties": dict.fromkeys(channels, _CHANNEL),
        "required": list(channels),
        "additionalProperties": False,
    }


def from_captions(
    config: PairsConfig,
    source: CaptionSource,
    samples: Sequence[Sample],
    skipped: SkippedRows,
    record: RunRecord,
) -> list[PairDraft]:
    """Drafts of all questions about all clips that have a label.

    Rows are skipped and counted as ``no_label``, ``no_media``, ``bad_clip``, ``no_caption``,
    ``no_questions``, or ``neither_channel`` (no caption suggests the label).

    Raises:
        ConfigError: the endpoint's API key is not set.
        DataError: the endpoint failed on a larger share of clips than ``max_failure_share``.
    """
    clips = _labelled_clips(samples, skipped)
    labels = source.labels or sorted({one.truth.label for one in clips.values() if one.truth.label})
    counts: Counter[str] = Counter()
    chat = ChatClient(source.endpoint, counts, "the captioning endpoint")
    folder = Path(config.output_dir)
    captions = StepFile(
        folder / CAPTIONS, _fingerprint(source, [labels, source.frames, source.frame_size])
    )
    asyncio.run(_ask_captions(config, source, clips, labels, chat, captions, skipped))
    whole = {
        name: {channel: captions.known[f"{name}/{channel}"] for channel in channels_of(sample)}
        for name, sample in clips.items()
        if all(f"{name}/{channel}" in captions.known for channel in channels_of(sample))
    }
    questions = StepFile(
        folder / QUESTIONS, _fingerprint(source, [source.questions, source.probes])
    )
    asyncio.run(_ask_questions(source, clips, whole, chat, questions, skipped))
    record.event("endpoint", **counts)
    failed = skipped.counts["no_caption"] + skipped.counts["no_questions"]
    if failed > source.max_failure_share * len(clips):
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise DataError(
            f"the captioning endpoint failed on {failed} of {len(clips)} clips ({outcomes}); fix "
            "it and run again, which asks only for what is missing"
        )
    drafts: list[PairDraft] = []
    # In the order of the clips, not of the replies, so that every run writes the same file.
    for name, sample in clips.items():
        key = _question_key(name, sample, whole.get(name))
        if key in questions.known:
            drafts += _drafts(config, sample, whole[name], questions.known[key], skipped)
    return drafts


def _labelled_clips(samples: Sequence[Sample], skipped: SkippedRows) -> dict[str, Sample]:
    """Name of each clip -> the row with the most streams among its rows."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.truth.label is None:
            skipped.add("no_label", sample.sample_id)
        elif not sample.media:
            skipped.add("no_media", sample.sample_id)
        else:
            ref = sample.media.get("audio") or _picture_of(sample)
            name = f"{ref.path}#{ref.start}#{ref.end}"
            if name not in found or len(found[name].media) < len(sample.media):
                found[name] = sample
    return found


def channels_of(sample: Sample) -> tuple[Query, ...]:
    """The modalities that a row shows of its clip."""
    return tuple(channel for channel in _CHANNELS if queried(channel, sample.media))


def _picture_of(sample: Sample) -> MediaRef:
    return sample.media.get("video") or sample.media["face"]


async def _ask_captions(
    config: PairsConfig,
    source: CaptionSource,
    clips: Mapping[str, Sample],
    labels: Sequence[str],
    chat: ChatClient,
    file: StepFile,
    skipped: SkippedRows,
) -> None:
    """Request the captions that are not in the file yet, some clips at a time."""
    sampling = source.endpoint.request("caption", CAPTION_SCHEMA)

    async def one(name: str, channel: Query, clip: DecodedClip) -> bool:
        key = f"{name}/{channel}"
        if key not in file.known:
            found = await chat.ask(
                lambda: caption_messages(channel, clip, labels),
                sampling,
                lambda reply: parse_caption(reply, labels),
            )
            if found is None:
                return False
            file.add({key: found})
        return True

    async def both(name: str, decoded: Mapping[Query, DecodedClip] | None) -> None:
        if decoded is None:
            skipped.add("bad_clip", clips[name].sample_id)
        elif not all(await asyncio.gather(*(one(name, *each) for each in decoded.items()))):
            skipped.add("no_caption", clips[name].sample_id)
        bar.advance()

    todo = [
        name
        for name, sample in clips.items()
        if not {f"{name}/{channel}" for channel in channels_of(sample)} <= {*file.known}
    ]
    # A clip takes two requests, so half as many clips keep every slot busy.
    step = max(1, source.endpoint.concurrency // 2)
    with (
        progress("captions", len(clips), done=len(clips) - len(todo), unit="clips") as bar,
        DecodePool(config.decode) as pool,
    ):
        async with chat.connected():
            for start in range(0, len(todo), step):
                names = todo[start : start + step]
                decoded = _decode(config, source, clips, names, pool)
                await asyncio.gather(*map(both, names, decoded))


def _decode(
    config: PairsConfig,
    source: CaptionSource,
    clips: Mapping[str, Sample],
    names: Sequence[str],
    pool: DecodePool,
) -> list[dict[Query, DecodedClip] | None]:
    """The decoded modalities of each clip; None for a clip that cannot be used."""
    sampling = SamplingConfig(frames=source.frames, max_side=source.frame_size)
    # Picture and sound of one file are decoded together.
    wanted: dict[tuple[str, MediaRef], set[Modality]] = {}
    for name in names:
        for channel, ref in _files_of(clips[name]).items():
            wanted.setdefault((name, ref), set()).add(channel)
    jobs: dict[tuple[str, MediaRef], DecodeJob] = {}
    for key, want in wanted.items():
        ref = key[1]
        try:
            path = resolve(Path(config.data.media_root), ref.path)
        except MediaError:
            continue
        jobs[key] = DecodeJob(
            path, ref.path, frozenset(want), sampling, config.decode, ref.start, ref.end
        )
    made = dict(zip(jobs, pool.map(list(jobs.values())), strict=True))
    found: list[dict[Query, DecodedClip] | None] = []
    for name in names:
        decoded: dict[Query, DecodedClip] = {}
        for channel, ref in _files_of(clips[name]).items():
            one = made.get((name, ref))
            if isinstance(one, DecodedClip):
                decoded[channel] = one
        found.append(decoded if len(decoded) == len(channels_of(clips[name])) else None)
    return found


def _files_of(sample: Sample) -> dict[Literal["video", "audio"], MediaRef]:
    """The file of each modality of a row, without face boxes, which no caption needs."""
    found: dict[Literal["video", "audio"], MediaRef] = {}
    if queried("video", sample.media):
        found["video"] = replace(_picture_of(sample), face_boxes=())
    if "audio" in sample.media:
        found["audio"] = sample.media["audio"]
    return found


async def _ask_questions(
    source: CaptionSource,
    clips: Mapping[str, Sample],
    captions: Mapping[str, Mapping[str, Any]],
    chat: ChatClient,
    file: StepFile,
    skipped: SkippedRows,
) -> None:
    """Request the questions that are not in the file yet."""
    todo = {
        name: key
        for name, known in captions.items()
        if (key := _question_key(name, clips[name], known)) not in file.known
    }

    with progress("questions", len(captions), done=len(captions) - len(todo), unit="clips") as bar:

        async def one(name: str, key: str) -> None:
            label, channels = clips[name].truth.label or "", channels_of(clips[name])
            found = await chat.ask(
                lambda: question_messages(label, captions[name], source.questions, source.probes),
                source.endpoint.request("questions", questions_schema(channels)),
                lambda reply: parse_questions(reply, source.questions, source.probes, channels),
            )
            if found is None:
                skipped.add("no_questions", clips[name].sample_id)
            else:
                file.add({key: found})
            bar.advance()

        async with chat.connected():
            # The client itself bounds the number of concurrent requests.
            await asyncio.gather(*(one(name, key) for name, key in todo.items()))


def _question_key(name: str, sample: Sample, captions: Mapping[str, Any] | None) -> str:
    """Key of a clip's questions; it changes with the clip's label and captions."""
    parts: list[Any] = [sample.truth.label, captions]
    if len(channels_of(sample)) == 1:
        parts.append(WRITE_ONE)
    text = json.dumps(parts, sort_keys=True)
    return f"{name}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _fingerprint(source: CaptionSource, parts: Sequence[Any]) -> str:
    """Fingerprint of everything that decides the replies, apart from the clip.

    Timeouts, retries and the like are left out, since they do not change a reply.
    """
    patience = ("base_url", "api_key_env", "timeout_s", "max_retries", "backoff_s", "concurrency")
    endpoint = {key: value for key, value in dump(source.endpoint).items() if key not in patience}
    text = json.dumps([endpoint, PROMPTS_HASH, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# Requests to the endpoint, and how its replies are read.


def caption_messages(channel: Query, clip: DecodedClip, labels: Sequence[str]) -> Messages:
    """The request for a caption of one modality; the other modality is not sent."""
    parts: list[Json] = []
    if channel == "video":
        assert clip.frames is not None
        parts += [frame_part(frame) for frame in clip.frames]
    else:
        assert clip.waveform is not None
        parts.append(sound_part(clip.waveform, clip.sample_rate))
    text = DESCRIBE[channel] + _REPLY.format(labels=", ".join(labels))
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def question_messages(
    label: str, captions: Mapping[str, Json], questions: int, probes: int
) -> Messages:
    """The request for questions about a clip, given its label and captions."""
    text = WRITE.format(questions=questions, probes=probes)
    if len(captions) == 1:
        (channel,) = captions
        looks, shown = _SEEN["audio" if channel == "audio" else "video"]
        text = WRITE_ONE.format(
            looks=looks, shown=shown, channel=channel, questions=questions, probes=probes
        )
    facts = json.dumps({"emotion": label, **captions}, ensure_ascii=False, indent=1)
    return [{"role": "system", "content": text}, {"role": "user", "content": facts}]


def parse_caption(reply: str, labels: Sequence[str]) -> Json | None:
    """The caption in a reply; None if it is malformed or its emotion is not one of the labels."""
    found = _parse_object(reply)
    if found is None or set(found) != set(CAPTION_SCHEMA["required"]):
        return None
    by_name = {label.lower(): label for label in labels}
    emotion = found["emotion"]
    label = by_name.get(emotion.strip().lower()) if isinstance(emotion, str) else None
    lists = [_nonblank_texts(found[name]) for name in ("relevant", "irrelevant")]
    if label is None or None in lists or not _nonblank_texts([found["caption"]]):
        return None
    return {**found, "emotion": label}


def parse_questions(
    reply: str, questions: int, probes: int, channels: Sequence[Query] = _CHANNELS
) -> Json | None:
    """The questions in a reply; None if it is malformed.

    It must have as many questions as requested for each modality, with distinct cues in each.
    """
    found = _parse_object(reply)
    if found is None or set(found) != set(channels):
        return None
    for channel in found.values():
        if not isinstance(channel, dict) or set(cast("Json", channel)) != {"questions", "probes"}:
            return None
        for name, keys, number in (("questions", _QUESTION, questions), ("probes", ROLES, probes)):
            listed: Any = channel[name]
            if not isinstance(listed, list) or len(cast("list[Any]", listed)) < number:
                return None
            items = cast("list[Any]", listed)[:number]
            if not all(_is_valid_item(item, keys) for item in items):
                return None
            channel[name] = items
    return found


def _is_valid_item(item: Any, keys: Sequence[str]) -> bool:
    if not isinstance(item, dict) or set(cast("Json", item)) != set(keys):
        return False
    # Two equal cues would make one choice both right and wrong.
    values = _nonblank_texts(list(cast("Json", item).values()))
    return values is not None and len({value.strip().lower() for value in values}) == len(keys)


def _nonblank_texts(value: Any) -> list[str] | None:
    """``value`` as a list of texts; None unless all are non-blank and without media placeholder."""
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    good = all(isinstance(one, str) and one.strip() and "<" not in one for one in items)
    return cast("list[str]", items) if good else None


def _parse_object(reply: str) -> Json | None:
    """The reply as one JSON object, without a code fence around it; None if it is none."""
    text = reply.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("Json", value) if isinstance(value, dict) else None


# Questions as drafts of pairs.


def _drafts(
    config: PairsConfig,
    sample: Sample,
    captions: Mapping[str, Any],
    written: Mapping[str, Any],
    skipped: SkippedRows,
) -> list[PairDraft]:
    """The pairs of a clip. The order of the choices of a question is drawn by the config's seed."""
    channels = channels_of(sample)
    driving = [name for name in channels if captions[name]["emotion"] == sample.truth.label]
    if not driving:
        skipped.add("neither_channel", sample.sample_id)
        return []
    driven = "both" if len(driving) == 2 else driving[0]
    captioned = {name: captions[name]["emotion"] for name in channels}
    # A row's own labels take precedence over what the captions suggest.
    labels = {**captioned, **sample.truth.modality_labels}
    base = replace(sample, truth=replace(sample.truth, modality_labels=labels))
    found: list[PairDraft] = []
    for channel in channels:
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
) -> PairDraft:
    roles = [*ROLES, "other"]
    random.Random(f"{seed}/{name}").shuffle(roles)
    lettered = {role: f"({'ABCD'[at]}) {one[role]}" for at, role in enumerate(roles)}
    text = f"{one['question']} {' '.join(lettered[role] for role in roles)}"
    answers: dict[Answer, str] = {
        "chosen": lettered["grounded"],
        "spurious": lettered["spurious"],
        "hallucinated": lettered["hallucinated"],
    }
    known = _with_irrelevant(sample, one["spurious"], channel)
    return PairDraft(_with_question(known, name, text, cell), channel, answers, (one["grounded"],))


def _probe(sample: Sample, channel: Query, name: str, cell: str, role: str, cue: str) -> PairDraft:
    """A yes/no question about one cue; the answer is yes for a present cue of the emotion."""
    kinds = {
        "grounded": "no_hallucination",
        "spurious": f"{_CUE_NAMES[channel]}_relevant",
        "hallucinated": "emotion_relevant",
    }
    text = f"Does this cue contribute to {sample.truth.label}: {cue}?"
    asked = _with_question(sample, name, text, f"{cell}/{kinds[role]}")
    if role == "grounded":
        # A wrong "No." is neither spurious nor hallucinated.
        return PairDraft(asked, channel, {"chosen": "Yes.", "spurious": "No."}, (cue,), plain=True)
    rejected: Answer = "spurious" if role == "spurious" else "hallucinated"
    if role == "spurious":
        asked = _with_irrelevant(asked, cue, channel)
    return PairDraft(asked, channel, {"chosen": "No.", rejected: "Yes."})


def _with_irrelevant(sample: Sample, cue: str, channel: Query) -> Sample:
    """The sample with a cue that the endpoint calls irrelevant, in the channel that it is in."""
    truth = sample.truth
    cues = {**truth.cues, "spurious": (*truth.cues.get("spurious", ()), cue)}
    where: CueChannel = "audio" if channel == "audio" else "video"
    channels = {**truth.cue_channels, cue: where}
    return replace(sample, truth=replace(truth, cues=cues, cue_channels=channels))


def _with_question(sample: Sample, name: str, text: str, cell: str) -> Sample:
    placeholders = "".join(PLACEHOLDERS[one] for one in MODALITIES if one in sample.media)
    return replace(
        sample,
        sample_id=name,
        turns=(Turn("user", placeholders + text),),
        group={**sample.group, "cell": cell},
        tier=None,
    )
