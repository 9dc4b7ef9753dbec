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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mmemo.answers.words import EDGES, simplified

Heard = Literal["audio", "video"]
_Kind = tuple[Heard | None, int]
"""The channel (None: either) and the strength of a word."""

_FOLDER = Path(__file__).with_name("cue_words")
_STRENGTH = {"named": 3, "words": 2, "exact": 2, "patterns": 2, "weak": 1}
_DOUBLED = "bdgmnprt"  # final consonants that are doubled, as in "sobbing"
_ENDINGS = ("", "s", "es", "ed", "er", "ers", "ing", "ings", "y", "ily", "ly", "iness", "ness")
_AFTER_E = ("e", "es", "ed", "er", "ers", "ely", "eness", "ing", "ings", "y", "ily")
_AFTER_Y = ("y", "ies", "ied", "ying", "ier", "ily", "iness")
_AFTER_DOUBLED = ("ed", "ing", "ings", "er", "ers", "y")
_LONGEST = 5  # words of a phrase
_WORD = re.compile(r"[^\W_\u2e80-\U0010ffff]+")


@dataclass(slots=True)
class _Lexicon:
    """``phrases``: words of Latin script, separated by blanks; ``patterns``: all others."""

    phrases: dict[str, _Kind] = field(default_factory=dict[str, _Kind])
    patterns: list[tuple[re.Pattern[str], _Kind]] = field(
        default_factory=list[tuple[re.Pattern[str], _Kind]]
    )


@lru_cache(maxsize=16384)
def guess_channel(cue: str) -> Heard | None:
    """``audio`` or ``video`` if the cue's words tell, else None."""
    text = simplified(unicodedata.normalize("NFKC", cue).lower())
    found = [*_matches(text)]
    whole = [
        kind
        for start, end, kind in found
        if not any(
            other_start <= start and end <= other_end and end - start < other_end - other_start
            for other_start, other_end, _ in found
        )
    ]
    strongest = max((strength for _, strength in whole), default=0)
    heard, seen = ((channel, strongest) in whole for channel in ("audio", "video"))
    if heard == seen:
        return None
    return "audio" if heard else "video"


def _matches(text: str) -> Iterator[tuple[int, int, _Kind]]:
    """Start, end and kind of each word and phrase of the lexicon in a text."""
    lexicon = _lexicon()
    words = [(one.group(), one.start(), one.end()) for one in _WORD.finditer(text)]
    for first in range(len(words)):
        for last in range(first, min(len(words), first + _LONGEST)):
            kind = lexicon.phrases.get(" ".join(word for word, _, _ in words[first : last + 1]))
            if kind is not None:
                yield words[first][1], words[last][2], kind
    for pattern, kind in lexicon.patterns:
        yield from ((one.start(), one.end(), kind) for one in pattern.finditer(text))


@lru_cache(maxsize=1)
def _lexicon() -> _Lexicon:
    found = _Lexicon()
    channels: tuple[Heard, ...] = ("audio", "video")
    for path in sorted(_FOLDER.glob("*.toml")):
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        _add(found, "words", values["ambiguous"]["words"], (None, 0))
        for channel in channels:
            for name, words in values[channel].items():
                _add(found, name, words, (channel, _STRENGTH[name]))
    return found


def _add(lexicon: _Lexicon, name: str, words: list[str], kind: _Kind) -> None:
    plain = [word for word in words if not word.isascii()]
    if name == "patterns":
        plain = []
        joined = "|".join(f"{EDGES[0]}{word}{EDGES[1]}" for word in words)
        lexicon.patterns.append((re.compile(joined), kind))
    if plain:
        joined = "|".join(sorted(plain, key=lambda one: (-len(one), one)))
        lexicon.patterns.append((re.compile(joined), kind))
    for word in words if name != "patterns" else ():
        if word.isascii():
            for form in (word,) if name == "exact" else _inflected(word):
                lexicon.phrases.setdefault(" ".join(_WORD.findall(form)), kind)


def _inflected(word: str) -> Iterable[str]:
    """An English word, or a phrase by its last word, and its regular inflections.

    Words in ``-y``, ``-ly``, ``-ness`` and ``-er`` count as inflections: "teary", "hoarseness".
    """
    stem, last = word[:-1], word[-1]
    if last == "e":
        return [stem + end for end in _AFTER_E]
    if last == "y" and word[-2:-1] not in "aeiou":
        return [stem + end for end in _AFTER_Y]
    doubled = [last + end for end in _AFTER_DOUBLED] if last in _DOUBLED else []
    return [word + end for end in (*_ENDINGS, *doubled)]
