"""L3Cube-MahaEmotions: emotions of Marathi tweets.

11,998 tweets for training, labelled by GPT-4, and 1,500 each for validation and test, labelled by
people (arXiv 2506.00863; the README counts 12,000). Get them from
https://github.com/l3cube-pune/MarathiNLP, whose README says the licence. Layout of the folder::

    train.csv, validation.csv, test.csv       Tweet,Label; anger and disgust are one label
    anger-disgust-separate/train.csv, ...     the same with 11 labels

Labels are found in any case and with spaces around them, and columns without a name are ignored.
Some tweets of test and validation are in train, word for word (47 and 45 of 1,500, as counted in
the release): their rows have ``group.in_train``, so that accuracy is given with and without them,
and ``overlap=drop`` leaves them out, named. 136 validation labels differ between both folders, even
with anger and disgust as one.

    mmemo manifest data/texts/maha_emotions.py --root MahaEmotions --output maha.jsonl --split train
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import read_table

COLUMNS = ("task",)
ELEVEN = (
    *("Anger", "Disgust", "Excitement", "Fear", "Happiness", "Neutral", "Pride", "Respect"),
    *("Sadness", "Sarcasm", "Surprise"),
)
TEN = ("Anger/Disgust", *ELEVEN[2:])
SPLITS = ("train", "validation", "test")
PUBLISHED = {
    f"{classes}split={split}": {"": count}
    for classes in ("", "classes=11,")
    for split, count in zip(SPLITS, (11_998, 1_500, 1_500), strict=True)
}
QUESTION = (
    "Which emotion does this Marathi tweet express?\n\n{}\n\nAnswer with one of these words: {}."
)


def rows(
    root: Path, *, split: str = "test", classes: str = "10", overlap: str = "keep"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per tweet. ``classes``: 10 or 11. ``overlap``: keep or drop tweets that are also in
    train, of the other splits."""
    need_option("split", split, SPLITS)
    need_option("classes", classes, ("10", "11"))
    need_option("overlap", overlap, ("keep", "drop"))
    labels = TEN if classes == "10" else ELEVEN
    known = {label.casefold(): label for label in labels}
    folder = root if classes == "10" else root / "anger-disgust-separate"
    train = set[str]() if split == "train" else set(map(_plain, _tweets(folder / "train.csv")))
    needs = ("Tweet", "Label")
    for place, cells in enumerate(read_table(folder / f"{split}.csv", needs), start=1):
        if isinstance(cells, Excluded):
            yield cells
            continue
        name = f"maha-{split}-{place}"
        label = known.get(cells["Label"].casefold())
        if label is None or not cells["Tweet"]:
            reason = "no tweet" if label else "label outside the set"
            yield Excluded(name, reason, cells["Label"])
            continue
        seen = _plain(cells["Tweet"]) in train
        if seen and overlap == "drop":
            yield Excluded(name, "also in train", cells["Tweet"][:60])
            continue
        row: dict[str, Any] = {
            "sample_id": name,
            "task": f"emotion{classes}",
            "prompt": QUESTION.format(cells["Tweet"], ", ".join(labels)),
            "completion": f"<answer>{label}</answer>",
            "label": label,
        }
        yield row if split == "train" else {**row, "group": {"in_train": "yes" if seen else "no"}}


def _tweets(path: Path) -> Iterator[str]:
    if path.is_file():
        for cells in read_table(path, ("Tweet",)):
            if isinstance(cells, dict):
                yield cells["Tweet"]


def _plain(text: str) -> str:
    """A text to compare: one Unicode form, no double spaces, no case."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
