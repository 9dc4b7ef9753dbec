"""MER2024: Chinese films and shows, six emotions.

5,030 labelled training clips, and among 115,595 others 1,169 (test1) and 1,170 (test2, with noise)
test clips (Lian et al., MRAC 2024). For research under an agreement; get it from
https://huggingface.co/datasets/MERChallenge/MER2024. Layout of the folder::

    video-labeled/, label-disdim.csv                    the training part: name, discrete
    video-unlabeled/, semi-label.csv                    all test clips: name, discrete
    video-unlabeled-with-test2noise/, test1_name_convert_label.csv, test2_name_convert_label.csv
    label-transcription.csv                             optional: name, chinese (columns assumed)

The tables of test1 and test2 name the clips as in the folder that was given to participants. The
assignment of ``semi-label.csv`` to the two is random and was not released.

    mmemo manifest data/mer2024.py --root MER2024 --output mer2024.jsonl --split train
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import (
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    read_words,
    talking,
)
from mmemo.data.releases.tables import read_table
from mmemo.errors import DataError

LABELS = "mer2023"
QUESTION = "Which emotion does the person express? Answer with one of these words: {}."
PUBLISHED = {
    "split=train": {"": 5030},
    "split=semi": {"": 2339},
    "split=test1": {"": 1169},
    "split=test2": {"": 1170},
}
_TEST = ("video-unlabeled-with-test2noise", "video-unlabeled", "video-test1", "video-test2")
_TABLES = {
    "train": ("label-disdim.csv",),
    "semi": ("semi-label.csv",),
    "test1": ("test1_name_convert_label.csv", "test1-label.csv"),
    "test2": ("test2_name_convert_label.csv", "test2-label.csv"),
}
_WORDS = ("label-transcription.csv", "transcription.csv", "subtitle_chieng.csv")


def rows(
    root: Path, *, split: str = "train", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``split``: train, test1, test2, or semi for both from
    ``semi-label.csv``. ``labels``: the label set of the rows."""
    need_option("split", split, tuple(_TABLES))
    yield from once(_rows(root, split, LabelReader(LABELS, labels)))


def _rows(root: Path, split: str, read: LabelReader) -> Iterator[dict[str, Any] | Excluded]:
    folders = ("video-labeled", "video-train") if split == "train" else _TEST
    clips, words = ClipIndex(root, folders), read_words(root, _WORDS)
    tables = [root / name for name in _TABLES[split]]
    table = next((file for file in tables if file.is_file()), None)
    if table is None:
        raise DataError(
            "is missing; get this file of the release, or choose another split", file=str(tables[0])
        )
    for line in read_table(table, ("name", "discrete")):
        if isinstance(line, Excluded):
            yield line
            continue
        row = f"mer2024-{line['name']}"
        label = read(line["discrete"], row)
        if isinstance(label, Excluded):
            yield label
            continue
        yield labelled_row(
            row,
            QUESTION.format(read.names),
            label,
            talking(clips.find(line["name"], f"{folders[0]}/{line['name']}.mp4")),
            transcript=words.get(line["name"], ""),
            group={"part": split},
        )
