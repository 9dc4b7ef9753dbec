"""Guesses from its words whether a cue is heard or seen: "sobbing", "lowered brows", 语速很快.

The words are the field's, in one file a language in ``cue_words/``. For each channel a file lists

- ``named``: words that name the channel itself ("voice", "face"), which decide over all others;
- ``words`` and ``exact``: what is heard or seen there ("sigh", "brows");
- ``weak``: words that decide only where no other one does ("pace", "bright");
- ``patterns``: regular expressions of the strength of ``words``;

and ``ambiguous.words``, which are both heard and seen ("crying") and tell nothing alone. A longer
match hides the shorter ones in it: "skin tone" is no tone. The strongest words of a cue decide; if
those speak for both channels, or if there is none, nothing is guessed.

A guess is a fallback for manifests that do not say where their cues are, and is reported as one.
The lists are ours.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mmemo.answers.words import EDGES, simplified

Heard = Literal["audio", "video"]

_FOLDER = Path(__file__).with_name("cue_words")
_STRENGTH = {"named": 3, "words": 2, "exact": 2, "patterns": 2, "weak": 1, "ambiguous": 0}
_DOUBLED = "bdgmnprt"  # final consonants that are doubled, as in "sobbing"


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of one channel (None: of either) and strength."""

    channel: Heard | None
    strength: int
    pattern: re.Pattern[str]


@lru_cache(maxsize=16384)
def guess_channel(cue: str) -> Heard | None:
    """``audio`` or ``video`` if the cue's words tell, else None."""
    text = simplified(unicodedata.normalize("NFKC", cue).replace("’", "'").lower())
    text = re.sub(r"[\s_]+", " ", text)
    found: list[tuple[int, int, _Words]] = [
        (one.start(), one.end(), words)
        for words in _lexicon()
        for one in words.pattern.finditer(text)
    ]
    whole = [
        (words.strength, words.channel)
        for start, end, words in found
        if not any(
            other_start <= start and end <= other_end and end - start < other_end - other_start
            for other_start, other_end, _ in found
        )
    ]
    strongest = max((strength for strength, _ in whole), default=0)
    heard, seen = ((strongest, channel) in whole for channel in ("audio", "video"))
    if heard == seen:
        return None
    return "audio" if heard else "video"


@lru_cache(maxsize=1)
def _lexicon() -> tuple[_Words, ...]:
    listed: list[_Words] = []
    for path in sorted(_FOLDER.glob("*.toml")):
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        ambiguous: list[str] = values.get("ambiguous", {}).get("words", [])
        listed.append(_Words(None, 0, _pattern("ambiguous", ambiguous)))
        channels: tuple[Heard, ...] = ("audio", "video")
        for channel in channels:
            for name, words in values[channel].items():
                listed.append(_Words(channel, _STRENGTH[name], _pattern(name, words)))
    return tuple(listed)


def _pattern(name: str, words: list[str]) -> re.Pattern[str]:
    """One pattern for the words of a list, the longest first."""
    if not words:
        return re.compile("(?!)")
    parts: list[str] = []
    for word in sorted(words, key=lambda one: (-len(one), one)):
        if not word.isascii():
            parts.append(word)
            continue
        form = word if name == "patterns" else re.escape(word)
        if name not in ("exact", "patterns"):
            form = _inflected(word)
        parts.append(f"{EDGES[0]}{form}{EDGES[1]}")
    return re.compile("|".join(parts))


def _inflected(word: str) -> str:
    """A pattern for an English word, or the last word of a phrase, and its regular inflections.

    Words in ``-y``, ``-ly``, ``-ness`` and ``-er`` count as inflections: "teary", "hoarseness".
    """
    stem, last = re.escape(word[:-1]), word[-1]
    if last == "e":
        return rf"{stem}(?:e|es|ed|er|ers|ely|eness|ing|ings|y|ily)"
    if last == "y" and word[-2:-1] not in "aeiou":
        return rf"{stem}(?:y|ies|ied|ying|ier|ily|iness)"
    doubled = rf"|{last}(?:ed|ing|ings|er|ers|y)" if last in _DOUBLED else ""
    endings = "s|es|ed|er|ers|ing|ings|y|ily|ly|iness|ness|'s"
    return rf"{re.escape(word)}(?:{endings}{doubled})?"
