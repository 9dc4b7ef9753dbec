"""The words of each language that answers are read with: one file a language in ``languages/``.

A file has the language's ``name``, its ``script`` and these sections. Those behind the third hold
regular expressions in lower case, in which ``<label>`` stands for any label that the text names:

- ``[labels]``: an emotion (its English base form) to the forms that mean it;
- ``[abbreviations]``: an emotion to the name that corpora give its label;
- ``[carriers]``: words around a label that add nothing, as in "the emotion is ...";
- ``[negation]``: ``before`` a label, ``after`` it, or ``anywhere`` in its clause; ``none`` are
  phrases that look like a negation and are none; ``ends`` is where the scope of one ends;
- ``[refusal]``: phrases that decline to answer;
- ``[verdict]``: where the verdict stands, and what beside it is no verdict;
  :mod:`mmemo.answers.verdict` says what each list is for.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

_FOLDER = Path(__file__).with_name("languages")

Span = tuple[int, int]
Match = re.Match[str]
Script = Literal["latin", "han", "kana", "hangul"]
LABEL, MASKED = "\ue000", "\ue001"
"""Stand in a text for each character of a label, and of a phrase that is no negation."""

_LETTER = r"[^\W\u2e80-\U0010ffff]"
EDGES = (f"(?<!{_LETTER})", f"(?!{_LETTER})")
"""Where a word of Latin script begins and ends, also beside a script without spaces."""

_WORD = re.compile(r"[^\W_]+")
NEVER = re.compile(r"(?!)")
_OPEN_ENDED = ("negation.denied_verb",)  # what these match ends where the next word begins
_SCRIPTS = {
    "latin": re.compile(r"[a-zA-Z]"),
    "han": re.compile(r"[\u4e00-\u9fff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "hangul": re.compile(r"[\uac00-\ud7a3]"),
}


@dataclass(frozen=True, slots=True)
class Language:
    """The words of one language.

    ``labels`` maps an emotion (its English base form) to the forms that mean it, and
    ``abbreviations`` an emotion to the name that corpora give its label. A language in Latin script
    applies to a text that has one of its ``marks``, its commonest words; English has none and
    always applies. ``patterns`` maps ``section.list`` to regular expressions.
    """

    code: str
    name: str
    labels: Mapping[str, tuple[str, ...]]
    script: Script = "latin"
    marks: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    abbreviations: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Rules:
    """The patterns of all languages that a text is written in. ``name`` is ``section.list``."""

    codes: tuple[str, ...]

    def find(self, name: str, text: str, within: Sequence[Span] | None = None) -> list[Match]:
        """All matches in order, each inside one of the spans; those of two languages may overlap.

        Args:
            text: in lower case.
            within: spans in order; None for the whole text.
        """
        found = [
            one
            for code in self.codes
            for start, end in ([(0, len(text))] if within is None else within)
            for one in pattern(code, name).finditer(text, start, end)
        ]
        return sorted(found, key=lambda one: one.start()) if len(self.codes) > 1 else found

    def search(self, name: str, text: str, start: int = 0, end: int | None = None) -> Match | None:
        """A match of any language."""
        end = len(text) if end is None else end
        found = (pattern(code, name).search(text, start, end) for code in self.codes)
        return next((one for one in found if one), None)

    def match(self, name: str, text: str, start: int) -> Match | None:
        """A match of any language that begins at ``start``."""
        found = (pattern(code, name).match(text, start) for code in self.codes)
        return next((one for one in found if one), None)


@lru_cache(maxsize=1)
def languages() -> Mapping[str, Language]:
    """Every language that has a file, by its code (``en``, ``zh``)."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.toml"))}


@lru_cache(maxsize=1)
def labelled_languages() -> Mapping[str, Language]:
    """The languages with ``[labels]``, English first."""
    labelled = {code: one for code, one in languages().items() if one.labels}
    return {"en": labelled.pop("en"), **labelled}


@lru_cache(maxsize=1)
def emotion_forms() -> Mapping[str, tuple[str, ...]]:
    """Every emotion (its English base form) -> its forms in all languages, English first."""
    found: dict[str, tuple[str, ...]] = {}
    for language in labelled_languages().values():
        for emotion, forms in language.labels.items():
            found[emotion] = (*found.get(emotion, ()), *forms)
    return found


def rules_for(text: str) -> Rules:
    """The rules of the languages that ``text``, in lower case, is written in. Han characters are
    Japanese beside kana, and otherwise Chinese."""
    scripts = {name for name, pattern in _SCRIPTS.items() if pattern.search(text)}
    if "kana" in scripts:
        scripts.discard("han")
    words = frozenset(_WORD.findall(text)) if "latin" in scripts else frozenset[str]()
    found: list[str] = []
    for code, language in languages().items():
        if language.script in scripts and (not language.marks or _marked(code, words, text)):
            found.append(code)
    return Rules(tuple(found))


@lru_cache(maxsize=64)
def carriers(rules: Rules) -> frozenset[str]:
    """The carrier words of the languages of ``rules``."""
    return frozenset(word for code in rules.codes for word in languages()[code].carriers)


def lower(text: str) -> str:
    """``text`` in lower case, with every character at its place."""
    low = text.lower()
    if len(low) == len(text):
        return low
    return "".join(char if len(char.lower()) > 1 else char.lower() for char in text)


def simplified(text: str) -> str:
    """``text`` with simplified Chinese characters, unless it is Japanese."""
    if text.isascii() or _SCRIPTS["kana"].search(text):
        return text
    return text.translate(_traditional())


@lru_cache(maxsize=1)
def _traditional() -> dict[int, str]:
    values: dict[str, Any] = tomllib.loads((_FOLDER / "zh.toml").read_text(encoding="utf-8"))
    pairs: str = values["traditional"]
    return {ord(old): new for old, new in zip(pairs[::2], pairs[1::2], strict=True)}


def _marked(code: str, words: frozenset[str], text: str) -> bool:
    """Whether a text, whose words these are, has a mark of a language."""
    single, several = _marks(code)
    return not single.isdisjoint(words) or any(mark in text for mark in several)


@lru_cache(maxsize=32)
def _marks(code: str) -> tuple[frozenset[str], tuple[str, ...]]:
    marks = languages()[code].marks
    several = tuple(mark for mark in marks if not _WORD.fullmatch(mark))
    return frozenset(marks) - frozenset(several), several


@lru_cache(maxsize=512)
def pattern(code: str, name: str) -> re.Pattern[str]:
    """What a language lists under ``section.list``, as one pattern."""
    language = languages()[code]
    listed = language.patterns.get(name, ())
    if not listed:
        return NEVER
    joined = "|".join(f"(?:{one})" for one in listed).replace("<label>", f"{LABEL}+")
    # Words of Latin script are whole words; the other scripts have no spaces to go by.
    before, after = EDGES if language.script == "latin" else ("", "")
    after = "" if name in _OPEN_ENDED else after
    return re.compile(f"{before}(?:{joined}){after}")


def _read(path: Path) -> Language:
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    patterns = {
        f"{section}.{name}": tuple(listed)
        for section in ("negation", "refusal", "verdict")
        for name, listed in values.get(section, {}).items()
    }
    return Language(
        code=path.stem,
        name=values["name"],
        labels={label: tuple(forms) for label, forms in values.get("labels", {}).items()},
        script=values.get("script", "latin"),
        marks=tuple(values.get("marks", ())),
        carriers=tuple(values.get("carriers", {}).get("words", ())),
        patterns=patterns,
        abbreviations=values.get("abbreviations", {}),
    )
