"""Reads by rule what an emotion answer claims about a clip: emotions, cues, and which is stronger.

The rules are made for the world's closed vocabulary and tolerate different wordings: ``Face: angry,
strong, brows lowered.`` and "The face looks angry" make the same claim.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import think_text
from mmemo.answers.parsing import EMOTIONS, base_form, labels_for, normalise, read_label
from mmemo.world import emotions as E

Channel = Literal["face", "voice"]
CHANNELS: Mapping[Channel, str] = {"face": "video", "voice": "audio"}
"""Each channel and its key in a row's ``modality_labels``."""

FACE_CUES: frozenset[str] = frozenset(E.ACTION_UNITS.values())
_NOUNS = ("pitch", "range", "loudness", "rate", "ending", "breath")
VOICE_CUES: frozenset[str] = frozenset(
    f"{way} {noun}" for noun in _NOUNS for way in ("low", "high")
)
VOCABULARY: Mapping[Channel, frozenset[str]] = {"face": FACE_CUES, "voice": VOICE_CUES}

_SENTENCE = re.compile(r"(?<=[.;!?])\s+|\n+")
_NAMED = re.compile(
    r"\b(?:(?P<face>face|facial|facially|looks?)|(?P<voice>voice|vocal|vocally|sounds?|tone))\b"
)
_CONCLUDING = re.compile(
    r"\b(?:so|therefore|thus|hence|overall|which means|taken together|in sum|altogether)\b"
)
_STRONGER = re.compile(
    r"\b(?:(?P<more>stronger|decides|dominates|prevails|outweighs|wins)|(?P<less>weaker|yields))\b"
)
_STRENGTH = re.compile(r"\b(weak|weakly|faint|moderate|moderately|strong|strongly|intense)\b")
_STRENGTHS = {"w": 0, "f": 0, "m": 1, "s": 2, "i": 2}  # by first letter
_AGREE = re.compile(r"\b(?P<no>disagree|differ|conflict|contradict)s?\b|\b(?:agree|match)(?:es)?\b")
_SUPPOSED = re.compile(r"^(?:where|if|when|whenever)\b")
_NOT = re.compile(r"\b(?:not|no|never|neither|without|cannot)\b|n't\b")
_WORD = re.compile(r"\w+")
_ATTACHED = re.compile(r"\s*(?:(?:in|of|from|on) (?:the |their |his |her )?)?")


@dataclass(slots=True)
class Reading:
    """The claims of a text. ``cues``: asserted cues; ``doubled``: cues asserted and denied."""

    answer: str | None = None
    """The emotion in the answer; None if it names no single one."""
    emotions: dict[Channel, set[str]] = field(
        default_factory=lambda: {"face": set[str](), "voice": set[str]()}
    )
    strengths: dict[Channel, set[int]] = field(
        default_factory=lambda: {"face": set[int](), "voice": set[int]()}
    )
    stronger: set[str] = field(default_factory=set[str])
    """The channels called stronger: ``face``, ``voice`` or ``neither``."""
    agreement: set[bool] = field(default_factory=set[bool])
    concluded: set[str] = field(default_factory=set[str])
    """Emotions that the reasoning names without a channel."""
    cues: frozenset[str] = frozenset()
    doubled: frozenset[str] = frozenset()
    sentences: list[str] = field(default_factory=list[str])
    """Sentences of the reasoning, as written."""
    parts: Counter[str] = field(default_factory=Counter[str])
    """Number of sentences about the ``face`` or the ``voice`` (an emotion or a cue), and of those
    that ``weigh`` the channels."""
    idle: int = 0
    """Number of sentences without a channel, a cue, an emotion or a weighing."""

    def implied(self) -> str | None:
        """The channel called stronger, else the one described with the higher strength."""
        if len(self.stronger) == 1:
            return next(iter(self.stronger))
        face, voice = self.strengths["face"], self.strengths["voice"]
        if self.stronger or len(face) != 1 or len(voice) != 1 or face == voice:
            return None
        return "face" if max(face) > max(voice) else "voice"


def read(text: str, row: Mapping[str, Any]) -> Reading:
    """Read an answer with its ``<think>`` span. ``row`` adds the scene's cues to the known ones."""
    spurious = (row.get("cues") or {}).get("spurious", ())
    phrases = {cue: (cue,) for cue in (*FACE_CUES, *VOICE_CUES, *spurious)}
    thought = think_text(text)
    reading = Reading(answer=_answer(text))
    reading.sentences = [part.strip() for part in _SENTENCE.split(thought) if part.strip()]
    asserted: set[str] = set()
    denied: set[str] = set()
    for sentence in reading.sentences:
        claims = read_claims(sentence, phrases)
        asserted |= claims.asserted
        denied |= claims.denied
        _read_sentence(normalise(sentence), reading, claims.asserted | claims.denied)
    reading.cues, reading.doubled = frozenset(asserted), frozenset(asserted & denied)
    return reading


def _answer(text: str) -> str | None:
    label = read_label(text, labels_for(EMOTIONS[0])[0])
    return None if label is None else base_form(label)


def _read_sentence(sentence: str, reading: Reading, cues: frozenset[str]) -> None:
    """Add the claims of one normalised sentence, in which ``cues`` are named."""
    # What follows "so" or "therefore" is the conclusion and no longer says what a channel shows.
    cut = _CONCLUDING.search(sentence)
    clause = sentence if cut is None else sentence[: cut.start()]
    channels = _channel_words(clause)
    spoken: set[str] = {"face"} if cues & FACE_CUES else set()
    spoken |= {"voice"} if cues & VOICE_CUES else set()
    emotions = _emotions(sentence)
    for start, end, emotion in emotions:
        channel = _channel_at(clause, channels, start, end) if end <= len(clause) else None
        if channel is None:
            reading.concluded.add(emotion)
        else:
            reading.emotions[channel].add(emotion)
            spoken.add(channel)
    for one in _STRENGTH.finditer(clause):
        channel = _channel_at(clause, channels, one.start(), one.end())
        if channel is not None and not _denied(clause, one.start()):
            reading.strengths[channel].add(_STRENGTHS[one.group()[0]])
    weighs = _weigh(clause, reading)
    for channel in CHANNELS:
        reading.parts[channel] += channel in spoken
    reading.parts["weigh"] += weighs
    reading.idle += not (spoken or weighs or cues or emotions)


def _emotions(sentence: str) -> list[tuple[int, int, str]]:
    """Start, end and name of each emotion that is asserted."""
    labels = labels_for(EMOTIONS[0])[0]
    found: list[tuple[int, int, str]] = []
    for start, label in labels.mentions(sentence):
        if not _denied(sentence, start):
            word = _WORD.match(sentence, start)
            found.append((start, word.end() if word else start, base_form(label)))
    return found


def _weigh(clause: str, reading: Reading) -> bool:
    """Add which channel is called stronger and whether the channels are said to agree; returns
    whether the text weighs them at all."""
    # "Where they differ, the stronger decides" weighs the channels, but does not say which one it
    # is.
    if _SUPPOSED.match(clause):
        return True
    channels = _channel_words(clause)
    weighs = False
    if re.search(r"\bneither\b.*\b(?:strong|stronger|decides)\b", clause):
        reading.stronger.add("neither")
        return True
    for one in _STRONGER.finditer(clause):
        channel = _channel_at(clause, channels, one.start(), one.end())
        if channel is None:
            continue
        # "Weaker" and a negation each turn the claim around, and together they cancel.
        flipped = (one["less"] is not None) != _denied(clause, one.start())
        reading.stronger.add(_other(channel) if flipped else channel)
        weighs = True
        break  # "the face is stronger than the voice, which is weaker" is one claim
    for one in _AGREE.finditer(clause):
        reading.agreement.add((one["no"] is None) != _denied(clause, one.start()))
        weighs = True
    return weighs


def _channel_words(text: str) -> list[tuple[int, int, Channel]]:
    """Start, end and channel of each word that names a channel."""
    return [
        (one.start(), one.end(), "face" if one["face"] else "voice")
        for one in _NAMED.finditer(text)
    ]


def _channel_at(
    text: str, channels: list[tuple[int, int, Channel]], start: int, end: int
) -> Channel | None:
    """The channel that a word belongs to: the one attached after it, else the last one before it,
    else the next one."""
    after = [word for word in channels if word[0] >= end]
    if after and _ATTACHED.fullmatch(text, end, after[0][0]):
        return after[0][2]
    before = [word for word in channels if word[1] <= start]
    nearest = before[-1:] or after[:1]
    return nearest[0][2] if nearest else None


def _denied(text: str, start: int) -> bool:
    """Whether a negation precedes the position within its part of the sentence."""
    return _NOT.search(text[:start].rpartition(",")[2]) is not None


def _other(channel: Channel) -> Channel:
    return "voice" if channel == "face" else "face"
