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

import csv
import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast
from xml.etree import ElementTree

from mmemo.answers.parsing import EMOTION_FORMS, base_form, normalise
from mmemo.errors import EvaluationError

# Small tables of text: CSV files, and the first sheet of Excel files, read without a library.

_NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LARGEST = 64 << 20  # bytes of one part of an Excel file, unpacked


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows under the header of a ``.csv`` or ``.xlsx`` file; cells as text, "" where empty.

    Raises:
        EvaluationError: the file cannot be read as a table.
    """
    try:
        cells = _xlsx(path) if path.suffix.lower() == ".xlsx" else _csv(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise EvaluationError(f"{path}: cannot be read as a table ({error})") from error
    if not cells:
        raise EvaluationError(f"{path}: has no header row")
    header = [name.strip() for name in cells[0]]
    width = len(header)
    return [
        dict(zip(header, (row + [""] * width)[:width], strict=True))
        for row in cells[1:]
        if any(row)
    ]


def _csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.reader(handle))


def _xlsx(path: Path) -> list[list[str]]:
    with zipfile.ZipFile(path) as archive:
        shared: list[str] = []
        if "xl/sharedStrings.xml" in archive.namelist():
            strings = _part(archive, "xl/sharedStrings.xml")
            shared = [_text(item) for item in strings.iter(f"{_NAMESPACE}si")]
        sheet = _part(archive, "xl/worksheets/sheet1.xml")
    rows: list[list[str]] = []
    for row in sheet.iter(f"{_NAMESPACE}row"):
        cells: list[str] = []
        for cell in row.iter(f"{_NAMESPACE}c"):
            column = _column(cell.get("r", "")) if cell.get("r") else len(cells)
            cells += [""] * (column + 1 - len(cells))
            value = _text(cell)
            cells[column] = shared[int(value)] if cell.get("t") == "s" and value else value
        rows.append(cells)
    return rows


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > _LARGEST:
        raise ValueError(f"{name} is larger than {_LARGEST} bytes")
    data = archive.read(name)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{name} declares entities")
    return ElementTree.fromstring(data)


def _text(element: ElementTree.Element) -> str:
    """All text inside, as of the runs of a formatted string; phonetic readings are left out."""
    found = [element.text or ""] if element.tag in (f"{_NAMESPACE}t", f"{_NAMESPACE}v") else []
    found += [_text(child) for child in element if child.tag != f"{_NAMESPACE}rPh"]
    return "".join(found)


def _column(reference: str) -> int:
    """0 for "A7", 26 for "AA7"."""
    letters = re.match(r"[A-Z]+", reference)
    number = 0
    for letter in letters.group() if letters else "A":
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1


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


# Open-vocabulary precision and recall: an answer may name any emotions, in any words.
#
# Per clip, with the named words P and the true words G after words of one meaning became one group:
# Acc = |P ∩ G| / |P| (a precision), Recall = |P ∩ G| / |G|, and their mean (OV-MER,
# arXiv 2410.01495; CA-MER, arXiv 2508.01181, reports the same three). OV-MER lets GPT-3.5 group the
# words of each clip anew, which nobody can repeat; here a grouping is a file or a rule, and is
# named beside the number. So these values do not compare with those of the papers.

Groups = Callable[[Iterable[str]], set[str]]
"""Words to the groups that they are in."""

FORMS = "forms"
"""The grouping that needs no file: word forms and exact synonyms, as answers are parsed."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision (Acc) and recall of one clip, 0 to 1."""

    precision: float
    recall: float

    @property
    def average(self) -> float:
        return (self.precision + self.recall) / 2


def overlap(
    words: Sequence[str], truth: Sequence[str], grouping: Sequence[Groups]
) -> Overlap | None:
    """Compare an answer's words with the true ones, averaged over the groupings (five wheels, or
    one). An answer without a word scores 0 on both. None where no grouping knows a true word.
    """
    found: list[tuple[float, float]] = []
    for groups in grouping:
        named, true = groups(words), groups(truth)
        if true:
            both = len(named & true)
            found.append((both / len(named) if named else 0.0, both / len(true)))
    if not found:
        return None
    return Overlap(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def load_grouping(name: str, mode: Mode = "corrected") -> Sequence[Groups]:
    """What makes words one group.

    Args:
        name: ``forms``; a JSON file of ``{"happy": ["joyful", "glad"], ...}``, whose other words
            are grouped by their forms; or AffectGPT's ``emotion_wheel`` folder, whose five wheels
            are five groupings.
        mode: how the wheels are read, see :mod:`mmemo.answers.emotion_wheels`.

    Raises:
        EvaluationError: the file or folder cannot be read.
    """
    if name == FORMS:
        return [_by_form]
    path = Path(name)
    if path.is_dir():
        wheels = load_wheels(path)
        return [lambda words, n=n: wheels.classes(words, n, mode) for n in range(NUMBER)]
    return [_read_groups(path)]


def _by_form(words: Iterable[str]) -> set[str]:
    return {form for word in words if (form := base_form(word))}


@lru_cache(maxsize=4)
def _read_groups(path: Path) -> Groups:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"grouping '{path}' cannot be read ({error}); use 'forms', a JSON file of groups, or "
            "AffectGPT's emotion_wheel folder"
        ) from error
    owner: dict[str, str] = {}
    entries: dict[str, Any] = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    for group, words in entries.items():
        if not isinstance(words, list):
            raise EvaluationError(f"{path}: the group '{group}' must be a list of words")
        for word in (group, *cast("list[object]", words)):
            form = base_form(str(word))
            if owner.setdefault(form, group) != group:
                raise EvaluationError(
                    f"{path}: '{word}' is in the groups '{owner[form]}' and '{group}'; keep one"
                )
    if not owner:
        raise EvaluationError(f'{path}: holds no groups; write {{"happy": ["joyful"], ...}}')
    return lambda words: {owner.get(form, form) for form in _by_form(words)}
