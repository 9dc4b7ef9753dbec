"""Questions with choices, in the many forms in which benchmarks release them.

A row has a question, choices and an answer. Choices are a list, an object of letters, columns
``choice_a`` to ``choice_d``, a text of either, or the end of the question (``A. ... B. ...``). The
answer is a letter, the text of a choice, a letter with its text, or a number. Choices may be
numbers, and missing ones are left out. What cannot be told for sure, such as an answer that is none
of the choices, becomes an :class:`~mmemo.data.adapter.Excluded` with its reason.
"""

from __future__ import annotations

import ast
import json
import math
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from mmemo.data.adapter import Excluded
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES
from mmemo.data.tables import Values

LETTERS = string.ascii_uppercase
Means = Literal["auto", "letter", "text", "index"]
"""What an answer is. ``auto`` is a letter or a text, whichever fits alone."""

_QUESTION = ("question", "query", "instruction")
_CHOICES = ("choices", "options", "candidates")
_ANSWER = ("answer", "answer_gt", "correct_answer", "correct_option", "ground_truth", "gt")
_ID = ("id", "question_id", "qid", "index", "sample_id", "video_id", "names", "name")
_PREFIXES = ("choice", "option", "candidate", "")
_MARK = (
    r"(?:(?i:option|choice)[ \t]+[(\[]?([A-Z])\b[)\]]?[.:：)]?"
    r"|[(\[{{]([A-Z])[)\]}}][.:]?|([A-Z]){})"
)
_LINE = re.compile(r"(?m)^[ \t]*" + _MARK.format(r"[.:：、．)]"))
_INLINE = re.compile(r"(?:(?<=\s)|\A)" + _MARK.format(r"[.:：、．)](?=\s|[^\W\d_])"))
_PLACED = re.compile(r"<(?:video|audio|face|image|image_\d+)>")
_KEY = re.compile(r"(?:\A|[\W_]|OPTION|CHOICE)([A-Z]|\d+)\W*\Z")
_LETTERED = re.compile(r"\A\W*(?:option\s+|answer\W+)?([A-Z])\b\W*(.*)\Z", re.DOTALL | re.I)
_SEVERAL = re.compile(r"\A\W*[A-Z](?:\s*(?:[,;/&]|and)\s*[A-Z])+\W*\Z", re.I)


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with its choices in order. ``answer`` is the letter of the right one. ``exact``:
    the release gives the answer by letter, or just as it spells the choice."""

    question: str
    choices: tuple[str, ...]
    answer: str
    exact: bool = True

    def row(self) -> dict[str, Any]:
        """The part of a manifest row that asks it."""
        return {"prompt": self.question, "choices": list(self.choices), "gold": self.answer}


def manifest_rows(
    table: Iterable[Values | Excluded],
    make: Callable[[Values, str], dict[str, Any] | Excluded],
    *,
    prefix: str,
) -> Iterator[dict[str, Any] | Excluded]:
    """Manifest rows of a table.

    A row that occurs again is left out; another one under a used id gets the id with a number.

    Args:
        table: the rows (:func:`mmemo.data.tables.read_table`).
        make: makes a manifest row of one released row and its name. Its ``prompt``, if it is a
            text, gets the placeholders of its clips (``video``, ``audio``, ``face``).
        prefix: begins the ids.
    """
    seen: dict[str, list[Any]] = {}
    used: set[str] = set()
    for place, values in enumerate(table):
        if isinstance(values, Excluded):
            yield values
            continue
        name = f"{prefix}-{text_of(values, *_ID) or place}"
        row = make(values, name)
        if isinstance(row, Excluded):
            yield row
            continue
        before = seen.setdefault(name, [])
        if row in before:
            yield Excluded(name, "repeated row")
            continue
        before.append(row)
        unique, number = name, 2
        while unique in used:
            unique, number = f"{name}-{number}", number + 1
        used.add(unique)
        prompt: Any = row.get("prompt")
        if isinstance(prompt, str):
            prompt = "".join(PLACEHOLDERS[one] for one in MODALITIES if one in row) + prompt
            row = {**row, "prompt": prompt}
        yield {"sample_id": unique, **row}


def choice_rows(
    table: Iterable[Values | Excluded],
    more: Callable[[Values, Choice], dict[str, Any] | Excluded],
    *,
    prefix: str,
    answer: Means = "auto",
) -> Iterator[dict[str, Any] | Excluded]:
    """Manifest rows of a table of questions with choices; see :func:`manifest_rows`.

    Args:
        more: the rest of a manifest row: its clips, and any of ``task``, ``group`` and ``prompt``,
            the question by default.
        answer: what the answers are.
    """

    def make(values: Values, name: str) -> dict[str, Any] | Excluded:
        read = read_choice(values, name, answer=answer)
        if isinstance(read, Excluded):
            return read
        rest = more(values, read)
        if isinstance(rest, Excluded):
            return rest
        return {**read.row(), **rest}

    return manifest_rows(table, make, prefix=prefix)


def answers_as_choices(table: Iterable[Values | Excluded]) -> list[Values | Excluded]:
    """The rows of a table of labels, which has no choices: they are all answers that occur in it,
    by name. A table with choices stays as it is."""
    rows = list(table)
    asked = [row for row in rows if not isinstance(row, Excluded)]
    answers = [text_of(row, *_ANSWER, "label") for row in asked]
    if any(_choices(row) for row in asked) or not any(answers):
        return rows
    distinct: dict[str, str] = {}
    for answer in filter(None, answers):
        distinct.setdefault(_folded(answer), answer)
    labels = [distinct[name] for name in sorted(distinct)]
    return [
        row if isinstance(row, Excluded) else {**row, "choices": labels, "answer": answer}
        for row, answer in zip(rows, _aligned(rows, answers), strict=True)
    ]


def _aligned(rows: Sequence[Values | Excluded], answers: Iterable[str | None]) -> list[str | None]:
    rest = iter(answers)
    return [None if isinstance(row, Excluded) else next(rest) for row in rows]


def turns_of(values: Values) -> list[str]:
    """The texts of a row's ``conversations``, without placeholders; those without text are ""."""
    given: Any = values.get("conversations")
    turns = cast("list[Any]", given) if isinstance(given, list) else []
    return [
        text_of(one, "value", "content") or "" if isinstance(one, dict) else "" for one in turns
    ]


def groups_of(values: Values, **names: str) -> dict[str, str]:
    """Fields of ``group`` from columns; those that the row lacks are left out."""
    found = {field: text_of(values, column) for field, column in names.items()}
    return {field: text for field, text in found.items() if text is not None}


def read_choice(values: Values, name: str, *, answer: Means = "auto") -> Choice | Excluded:
    """The question of one released row; ``name`` names it where it is left out."""
    question = text_of(values, *_QUESTION)
    lettered = _choices(values)
    if not lettered and question:
        question, lettered = split_choices(question)
    if not question:
        return Excluded(name, "no question")
    if not 2 <= len(lettered) <= len(LETTERS):
        return Excluded(name, "too few choices" if len(lettered) < 2 else "too many choices")
    texts = tuple(text for _, text in lettered)
    given = _get(values, _ANSWER)
    while isinstance(given, list | tuple) and len(cast("list[Any]", given)) == 1:
        given = cast("list[Any]", given)[0]
    told = _text(given)
    if told is None:
        several = isinstance(given, list | tuple) and len(cast("list[Any]", given)) > 1
        return Excluded(name, "several right answers" if several else "no answer")
    places = _places(told, lettered, answer)
    if len(places) != 1:
        reason = (
            "several right answers" if _SEVERAL.match(told) else "answer is none of the choices"
        )
        return Excluded(name, "answer fits several choices" if places else reason, told[:80])
    (place,) = places
    if [_folded(text) for text in texts].count(_folded(texts[place])) > 1:
        return Excluded(name, "right choice is repeated", texts[place][:80])
    by_letter = answer != "text" and _places(told, lettered, "letter") == [place]
    exact = answer == "index" or by_letter or told == texts[place]
    return Choice(question, texts, LETTERS[place], exact)


def split_choices(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A text that ends in lettered choices, as what stands before them and (letter, text) of each;
    without choices, the text and an empty list."""
    for pattern in (_LINE, _INLINE):
        marks = list(pattern.finditer(text))
        run = _run(marks)
        if not run:
            continue
        ends = [mark.start() for mark in run[1:]] + [len(text)]
        found = [
            (_letter(mark), _unbraced(text[mark.end() : end]))
            for mark, end in zip(run, ends, strict=True)
        ]
        return text[: run[0].start()].strip(), [(letter, one) for letter, one in found if one]
    return text.strip(), []


def media_path(root: Path, value: Any, *folders: str) -> str | None:
    """Where a released path is in the user's copy, relative to ``root``: in one of the folders (""
    is ``root``, the default), or there by its file's name alone, for releases keep the paths of
    their authors' machines. The first of these if no file is found; None without a path."""
    text = _text(value[0] if isinstance(value, list) and value else value)  # pyright: ignore[reportUnknownArgumentType]
    if text is None or "\0" in text:
        return None
    path = PurePosixPath(text.replace("\\", "/"))
    parts = [part for part in path.parts if part not in ("/", ".")]
    if not parts or parts[-1] == "..":
        return None
    inside = not path.is_absolute() and ".." not in parts and not re.match(r"[A-Za-z]:", parts[0])
    names = list(dict.fromkeys(["/".join(parts), parts[-1]] if inside else [parts[-1]]))
    tried = [
        f"{folder}/{name}" if folder else name for name in names for folder in folders or ("",)
    ]
    return next((one for one in tried if _is_file(root / one)), tried[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long is no file
        return False


def text_of(values: Values, *names: str) -> str | None:
    """The text of the first of some columns that the row has; None if it has none of them."""
    return _text(_get(values, names))


def texts_of(values: Values, *names: str) -> list[str]:
    """The texts in the first of some columns that the row has: a list, or a text with commas."""
    given = _get(values, names)
    listed = (
        cast("list[Any]", given) if isinstance(given, list) else (_text(given) or "").split(",")
    )
    return [text for one in listed if (text := _text(one)) is not None]


def _letter(mark: re.Match[str]) -> str:
    return str(next(filter(None, mark.groups()))).upper()


def _run(marks: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """The marks A, B, ... of the last list in a text; empty if there is none."""
    for start in reversed([place for place, one in enumerate(marks) if _letter(one) == "A"]):
        run = [marks[start]]
        for mark in marks[start + 1 :]:
            if len(run) < len(LETTERS) and _letter(mark) == LETTERS[len(run)]:
                run.append(mark)
        if len(run) > 1:
            return run
    return []


def _choices(values: Values) -> list[tuple[str, str]]:
    """(letter, text) of each choice that is there."""
    given = _get(values, _CHOICES)
    if isinstance(given, str):
        read = _literal(given)
        if read is None:
            return split_choices(_text(given) or "")[1]
        given = read
    if isinstance(given, Mapping):
        return _of_object(cast("Mapping[Any, Any]", given))
    if isinstance(given, list | tuple):
        items = [_text(one) for one in cast("list[Any]", given)][: len(LETTERS) + 1]
        # A letter stands for its place, also where one before it is missing.
        placed = zip([*LETTERS, ""], items, strict=False)
        return _unlettered([(letter, text) for letter, text in placed if text is not None])
    for prefix in _PREFIXES:
        columns = [(one, text_of(values, *_columns(prefix, one))) for one in LETTERS[:10]]
        found = [(letter, text) for letter, text in columns if text is not None]
        if len(found) > 1:
            return found
    return []


def _columns(prefix: str, letter: str) -> tuple[str, ...]:
    small = letter.lower()
    return (f"{prefix}_{small}", f"{prefix}{small}") if prefix else (small,)


def _of_object(given: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Choices under letters or numbers, in their order; none if two have the same."""
    found: dict[str, str] = {}
    for key, value in given.items():
        mark, text = _KEY.search(str(key).strip().upper()), _text(value)
        if mark is None or mark.group(1) in found:
            return []
        if text is not None:
            found[mark.group(1)] = text
    return sorted(found.items(), key=lambda one: (len(one[0]), one[0]))


def _unlettered(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A list of choices, without the letters that its texts may begin with."""
    marks = [_LINE.match(text) for _, text in found]
    bare = [
        (_letter(mark), _unbraced(text[mark.end() :]))
        for mark, (_, text) in zip(marks, found, strict=True)
        if mark is not None
    ]
    lettered = [letter for letter, text in bare if text] == list(LETTERS[: len(found)])
    return bare if len(found) > 1 and lettered else found


def _places(told: str, lettered: Sequence[tuple[str, str]], means: Means) -> list[int]:
    """Places of the choices that an answer may be."""
    if means == "index":
        number = int(told) if re.fullmatch(r"\d{1,3}", told, re.ASCII) else -1
        return [number] if 0 <= number < len(lettered) else []
    by_text: list[int] = []
    for form in (str.strip, _folded, _plain, _number):
        by_text = [place for place, (_, one) in enumerate(lettered) if form(one) == form(told)]
        if by_text:
            break
    if len({_folded(lettered[place][1]) for place in by_text}) == 1:
        by_text = by_text[:1]
    if means == "text":
        return by_text
    mark = _LETTERED.match(told)
    letter, rest = (mark.group(1).upper(), mark.group(2)) if mark else (told, "")
    by_letter = [
        place
        for place, (own, one) in enumerate(lettered)
        if letter == own and _plain(_unbraced(rest)) in ("", _plain(one))
    ]
    return by_letter if means == "letter" else sorted({*by_text, *by_letter})


def _get(values: Values, names: Sequence[str]) -> Any:
    """The value of the first of some columns that the row has, however the column is written."""
    plain = {_column(key): value for key, value in reversed(values.items())}
    return next((plain[name] for name in names if _there(plain.get(name))), None)


def _column(name: object) -> str:
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


def _there(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) or _text(value) is not None


def _text(value: Any) -> str | None:
    """A scalar as text; None for a missing one, as pandas writes it as well."""
    if isinstance(value, float) and (math.isnan(value) or math.isinf(value)):
        return None
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        return None
    # A benchmark's own placeholders stand for clips, which manifest rows name otherwise.
    text = _PLACED.sub("", value).strip()
    # Half of a character cannot be written to a file.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return None if text.lower() in ("", "nan") else text


def _literal(text: str) -> Any:
    """The list or object that a cell holds as JSON or as Python writes it; None for other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value: Any = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value  # pyright: ignore[reportUnknownVariableType]
    return None


def _unbraced(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if text.startswith("{") and text.endswith("}") else text


def _folded(text: str) -> str:
    """Text without differences of case, width and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _number(text: str) -> object:
    """The number that a text is, so that 1 is 1.0; the text if it is none."""
    return float(text) if re.fullmatch(r"-?\d{1,300}(?:\.\d{1,300})?", text.strip()) else text


def _plain(text: str) -> str:
    """Folded text without punctuation at its ends, if anything is left."""
    folded = _folded(text)
    return folded.strip(" .,;:!?\"'`()[]{}") or folded
