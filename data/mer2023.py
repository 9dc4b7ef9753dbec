"""MER2023: Chinese films and shows, six emotions, with valence; four parts.

3,373 training clips, 411 (test1), 412 (test2, with noise) and 834 (test3) labelled test clips (Lian
et al., ACM MM 2023). For research under an agreement; get it from http://merchallenge.cn. Layout of
the folder::

    train/, test1/, test2/, test3/             clips, .mp4 or .avi
    train-label.csv, test1-label.csv, ...      name, discrete, valence (test3 has no valence)
    transcription.csv                          optional: name, chinese or english (columns assumed)

The label files may also lie in a folder ``test-labels`` or beside the clips of their part. A row
keeps its valence in ``valence``.

    mmemo manifest data/mer2023.py --root MER2023 --output mer2023.jsonl --split train
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
    number,
    once,
    read_words,
    talking,
)
from mmemo.data.releases.tables import read_table

LABELS = "mer2023"
COLUMNS = ("valence",)
QUESTION = "Which emotion does the person express? Answer with one of these words: {}."
PARTS = ("train", "test1", "test2", "test3")
PUBLISHED = {
    "split=train": {"": 3373},
    "split=test1": {
        "neutral": 88,
        "angry": 105,
        "happy": 93,
        "sad": 50,
        "worried": 57,
        "surprise": 18,
    },
    "split=test2": {"": 412},
    "split=test3": {"": 834},
}
_WORDS = ("transcription.csv", "transcription-engchi-polish.csv", "transcription-old.csv")


def rows(
    root: Path, *, split: str = "all", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``split``: all, train, test1, test2 or test3. ``labels``: the label set of
    the rows."""
    need_option("split", split, ("all", *PARTS))
    read, words = LabelReader(LABELS, labels), read_words(root, _WORDS)
    for part in PARTS if split == "all" else (split,):
        yield from once(_rows(root, part, read, words))


def _rows(
    root: Path, part: str, read: LabelReader, words: dict[str, str]
) -> Iterator[dict[str, Any] | Excluded]:
    clips = ClipIndex(root, [part, f"*/{part}"])
    name = f"{part}-label.csv"
    table = next((file for file in sorted(root.rglob(name))), root / name)
    for line in read_table(table, ("name", "discrete")):
        if isinstance(line, Excluded):
            yield line
            continue
        row = f"mer2023-{part}-{line['name']}"
        label = read(line["discrete"], row)
        if isinstance(label, Excluded):
            yield label
            continue
        made = labelled_row(
            row,
            QUESTION.format(read.names),
            label,
            talking(clips.find(line["name"], f"{part}/{line['name']}.mp4")),
            transcript=words.get(line["name"], ""),
            group={"part": part},
        )
        valence = number(line.get("valence", ""))
        if valence is not None:  # test3 has none
            made["valence"] = valence
        yield made
