"""What the people say: short lines that fit any emotion, some that lean, and their syllables."""

from __future__ import annotations

import re
from collections.abc import Mapping

NEUTRAL_LINES: tuple[str, ...] = (
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

LEANING_LINES: Mapping[str, tuple[str, ...]] = {
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


def syllables(line: str) -> list[tuple[str, str]]:
    """The line as (consonant class, vowel) pairs; a coarse reading of its spelling.

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
