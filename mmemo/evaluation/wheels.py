"""Emotion wheels: which of a few basic emotions an open-vocabulary word belongs to.

MER-UniBench (AffectGPT, arXiv 2501.16566) scores open answers on five wheels: a word is brought
to its base forms (``format.csv``), these to their synonyms (``synonym.xlsx``), and these to the
inner ring of each wheel (``wheel1.xlsx`` ... ``wheel5.xlsx``). The assets are AffectGPT's and are
not shipped; :func:`load_wheels` reads the folder that holds them.

``official`` is that mapping to the letter. It takes the alphabetically first synonym that a wheel
knows, so that "fear" is happy or joyful on four wheels (through "fearless") and "happy" powerful on
one, and it drops every word that a wheel does not know, such as "neutral". ``corrected`` takes the
nearest: the word itself, an inflected form that is no opposite, then the synonym that most of
the eight lists name; what a wheel does not know is a class of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mmemo.errors import EvaluationError
from mmemo.evaluation.parsing import EMOTION_FORMS, normalise
from mmemo.evaluation.sheets import read_table

Mode = Literal["official", "corrected"]
NUMBER = 5
_LEVELS = ("level1", "level2", "level3")
_FORMS = {form: forms for forms in EMOTION_FORMS for form in forms}
_OPPOSITE = re.compile(r"^(?:un|dis|in)|less(?:ly|ness)?$")


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel: each of its words -> the word of the inner ring that it lies under, and its ring
    (1 inner to 3 outer)."""

    inner: Mapping[str, str]
    ring: Mapping[str, int]


@dataclass(frozen=True)
class Wheels:
    """The five wheels. ``bases``: surface form -> base words. ``votes``: word -> wheel word ->
    in how many of the synonym lists the one stands for the other."""

    wheels: tuple[Wheel, ...]
    bases: Mapping[str, frozenset[str]]
    votes: Mapping[str, Mapping[str, int]]

    def classes(self, words: Iterable[str], number: int, mode: Mode) -> set[str]:
        """The classes of ``words`` on wheel ``number`` (0 to 4); official: of those it knows."""
        mapper = self.official if mode == "official" else self.corrected
        found = {mapper(word, number) for word in words}
        return {name for name in found if name is not None}

    def official(self, word: str, number: int) -> str | None:
        """The released scorer's class of a word, None where it drops the word."""
        inner = self.wheels[number].inner
        bases = self.bases.get(word.lower().strip(), frozenset())
        pool = {wheel_word for base in bases for wheel_word in self.votes.get(base, {})}
        return next((inner[name] for name in sorted(pool) if name in inner), None)

    def corrected(self, word: str, number: int) -> str:
        """The nearest class of a word; for a word that the wheel does not know, the word's base
        form with a ``?``, a class that no wheel has."""
        word, wheel = normalise(word), self.wheels[number]
        if word in wheel.inner:
            return wheel.inner[word]
        bases = sorted(base for base in self.bases.get(word, ()) if not _opposed(word, base))
        forms = _FORMS.get(word, ())
        here = [base for base in (*bases, *forms) if base in wheel.inner]
        if here:
            nearest = max(here, key=lambda base: (SequenceMatcher(None, word, base).ratio(), base))
            return wheel.inner[nearest]
        pool: Counter[str] = Counter()
        for base in bases or [word]:
            pool.update({n: v for n, v in self.votes.get(base, {}).items() if n in wheel.inner})
        if not pool:
            return f"{(*forms, *bases, word)[0]}?"
        return wheel.inner[min(pool, key=lambda name: (-pool[name], wheel.ring[name], name))]


def split_words(answer: str, mode: Mode) -> list[str]:
    """The emotion words of an answer such as ``[happy, 'at ease']``, each once, in order.

    Official: split at quotes and commas only. Corrected: also at semicolons, slashes, full stops,
    lines, "and"; numbers and marks of a list are no words.
    """
    text = answer.strip().strip("[]")
    splitter = (
        r"['\",]" if mode == "official" else r"[\",;/\n]|[.)](?=\s|$)|\band\b|(?<!\w)'|'(?!\w)"
    )
    if mode == "official":
        words = [word.strip().lower() for word in re.split(splitter, text)]
    else:
        words = [normalise(word.strip(" \t-*•")) for word in re.split(splitter, text)]
        words = [word for word in words if not word.isdecimal()]
    return list(dict.fromkeys(word for word in words if word))


@lru_cache(maxsize=4)
def load_wheels(folder: Path) -> Wheels:
    """Read AffectGPT's ``emotion_wheel`` folder, as released (xlsx) or converted (CSV, JSON).

    Raises:
        EvaluationError: a file is missing or cannot be read.
    """
    bases: dict[str, set[str]] = defaultdict(set)
    for row in read_table(_file(folder, "format")):
        for form in row["format"].split(","):
            if form.strip():
                bases[form.strip().lower()].add(row["name"])
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for listed in _synonyms(folder):
        for wheel_word, synonyms in listed.items():
            # A word always stands for itself.
            for word in {wheel_word, *synonyms}:
                votes[word][wheel_word] += 1
    wheels = tuple(_wheel(_file(folder, f"wheel{number}")) for number in range(1, NUMBER + 1))
    return Wheels(wheels, {form: frozenset(names) for form, names in bases.items()}, votes)


def _wheel(path: Path) -> Wheel:
    """A word that stands in two places counts where the nested order meets it last."""
    nested: dict[str, dict[str, list[str]]] = {}
    last = dict.fromkeys(_LEVELS, "")
    for row in read_table(path):
        for level in _LEVELS:  # merged cells are empty below their first row
            last[level] = row.get(level, "").strip().lower() or last[level]
        one, two, three = (last[level] for level in _LEVELS)
        nested.setdefault(one, {}).setdefault(two, []).append(three)
    inner: dict[str, str] = {}
    ring: dict[str, int] = {}
    for one, under in nested.items():
        inner[one], ring[one] = one, 1
        for two, outer in under.items():
            inner[two], ring[two] = one, ring.get(two, 2)
            for three in outer:
                inner[three], ring[three] = one, ring.get(three, 3)
    return Wheel(inner, ring)


def _synonyms(folder: Path) -> list[dict[str, list[str]]]:
    """The eight lists: wheel word -> its synonyms."""
    converted = folder / "synonym.json"
    if converted.exists():
        try:
            runs: dict[str, dict[str, list[str]]] = json.loads(converted.read_text("utf-8"))["runs"]
            return list(runs.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{converted}: has no lists of synonyms ({error!r})") from error
    lists: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for row in read_table(_file(folder, "synonym")):
        for column, word in row.items():
            run = column.removeprefix("word_")
            if run != column and word.strip():
                cell: Any = row.get(f"synonym_{run}", "")
                words = [part.strip().strip("'\"").lower() for part in cell.strip("[]").split(",")]
                lists[run][word.strip().lower()] = [one for one in words if one]
    return list(lists.values())


def _file(folder: Path, stem: str) -> Path:
    for suffix in (".csv", ".xlsx"):
        if (folder / f"{stem}{suffix}").exists():
            return folder / f"{stem}{suffix}"
    raise EvaluationError(
        f"{folder} has neither {stem}.csv nor {stem}.xlsx; give AffectGPT's emotion_wheel folder"
    )


def _opposed(word: str, base: str) -> bool:
    """Whether one of the two negates the other: "fear" and "fearless"."""
    return word != base and bool(_OPPOSITE.search(word)) != bool(_OPPOSITE.search(base))
