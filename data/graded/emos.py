"""EmoS: clips of CH-SIMS v2 and MELD, labelled anew by three raters, coarsely and finely.

About 5,000 Chinese and 5,000 English clips (Guo et al., ACL 2026). No licence file: academic use by
the README. Get https://github.com/NLP2CT/EmoS, and the clips from CH-SIMS v2 and MELD. Layout::

    datasets/data-final/datasets/ch-simsv2s/First-2500/a1.xlsx, a2.xlsx, a3.xlsx      one per rater
    datasets/data-final/datasets/ch-simsv2s/Last-2500/*.xlsx
    datasets/data-final/datasets/newdataset-MELD/Annotations-3000/*train_sent_emo*.xlsx
    datasets/data-final/datasets/newdataset-MELD/Annotations-last-2000/a10.xlsx, ...
    datasets/data-final/Chinese/Raw/VIDEO_ID/CLIP_ID.mp4          of CH-SIMS v2
    datasets/data-final/English/train_splits/dia0_utt0.mp4        of MELD

Columns are assumed: ``video_id`` and ``clip_id``, or ``Dialogue_ID`` and ``Utterance_ID``, as in
the two sets; and one column whose name contains ``basic`` and one whose name contains
``goemotion``, for which ``basic=NAME`` and ``fine=NAME`` give other names. A cell of the second
lists labels. ``unsure`` is no vote. Workbooks named combined or confusion, and analyses, are not
read.

Each clip has two rows, with ``votes``: label -> raters. ``basic7`` has the label of most raters;
``group.agreement`` is ``tie`` where several share the most, and the label is then the first of them
in the set. ``goemotions`` has the labels of at least half of the raters, or else of most.

    mmemo manifest data/graded/emos.py --root EmoS --output emos.jsonl --option language=en
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmemo.answers.emotion_wheels import read_table
from mmemo.answers.label_sets import emotion_set
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.folders import ClipIndex, labelled_row, talking
from mmemo.errors import DataError, EvaluationError

COLUMNS = ("task", "gold", "votes")
BASE = "datasets/data-final"
QUESTION = "Which emotion does the person express? Answer with one of these words: {}."
SEVERAL = "Which emotions does the person express? Answer with one or more of these words: {}."


@dataclass(frozen=True)
class _Source:
    """One of the two sets: its workbooks, its clips, and the columns that name a clip."""

    name: str
    folder: str
    clips: str
    keys: tuple[str, str]
    path: str  # of a clip in ``clips``, from the two keys


SOURCES = {
    "zh": _Source(
        "simsv2", "ch-simsv2s", f"{BASE}/Chinese/Raw", ("video_id", "clip_id"), "{0}/{1}"
    ),
    "en": _Source(
        "meld",
        "newdataset-MELD",
        f"{BASE}/English/train_splits",
        ("Dialogue_ID", "Utterance_ID"),
        "dia{0}_utt{1}",
    ),
}


@dataclass
class _Clip:
    """The votes for one clip, and the first line about it."""

    part: str
    line: Mapping[str, str]
    basic: Counter[str] = field(default_factory=Counter[str])
    fine: Counter[str] = field(default_factory=Counter[str])
    raters: int = 0


def rows(
    root: Path, *, language: str = "all", basic: str = "basic", fine: str = "goemotion"
) -> Iterator[dict[str, Any] | Excluded]:
    """Two rows per clip. ``language``: all, zh (CH-SIMS v2) or en (MELD). ``basic``, ``fine``: what
    the names of the raters' columns contain."""
    need_option("language", language, ("all", *SOURCES))
    for code in SOURCES if language == "all" else (language,):
        yield from _rows(root, code, SOURCES[code], (basic, fine))


def _rows(
    root: Path, code: str, source: _Source, columns: tuple[str, str]
) -> Iterator[dict[str, Any] | Excluded]:
    index = ClipIndex(root, [source.clips], key=lambda path: path.with_suffix("").as_posix())
    clips: dict[str, _Clip] = {}
    for book in _workbooks(root / BASE / "datasets" / source.folder):
        for line in _lines(book, source.keys, columns):
            name = source.path.format(*(_whole(line[key]) for key in source.keys))
            clip = clips.setdefault(name, _Clip(book.parent.name, line))
            clip.raters += 1
            yield from _vote(clip, line, f"{name} of {book.name}")
    for name, clip in clips.items():
        yield from _questions(code, source, name, clip, index)


def _workbooks(folder: Path) -> list[Path]:
    """The raters' workbooks: those right inside the folders of the parts."""
    found = [
        file
        for file in sorted(folder.glob("*/*.xlsx"))
        if not re.match(r"combined|confusion|~|\.", file.name)
    ]
    if not found:
        raise DataError("has no raters' workbooks; --root must be EmoS's folder", file=str(folder))
    return found


def _lines(book: Path, keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a workbook, with the columns ``basic`` and ``fine``."""
    lines = read_table(book)
    header = list(lines[0]) if lines else []
    plain = {re.sub(r"\W", "", name).lower(): name for name in header}
    found: dict[str, str] = {}
    for wanted, part in zip(("basic", "fine", *keys), (*columns, *keys), strict=True):
        key = re.sub(r"\W", "", part).lower()
        name = plain.get(key) or next((name for one, name in plain.items() if key in one), None)
        if name is None:
            raise DataError(
                f"has no column named like '{part}' (it has {', '.join(header) or 'no rows'}); "
                "name the raters' columns with --option basic=... and fine=...",
                file=str(book),
            )
        found[wanted] = name
    return [{**line, **{key: line[name] for key, name in found.items()}} for line in lines]


def _vote(clip: _Clip, line: Mapping[str, str], where: str) -> Iterator[Excluded]:
    """Count one rater's votes. What is no label is named."""
    parts = [one for one in re.split(r"[,;/|、，；\[\]'\"\s]+", line["fine"]) if one]
    for votes, name, written in (
        (clip.basic, "emos", [line["basic"]]),
        (clip.fine, "goemotions", parts),
    ):
        for one in dict.fromkeys(written):
            if not one.strip() or one.strip().lower() == "unsure":
                continue
            try:
                votes[emotion_set(name).find(one).name] += 1
            except EvaluationError:
                yield Excluded(where, "vote outside the set", one)


def _questions(
    code: str, source: _Source, name: str, clip: _Clip, index: ClipIndex
) -> Iterator[dict[str, Any] | Excluded]:
    row = f"emos-{code}-{name.replace('/', '-')}"
    path = index.find(name, index.find(_padded(name), f"{source.clips}/{name}.mp4"))
    group = {"language": code, "source": source.name, "part": clip.part}
    group["speaker"] = clip.line.get("Speaker", "")
    words = next((clip.line[key] for key in ("Utterance", "text") if clip.line.get(key)), "")
    if not clip.basic:
        yield Excluded(row, "no basic votes")
    else:
        names = emotion_set("emos").names
        most = [one for one in names if clip.basic[one] == max(clip.basic.values())]
        share = clip.basic[most[0]] / sum(clip.basic.values())
        group["agreement"] = "tie" if len(most) > 1 else "all" if share == 1 else "most"
        question = QUESTION.format(", ".join(names))
        yield labelled_row(
            row,
            question,
            most[0],
            talking(path),
            transcript=words,
            group=group,
            task="basic7",
            votes=dict(clip.basic),
        )
    if not clip.fine:
        yield Excluded(f"{row}-fine", "no fine votes")
        return
    names = emotion_set("goemotions").names
    least = min(clip.raters / 2, max(clip.fine.values()))
    gold = [one for one in names if clip.fine[one] >= least]
    fine = labelled_row(
        f"{row}-fine",
        SEVERAL.format(", ".join(names)),
        ", ".join(gold),
        talking(path),
        transcript=words,
        group=group,
        task="goemotions",
        votes=dict(clip.fine),
        gold=gold,
    )
    yield {key: value for key, value in fine.items() if key != "label"}


def _whole(cell: str) -> str:
    """An id that Excel may have made a number: 3.0 is 3."""
    return re.sub(r"\.0+$", "", cell.strip())


def _padded(name: str) -> str:
    """CH-SIMS names its clips 0001, which Excel makes 1."""
    return re.sub(r"\d+$", lambda one: one.group().zfill(4), name)
