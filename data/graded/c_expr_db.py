"""C-EXPR-DB: seven compound expressions, and other, in segments of videos in the wild.

56 videos (Kollias, CVPR 2023), for research on request: https://ibug.doc.ic.ac.uk/resources/c-expr-db.
Layout of the folder (annotations as in the public code of arXiv 2407.12927)::

    annotations/VIDEO.csv     "Begin Time - hh:mm:ss.ms", "End Time - hh:mm:ss.ms", one column per
                              class, comma or tab; a cell with anything but 0 marks the class
    videos/VIDEO.mp4          names of the folders are assumed: files are found in any

A row is one segment. Segments of several classes or none, and those whose times make no span, are
left out. ``ask=both`` adds a row that asks for the two basic emotions (``PAIRS``).

    mmemo manifest data/graded/c_expr_db.py --root C-EXPR-DB --output c_expr_db.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import normalise
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import ClipIndex, labelled_row, once
from mmemo.data.releases.tables import read_table, read_text
from mmemo.errors import DataError

COLUMNS = ("task", "gold")
BEGIN, END = "Begin Time - hh:mm:ss.ms", "End Time - hh:mm:ss.ms"
PAIRS = {
    "Fearfully Surprised": ("fear", "surprise"),
    "Happily Surprised": ("happiness", "surprise"),
    "Sadly Surprised": ("sadness", "surprise"),
    "Disgustedly Surprised": ("disgust", "surprise"),
    "Angrily Surprised": ("anger", "surprise"),
    "Sadly Fearful": ("sadness", "fear"),
    "Sadly Angry": ("sadness", "anger"),
}
"""The basic emotions of each compound."""
BASIC = {
    "fear": ("fearful", "fearfully", "afraid"),
    "happiness": ("happy", "happily"),
    "sadness": ("sad", "sadly"),
    "disgust": ("disgusted", "disgustedly"),
    "anger": ("angry", "angrily"),
    "surprise": ("surprised",),
}
"""Each basic emotion and its other forms."""


def _mixtures(one: str, other: str) -> list[str]:
    forms = [(x, y) for x in (one, *BASIC[one]) for y in (other, *BASIC[other])]
    orders = [*forms, *((y, x) for x, y in forms)]
    return [text for x, y in orders for text in (f"{x} {y}", f"{x} and {y}")]


CLASSES = {
    **{name: [x for x in _mixtures(*pair) if x != name.lower()] for name, pair in PAIRS.items()},
    "Other": ["others", "another"],
}
"""Each class, and the forms that an answer may give it."""
QUESTION = "Which compound expression does the face show? Answer with one of: {}."
_FORMS = {normalise(form): name for name, own in CLASSES.items() for form in (name, *own)}
_NOT_MARKED = ("", "0", "0.0", "false", "no")
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")


def rows(root: Path, *, ask: str = "compound") -> Iterator[dict[str, Any] | Excluded]:
    """One row per segment. ``ask``: compound, parts or both."""
    need_option("ask", ask, ("compound", "parts", "both"))
    clips = ClipIndex(root, ["."])
    tables = [file for file in sorted(root.rglob("*.csv")) if BEGIN.lower() in _head(file)]
    if not tables:
        raise DataError(f"has no CSV file with the column '{BEGIN}'; check --data", file=str(root))
    for table in tables:
        yield from once(_segments(table, clips, ask))


def _segments(table: Path, clips: ClipIndex, ask: str) -> Iterator[dict[str, Any] | Excluded]:
    video = table.stem
    for line in read_table(table, (BEGIN, END)):
        if isinstance(line, Excluded):
            yield line
            continue
        # Other columns, such as a duration, are of no class.
        marked = [name for name, cell in line.items() if cell.lower() not in _NOT_MARKED]
        named = {_FORMS[normalise(name)] for name in marked if normalise(name) in _FORMS}
        row = f"c_expr_db-{video}-{line[BEGIN]}"
        start, end = seconds(line[BEGIN]), seconds(line[END])
        if len(named) != 1:
            why = "several classes" if named else "no class"
            yield Excluded(row, why, ", ".join(sorted(named)))
        elif start is None or end is None or start >= end:
            yield Excluded(row, "no span", f"{line[BEGIN]} to {line[END]}")
        else:
            path = clips.find(video, f"videos/{video}.mp4")
            yield from _asked(row, named.pop(), path, {"start": start, "end": end}, ask)


def _asked(
    row: str, label: str, path: str, span: Mapping[str, Any], ask: str
) -> Iterator[dict[str, Any] | Excluded]:
    media = {"video": path, "face": path}
    group = {"video": Path(path).stem}
    if ask != "parts":
        question = QUESTION.format(", ".join(CLASSES))
        yield labelled_row(row, question, label, media, group=group, **span)
    if ask != "compound" and label in PAIRS:
        gold = [one for one in BASIC if one in PAIRS[label]]
        question = f"Which two emotions does the face show at once? Two of: {', '.join(BASIC)}."
        parts = labelled_row(f"{row}-parts", question, ", ".join(gold), media, group=group, **span)
        yield {**{k: v for k, v in parts.items() if k != "label"}, "task": "parts", "gold": gold}


def seconds(time: str) -> float | None:
    """A time of the form hh:mm:ss.ms in seconds; None if it is none."""
    found = _TIME.fullmatch(time.strip())
    if found is None:
        return None
    hours, minutes, rest = found.groups()
    return round(3600 * int(hours or 0) + 60 * int(minutes) + float(rest.replace(",", ".")), 3)


def _head(table: Path) -> str:
    return read_text(table).split("\n", 1)[0].lower()
