"""Emotion wheels and open-vocabulary overlap: scoring answers that may use any emotion word.

MER-UniBench (AffectGPT, arXiv 2501.16566) scores open answers on five emotion wheels. A word is
reduced to its base forms (``format.csv``), these to their synonyms (``synonym.xlsx``), and these to
a basic emotion, the inner ring of each wheel (``wheel1.xlsx`` ... ``wheel5.xlsx``). The assets are
AffectGPT's and are not shipped; :func:`load_wheels` reads the folder that holds them.

``official`` is that mapping to the letter. It takes the alphabetically first synonym that a wheel
knows, so that "fear" is happy or joyful on four wheels (through "fearless") and "happy" powerful on
one, and it drops every word that a wheel does not know, such as "neutral". ``corrected`` takes the
nearest: the word itself, then an inflected form that is not an opposite, then the synonym that most
of the eight lists name. A word that a wheel does not know becomes a class of its own.

:func:`overlap` compares an answer with the true words, after words of one meaning have become one
group. With the named groups P and the true groups G of a clip, Acc = |P ∩ G| / |P| is a precision,
Recall = |P ∩ G| / |G|, and the third value is their mean (OV-MER, arXiv 2410.01495; CA-MER,
arXiv 2508.01181, reports the same three). OV-MER lets GPT-3.5 group the words of each clip anew,
which cannot be repeated. Here a grouping is a file or a rule and is named beside the number, so the
values do not compare with those of the papers.

Each clip also has an F1, and our number is the mean over the clips. MER-UniBench's scorer takes the
mean precision P and the mean recall R over the clips, then F1 = 2PR / (P + R) for each wheel, and
then the mean over the wheels; ``mmemo/evaluation/scorers/set_scores.py`` computes it beside ours.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from mmemo.answers.parsing import EMOTION_FORMS, base_form, normalise
from mmemo.errors import EvaluationError

Mode = Literal["official", "corrected"]
Level = Literal[1, 2]
"""The ring that words are mapped to: the inner one, or the second."""
NUMBER = 5
_LEVELS = ("level1", "level2", "level3")
_FORMS = {form: forms for forms in EMOTION_FORMS for form in forms}
_LARGEST = 64 << 20  # bytes of an Excel file, unpacked
_MOST_ROWS, _MOST_COLUMNS = 100_000, 1_000
_OPPOSITE = re.compile(r"^(?:un|dis|in)|less(?:ly|ness)?$")

Groups = Callable[[Iterable[str]], set[str]]
"""A grouping: words -> the names of their groups."""

FORMS = "forms"
"""The grouping that needs no file: word forms and exact synonyms, as in answer parsing."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel. ``inner``: each word -> the inner-ring word above it. ``ring``: each word -> its
    ring, 1 (inner) to 3 (outer). ``second``: each word -> the second-ring word above it; an inner
    word -> the alphabetically first second-ring word below it, as in the released scorer."""

    inner: Mapping[str, str]
    ring: Mapping[str, int]
    second: Mapping[str, str]


@dataclass(frozen=True)
class Wheels:
    """The five wheels. ``bases``: surface form -> base words. ``votes``: word -> wheel word -> the
    number of synonym lists in which the two are synonyms."""

    wheels: tuple[Wheel, ...]
    bases: Mapping[str, frozenset[str]]
    votes: Mapping[str, Mapping[str, int]]

    @cached_property
    def forms(self) -> frozenset[str]:
        """All surface forms."""
        return frozenset(self.bases)

    def classes(self, words: Iterable[str], number: int, mode: Mode, level: Level = 1) -> set[str]:
        """The classes of ``words`` on wheel ``number``, 0 to 4. ``official`` drops unknown ones."""
        mapper = self.official if mode == "official" else self.corrected
        found = {mapper(word, number, level) for word in words}
        return {name for name in found if name is not None}

    def official(self, word: str, number: int, level: Level = 1) -> str | None:
        """The class that the released scorer gives a word; None where it drops the word."""
        wheel = self.wheels[number]
        classes = wheel.inner if level == 1 else wheel.second
        bases = self.bases.get(word.lower().strip(), frozenset())
        pool = {wheel_word for base in bases for wheel_word in self.votes.get(base, {})}
        # The alphabetical order is the released scorer's, although it makes "fear" happy.
        return next((classes[name] for name in sorted(pool) if name in classes), None)

    def corrected(self, word: str, number: int, level: Level = 1) -> str:
        """The nearest class of a word. A word that the wheel does not know gets its base form with
        a ``?``, a class that no wheel has. On level 2, a word of the inner ring stays itself, since
        it names no word of the second one."""
        word, wheel = normalise(word), self.wheels[number]
        found = self._nearest(word, wheel)
        if found is None:
            return f"{(*_FORMS.get(word, ()), *self._bases(word), word)[0]}?"
        if level == 1:
            return wheel.inner[found]
        return found if wheel.ring[found] == 1 else wheel.second[found]

    def _bases(self, word: str) -> list[str]:
        # Sorted, because the order of a set of strings differs from process to process.
        return sorted(base for base in self.bases.get(word, ()) if not _opposed(word, base))

    def _nearest(self, word: str, wheel: Wheel) -> str | None:
        """The word of the wheel that is nearest to a normalised word; None if there is none."""
        if word in wheel.inner:
            return word
        bases, forms = self._bases(word), _FORMS.get(word, ())
        here = [base for base in (*bases, *forms) if base in wheel.inner]
        if here:
            # The word itself breaks ties, so that the result does not depend on their order.
            return max(here, key=lambda base: (SequenceMatcher(None, word, base).ratio(), base))
        pool: Counter[str] = Counter()
        for base in bases or [word]:
            pool.update({n: v for n, v in self.votes.get(base, {}).items() if n in wheel.inner})
        if not pool:
            return None
        return min(pool, key=lambda name: (-pool[name], wheel.ring[name], name))


def split_official(answer: object) -> list[str]:
    """The words of an answer as the released scorer splits it, to the letter: one bracket is cut
    off either end, and quotes and commas separate words. A list is taken as it is."""
    if isinstance(answer, list | tuple):
        return [str(word).lower().strip() for word in cast("Sequence[object]", answer)]
    if not isinstance(answer, str):
        return []  # a missing answer is NaN in the released files
    text = answer.removeprefix("[").removesuffix("]")
    return [word.strip().lower() for word in re.split(r"['\",]", text) if word.strip()]


def split_words(answer: str, mode: Mode) -> list[str]:
    """The emotion words of an answer such as ``[happy, 'at ease']``, each once, in order.

    ``official`` splits at quotes and commas only. ``corrected`` also splits at semicolons, slashes,
    full stops, line ends and "and", and drops the numbers and bullets of lists.
    """
    if mode == "official":
        return list(dict.fromkeys(split_official(answer.strip())))
    splitter = r"[\",;/\n]|[.)](?=\s|$)|\band\b|(?<!\w)'|'(?!\w)"
    words = [normalise(word.strip(" \t-*•")) for word in re.split(splitter, answer.strip(" []\n"))]
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
        # Every word is a form of itself, "no words" with its empty list of forms too.
        for form in (row["name"], *row["format"].split(",")):
            if form.strip():
                bases[form.strip().lower()].add(row["name"].strip())
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for listed in _synonyms(folder):
        for wheel_word, synonyms in listed.items():
            # Every word is a synonym of itself.
            for word in {wheel_word, *synonyms}:
                votes[word][wheel_word] += 1
    wheels = tuple(_wheel(_file(folder, f"wheel{number}")) for number in range(1, NUMBER + 1))
    return Wheels(wheels, {form: frozenset(names) for form, names in bases.items()}, votes)


def _wheel(path: Path) -> Wheel:
    """Read one wheel. A word in two places counts where the nested order meets it last, as in the
    released scorer."""
    nested: dict[str, dict[str, list[str]]] = {}
    last = dict.fromkeys(_LEVELS, "")
    for row in read_table(path):
        for level in _LEVELS:  # merged cells are empty below their first row
            last[level] = row.get(level, "").strip().lower() or last[level]
        one, two, three = (last[level] for level in _LEVELS)
        nested.setdefault(one, {}).setdefault(two, []).append(three)
    inner: dict[str, str] = {}
    ring: dict[str, int] = {}
    second: dict[str, str] = {}
    for one, under in nested.items():
        inner[one], ring[one], second[one] = one, 1, min(under)
        for two, outer in under.items():
            inner[two], ring[two], second[two] = one, ring.get(two, 2), two
            for three in outer:
                inner[three], ring[three], second[three] = one, ring.get(three, 3), two
    return Wheel(inner, ring, second)


def _synonyms(folder: Path) -> list[dict[str, list[str]]]:
    """The eight synonym lists, each wheel word -> its synonyms."""
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
                lists[run].setdefault(word.strip().lower(), []).extend(split_official(cell))
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


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision (Acc), recall and F1 of one clip, 0 to 1."""

    precision: float
    recall: float
    f1: float

    @property
    def average(self) -> float:
        return (self.precision + self.recall) / 2


def overlap(
    words: Sequence[str], truth: Sequence[str], grouping: Sequence[Groups]
) -> Overlap | None:
    """Compare an answer's words with the true ones, averaged over the groupings.

    Args:
        words: the answer's words. An answer without words scores 0 on both.
        truth: the true words.
        grouping: one grouping, or the five wheels. One that knows no true word does not count.

    Returns:
        The overlap, or None when no grouping knows a true word.
    """
    found = [pair for pair in precision_recall(words, truth, grouping) if pair is not None]
    if not found:
        return None
    rows = [(p, r, 2 * p * r / (p + r) if p + r else 0.0) for p, r in found]
    return Overlap(*(sum(values) / len(found) for values in zip(*rows, strict=True)))


def precision_recall(
    words: Sequence[str], truth: Sequence[str], grouping: Sequence[Groups]
) -> list[tuple[float, float] | None]:
    """Precision and recall of an answer's words under each grouping, and None under one that knows
    no true word. An answer without words has 0 of both."""
    found: list[tuple[float, float] | None] = []
    for groups in grouping:
        named, true = groups(words), groups(truth)
        both = len(named & true)
        pair = (both / len(named) if named else 0.0, both / len(true)) if true else None
        found.append(pair)
    return found


def load_grouping(name: str, mode: Mode = "corrected") -> Sequence[Groups]:
    """Load a grouping by name.

    Args:
        name: ``forms``; a JSON file of ``{"happy": ["joyful", "glad"], ...}``, whose other words
            are grouped by their forms; or AffectGPT's ``emotion_wheel`` folder, whose five wheels
            are five groupings.
        mode: how words are mapped on the wheels, see the module's docstring.

    Raises:
        EvaluationError: the file or folder cannot be read.
    """
    if name == FORMS:
        return [_by_form]
    path = Path(name)
    if path.is_dir():
        wheels = load_wheels(path)
        # n=n binds the number now; a closure would see the last one in all five.
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
            # A word in two groups would make overlap depend on the order of the file.
            if owner.setdefault(form, group) != group:
                raise EvaluationError(
                    f"{path}: '{word}' is in the groups '{owner[form]}' and '{group}'; keep one"
                )
    if not owner:
        raise EvaluationError(f'{path}: holds no groups; write {{"happy": ["joyful"], ...}}')
    return lambda words: {owner.get(form, form) for form in _by_form(words)}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows under the header of a ``.csv`` file, or of an ``.xlsx`` file's first sheet.

    Every cell is text, "" where it is empty.

    Raises:
        EvaluationError: the file cannot be read as a table.
    """
    try:
        cells = _xlsx(path) if path.suffix.lower() == ".xlsx" else _csv(path)
    # openpyxl raises whatever a damaged workbook makes it stumble over.
    except Exception as error:
        raise EvaluationError(f"{path}: cannot be read as a table ({error})") from error
    if not cells:
        raise EvaluationError(f"{path}: has no header row; name the columns in its first row")
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
    # Imported here: the wheels are the only Excel files that anything reads.
    from openpyxl import load_workbook

    _refuse_bombs(path)
    with warnings.catch_warnings(action="ignore"):  # about styles and validation, not about cells
        book = load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some writers declare the sheet's size wrongly
            rows: list[list[str]] = []
            for row in sheet.iter_rows(values_only=True):
                if len(rows) >= _MOST_ROWS or len(row) > _MOST_COLUMNS:
                    raise ValueError(f"it has over {_MOST_ROWS} rows or {_MOST_COLUMNS} columns")
                rows.append(["" if value is None else str(value) for value in row])
            return rows
        finally:
            book.close()


def _refuse_bombs(path: Path) -> None:
    """Refuse a workbook that a small file blows up: by compression, or by XML entities, which
    openpyxl expands unless defusedxml is installed."""
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
        if size > _LARGEST:
            raise ValueError(f"it unpacks to over {_LARGEST} bytes")
        for name in archive.namelist():
            text = archive.read(name).replace(b"\0", b"")  # UTF-16 is legal too
            if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
                raise ValueError(f"{name} declares entities")
