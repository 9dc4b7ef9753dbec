"""The speakers of the world (facial geometry and colours, resting voice) and the lines they say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SKINS: tuple[tuple[int, int, int], ...] = (
    (255, 224, 196),
    (246, 205, 168),
    (232, 182, 140),
    (208, 152, 108),
    (170, 116, 80),
    (128, 84, 58),
)
HAIRS: tuple[tuple[int, int, int], ...] = (
    (38, 32, 36),
    (84, 56, 38),
    (132, 84, 46),
    (222, 178, 96),
    (178, 78, 40),
    (150, 150, 158),
)
SHIRTS: tuple[tuple[int, int, int], ...] = (
    (74, 108, 170),
    (176, 84, 84),
    (88, 148, 110),
    (142, 104, 164),
    (212, 158, 72),
    (96, 104, 116),
)
EYES: tuple[tuple[int, int, int], ...] = ((74, 48, 30), (52, 92, 130), (62, 112, 76), (40, 36, 36))
HAIR_STYLES: tuple[str, ...] = ("short", "long", "bun", "curly", "bob")
NEUTRAL_LINES: tuple[str, ...] = (  # short lines that fit any emotion
    "it is you again",
    "you came back to me",
    "they told me today",
    "look at the time now",
    "so this is the one",
    "i saw it at last",
    "you did it again",
    "that was my brother",
    "we are going home",
    "the door was open",
    "she said it to me",
    "i know what it is",
    "he is on the phone",
    "this is what we have",
    "now you tell me this",
    "they took it away",
)

LEANING_LINES: Mapping[str, tuple[str, ...]] = {  # lines that suggest an emotion
    "happy": ("we won it today", "what a lovely day", "i love this one"),
    "sad": ("i miss my old home", "he is gone for good", "we lost it today"),
    "angry": ("get out of my way", "this is not so fair", "do not lie to me"),
    "fear": ("there is someone there", "we have to go now", "do not go in there"),
    "surprise": ("i never knew that", "where did that come from", "is that a real one"),
}

ALL_LINES: tuple[str, ...] = (
    *NEUTRAL_LINES,
    *(line for lines in LEANING_LINES.values() for line in lines),
)

_LETTERS = re.compile(r"[aeiouy]+|[^aeiouy]+")
_VOWELS: Mapping[str, str] = {"a": "a", "e": "e", "i": "i", "y": "i", "o": "o", "u": "u"}
_CONSONANTS: Mapping[str, str] = {
    **dict.fromkeys("ptkqc", "stop"),
    **dict.fromkeys("bdg", "voiced"),
    **dict.fromkeys("sfzxjh", "noise"),
    **dict.fromkeys("mn", "nasal"),
    **dict.fromkeys("lrwv", "glide"),
}


@dataclass(frozen=True, slots=True)
class Speaker:
    """A speaker. Geometry is in units of the face's height; colours are RGB.

    ``pitch``: resting F0 in Hz. ``formants``: factor of the vowel formants (vocal tract length).
    ``loudness``: resting level in dB. ``rate``: resting rate in syllables per second. ``breath``:
    breathiness, 0..1.
    """

    name: str
    gender: str
    width: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow: float
    mouth: float
    nose: float
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    shirt: tuple[int, int, int]
    iris: tuple[int, int, int]
    style: str
    beard: bool
    pitch: float
    formants: float
    loudness: float
    rate: float
    breath: float


def make_speakers(seed: int, counts: Mapping[str, int], spread: float) -> dict[str, list[Speaker]]:
    """Distinct speakers for each split, named by a running number over all splits."""
    people: dict[str, list[Speaker]] = {}
    number = 0
    for split, count in counts.items():
        people[split] = []
        for _ in range(count):
            people[split].append(_make_speaker(seed, number, spread))
            number += 1
    return people


def _make_speaker(seed: int, number: int, spread: float) -> Speaker:
    rng = np.random.default_rng([seed, 99, number])
    female = number % 2 == 0

    def vary(centre: float, half: float, digits: int = 3) -> float:
        return round(centre + half * spread * float(rng.uniform(-1, 1)), digits)

    def pick(options: int) -> int:
        return int(rng.integers(options))

    styles = HAIR_STYLES if female else ("short", "curly", "short", "bob")
    return Speaker(
        name=f"s{number:03d}",
        gender="f" if female else "m",
        width=vary(0.76, 0.08),
        jaw=vary(0.80 if female else 0.90, 0.08),
        eye_gap=vary(0.235, 0.03),
        eye_size=vary(0.118, 0.018),
        brow=vary(0.030 if female else 0.042, 0.012),
        mouth=vary(0.30, 0.05),
        nose=vary(0.17, 0.04),
        skin=SKINS[pick(len(SKINS))],
        hair=HAIRS[pick(len(HAIRS))],
        shirt=SHIRTS[pick(len(SHIRTS))],
        iris=EYES[pick(len(EYES))],
        style=styles[pick(len(styles))],
        beard=not female and pick(4) == 0,
        pitch=round((205.0 if female else 118.0) * 2 ** vary(0.0, 0.22, 6), 2),
        formants=vary(1.14 if female else 0.98, 0.05),
        loudness=vary(0.0, 3.0),
        rate=vary(4.2, 0.5),
        breath=vary(0.35, 0.12),
    )


def syllables(line: str) -> list[tuple[str, str]]:
    """The line's syllables as (consonant class, vowel) pairs, coarsely derived from its spelling.

    Consonant classes are stop, voiced, noise, nasal, glide and none; vowels are a, e, i, o, u.
    """
    found: list[tuple[str, str]] = []
    for word in line.split():
        onset = "none"
        parts = _LETTERS.findall(word)
        for position, part in enumerate(parts):
            if part[0] not in _VOWELS:
                onset = _CONSONANTS.get(part[-1], "noise")
                continue
            silent = part == "e" and position == len(parts) - 1 and position > 1
            if not silent:
                vowel = "u" if part in ("oo", "ou") else "o" if part == "oa" else part[0]
                found.append((onset, _VOWELS[vowel]))
                onset = "none"
    return found
