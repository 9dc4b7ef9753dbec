"""What an emotion answer says of a clip, read by rule: the channels, their cues, the weighing.

Made for the world's closed vocabulary, and generous about wording: ``Face: angry, strong, brows
lowered.`` and "The face looks angry" say the same.
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
    """What a text claims. ``cues`` are asserted; ``doubled`` are asserted and denied."""

    answer: str | None = None
    """The one emotion that is answered."""
    emotions: dict[Channel, set[str]] = field(
        default_factory=lambda: {"face": set[str](), "voice": set[str]()}
    )
    strengths: dict[Channel, set[int]] = field(
        default_factory=lambda: {"face": set[int](), "voice": set[int]()}
    )
    stronger: set[str] = field(default_factory=set[str])
    """Of ``face``, ``voice`` and ``neither``."""
    agreement: set[bool] = field(default_factory=set[bool])
    concluded: set[str] = field(default_factory=set[str])
    """Emotions that the thought names without a channel."""
    cues: frozenset[str] = frozenset()
    doubled: frozenset[str] = frozenset()
    sentences: list[str] = field(default_factory=list[str])
    """Of the thought, as written."""
    parts: Counter[str] = field(default_factory=Counter[str])
    """Sentences that speak of ``face`` or ``voice`` (an emotion or a cue), or that ``weigh``."""
    idle: int = 0
    """Sentences that say nothing of a channel, a cue, an emotion or the weighing."""

    def implied(self) -> str | None:
        """The channel said to be stronger, else the one whose strength word is."""
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
    found = Reading(answer=_answer(text))
    found.sentences = [part.strip() for part in _SENTENCE.split(thought) if part.strip()]
    asserted: set[str] = set()
    denied: set[str] = set()
    for sentence in found.sentences:
        claims = read_claims(sentence, phrases)
        asserted |= claims.asserted
        denied |= claims.denied
        _read_sentence(normalise(sentence), found, claims.asserted | claims.denied)
    found.cues, found.doubled = frozenset(asserted), frozenset(asserted & denied)
    return found


def _answer(text: str) -> str | None:
    label = read_label(text, labels_for(EMOTIONS[0])[0])
    return None if label is None else base_form(label)


def _read_sentence(sentence: str, found: Reading, cues: frozenset[str]) -> None:
    """Add one normalised sentence, in which ``cues`` are named, to what was found."""
    cut = _CONCLUDING.search(sentence)
    told = sentence if cut is None else sentence[: cut.start()]
    places = _places(told)
    spoken: set[str] = {"face"} if cues & FACE_CUES else set()
    spoken |= {"voice"} if cues & VOICE_CUES else set()
    emotions = _emotions(sentence)
    for start, end, emotion in emotions:
        channel = _channel_at(told, places, start, end) if end <= len(told) else None
        if channel is None:
            found.concluded.add(emotion)
        else:
            found.emotions[channel].add(emotion)
            spoken.add(channel)
    for one in _STRENGTH.finditer(told):
        channel = _channel_at(told, places, one.start(), one.end())
        if channel is not None and not _denied(told, one.start()):
            found.strengths[channel].add(_STRENGTHS[one.group()[0]])
    weighs = _weigh(told, found)
    for channel in CHANNELS:
        found.parts[channel] += channel in spoken
    found.parts["weigh"] += weighs
    found.idle += not (spoken or weighs or cues or emotions)


def _emotions(sentence: str) -> list[tuple[int, int, str]]:
    """Start, end and name of each emotion that is said and not denied."""
    labels = labels_for(EMOTIONS[0])[0]
    found: list[tuple[int, int, str]] = []
    for start, label in labels.mentions(sentence):
        if not _denied(sentence, start):
            word = _WORD.match(sentence, start)
            found.append((start, word.end() if word else start, base_form(label)))
    return found


def _weigh(told: str, found: Reading) -> bool:
    """Read which channel is said to be stronger, and whether they are said to agree."""
    if _SUPPOSED.match(told):
        return True
    places = _places(told)
    weighs = False
    if re.search(r"\bneither\b.*\b(?:strong|stronger|decides)\b", told):
        found.stronger.add("neither")
        return True
    for one in _STRONGER.finditer(told):
        channel = _channel_at(told, places, one.start(), one.end())
        if channel is None:
            continue
        flipped = (one["less"] is not None) != _denied(told, one.start())
        found.stronger.add(_other(channel) if flipped else channel)
        weighs = True
        break  # "the face is stronger than the voice, which is weaker" says one thing
    for one in _AGREE.finditer(told):
        found.agreement.add((one["no"] is None) != _denied(told, one.start()))
        weighs = True
    return weighs


def _places(text: str) -> list[tuple[int, int, Channel]]:
    return [
        (one.start(), one.end(), "face" if one["face"] else "voice")
        for one in _NAMED.finditer(text)
    ]


def _channel_at(
    text: str, places: list[tuple[int, int, Channel]], start: int, end: int
) -> Channel | None:
    """Whose a word is: of the channel right after it, else before it, else the next."""
    after = [place for place in places if place[0] >= end]
    if after and _ATTACHED.fullmatch(text, end, after[0][0]):
        return after[0][2]
    before = [place for place in places if place[1] <= start]
    nearest = before[-1:] or after[:1]
    return nearest[0][2] if nearest else None


def _denied(text: str, start: int) -> bool:
    """Whether a denial stands before the place, in its part of the sentence."""
    return _NOT.search(text[:start].rpartition(",")[2]) is not None


def _other(channel: Channel) -> Channel:
    return "voice" if channel == "face" else "face"
