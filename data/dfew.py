"""DFEW: faces in films, seven emotions, five folds.

11,697 of its clips have one label (Jiang et al., ACM MM 2020). For research on request; get it from
https://dfew-dataset.github.io. Layout of the folder::

    EmoLabel_DataSplit/train(single-labeled)/set_1.csv     video_name, label (1 to 7)
    EmoLabel_DataSplit/test(single-labeled)/set_1.csv      ... set_5.csv
    Clip/original/part_1/1.mp4                             the clips, anywhere under Clip

Frames (``Clip/jpg_256/00001/*.jpg``) have no sound and are not read: get the original clips, whose
numbers may have zeros in front or not. The names of their folders are assumed.

    mmemo manifest data/dfew.py --root DFEW --output dfew.jsonl --split train --option fold=1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.releases.folders import (
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    parts_of_folds,
    talking,
)
from mmemo.data.releases.tables import read_table

LABELS = "dfew"
QUESTION = "Which emotion does the person show most clearly? Answer with one of these words: {}."
PUBLISHED = {
    "split=test,fold=1": {
        "happy": 489,
        "sad": 379,
        "neutral": 534,
        "angry": 435,
        "surprise": 294,
        "disgust": 29,
        "fear": 181,
    },
    "split=test,fold=all": {"": 11697},
    "split=all": {"": 11697},
}


def rows(
    root: Path, *, split: str = "all", fold: str = "1", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``split``: all, train or test of the ``fold`` 1 to 5; ``fold=all`` gives
    the test parts of all, with their fold in ``group``. ``labels``: the label set of the rows."""
    lists = parts_of_folds(split, fold)
    clips = ClipIndex(root, ["Clip/original", "."], key=lambda path: path.stem.lstrip("0"))
    yield from once(_rows(root, lists, LabelReader(LABELS, labels), clips))


def _rows(
    root: Path, lists: Sequence[tuple[str, str]], read: LabelReader, clips: ClipIndex
) -> Iterator[dict[str, Any] | Excluded]:
    for part, fold in lists:
        table = root / f"EmoLabel_DataSplit/{part}(single-labeled)/set_{fold}.csv"
        for line in read_table(table, ("video_name", "label")):
            if isinstance(line, Excluded):
                yield line
                continue
            # Some copies write the number as 123.0, or as 00123.
            number = line["video_name"].split(".")[0].lstrip("0")
            label = read(line["label"].removesuffix(".0"), f"dfew-{number}")
            if isinstance(label, Excluded):
                yield label
                continue
            path = clips.find(number, f"Clip/original/{number}.mp4")
            yield labelled_row(
                f"dfew-{number}",
                QUESTION.format(read.names),
                label,
                talking(path),
                group={"fold": fold if part == "test" else ""},
            )
