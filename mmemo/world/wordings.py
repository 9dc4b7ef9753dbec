"""One reasoning in many words: drafts of emotion answers, and several ways to say each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmemo.world.readings import Channel

ADJECTIVES: Mapping[str, str] = {
    "happy": "joyful",
    "sad": "sad",
    "angry": "angry",
    "fear": "afraid",
    "surprise": "surprised",
    "neutral": "neutral",
}
NOUNS: Mapping[str, str] = {
    "happy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "fear": "fear",
    "surprise": "surprise",
    "neutral": "no emotion",
}
FILLERS: tuple[str, ...] = (
    "This is a matter of great care.",
    "It is what it is.",
    "There are many ways to look at a thing like this.",
    "People are often hard to read.",
    "The clip is short and has a person in it.",
    "All of this is seen as it is.",
)
"""Sentences that say nothing."""

_SHOWN = {"face": "shows", "voice": "carries"}
_SENSED = {"face": "looks", "voice": "sounds"}
_FOUND = {"face": "seen", "voice": "heard"}


@dataclass(slots=True)
class Part:
    """What a draft says of one channel. ``strength`` may be empty."""

    emotion: str
    strength: str
    cues: list[str]


@dataclass(slots=True)
class Draft:
    """A reasoning before it is put into words. ``weighed``: the channels called stronger, one
    sentence each, or ``agree`` or ``neither``. ``concluded`` ends the thought, where it is set."""

    parts: dict[Channel, Part]
    weighed: list[str]
    answer: str
    concluded: str = ""
    fillers: int = 0
    repeats: int = 0
    small: int = 0
    """Sentences that begin with a small letter."""
    shape: str = "<think>{}</think><answer>{}</answer>"
    faults: dict[str, int] = field(default_factory=dict[str, int])


def worded(draft: Draft, rng: np.random.Generator) -> str:
    """The draft as text; the wording is drawn and says nothing about the faults."""
    channels = list(draft.parts)
    if rng.integers(2):
        channels.reverse()
    sentences = [_channel(name, draft.parts[name], rng) for name in channels]
    sentences += [_weigh(side, rng) for side in draft.weighed]
    if draft.concluded:
        sentences.append(_conclusion(draft.concluded, rng))
    for place in rng.permutation(len(sentences))[: draft.repeats]:
        sentences.append(sentences[int(place)])
    for number in rng.permutation(len(FILLERS))[: draft.fillers]:
        sentences.insert(int(rng.integers(len(sentences) + 1)), FILLERS[int(number)])
    for place in rng.permutation(len(sentences))[: draft.small]:
        text = sentences[int(place)]
        sentences[int(place)] = text[0].lower() + text[1:]
    return draft.shape.format(" ".join(sentences), draft.answer)


def _channel(name: Channel, part: Part, rng: np.random.Generator) -> str:
    adjective, noun, way = ADJECTIVES[part.emotion], NOUNS[part.emotion], int(rng.integers(5))
    strong, weakly = (f"{part.strength} ", f"{part.strength}ly ") if part.strength else ("", "")
    listed, joined = ", ".join(part.cues), _joined(part.cues)
    if way == 0 or (way == 4 and not part.cues):
        said = ", ".join(word for word in (part.emotion, part.strength, listed) if word)
        return f"{name.capitalize()}: {said}."
    if way == 1:
        return f"The {name} {_SHOWN[name]} {strong}{noun}{f': {listed}' if listed else ''}."
    if way == 2:
        with_cues = f", with {joined}" if joined else ""
        return f"The {name} {_SENSED[name]} {weakly}{adjective}{with_cues}."
    if way == 3:
        found = f", {_FOUND[name]} in {joined}" if joined else ""
        return f"In the {name} there is {strong}{noun}{found}."
    so = f", and {part.strength}ly so" if part.strength else ""
    return f"{joined[0].upper()}{joined[1:]}: the {name} is {adjective}{so}."


def _weigh(side: str, rng: np.random.Generator) -> str:
    if side == "neither":
        return _pick(rng, "Neither is strong.", "Neither of the two is strong.")
    if side == "agree":
        return _pick(rng, "Face and voice agree.", "Both agree.", "The two channels match.")
    other = "voice" if side == "face" else "face"
    return _pick(
        rng,
        f"The {side} is stronger.",
        f"The {other} is weaker.",
        f"The {side} outweighs the {other}.",
        f"The {side} decides.",
        f"The stronger channel is the {side}.",
    )


def _conclusion(emotion: str, rng: np.random.Generator) -> str:
    adjective, noun = ADJECTIVES[emotion], NOUNS[emotion]
    return _pick(rng, f"So the person feels {adjective}.", f"Therefore there is {noun}.")


def _joined(cues: Sequence[str]) -> str:
    return " and ".join(", ".join(cues).rsplit(", ", 1))


def _pick(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]
