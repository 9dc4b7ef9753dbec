"""MELD: utterances of the series Friends, seven emotions.

9,989 training, 1,109 development and 2,610 test utterances (Poria et al., ACL 2019) under GPL-3.0;
get ``MELD.Raw.tar.gz`` from https://github.com/declare-lab/MELD. Layout of the folder::

    test_sent_emo.csv      Utterance, Speaker, Emotion, Sentiment, Dialogue_ID, Utterance_ID, ...
    output_repeated_splits_test/dia0_utt0.mp4      or test/
    train_splits/, dev_splits_complete/            or train/, dev/

Clips of the three parts have the same names. Two clips are known to be bad (test dia279_utt15,
train dia125_utt3): their rows are left out unless ``bad=keep``. The sentiment of an utterance is in
``group``.

    mmemo manifest data/meld.py --root MELD.Raw --output meld_train.jsonl --split train
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
    talking,
)
from mmemo.data.releases.tables import read_table

LABELS = "meld"
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."
FOLDERS = {
    "train": ("train_splits", "train"),
    "dev": ("dev_splits_complete", "dev_splits", "dev"),
    "test": ("output_repeated_splits_test", "test_splits", "test"),
}
BAD = {"train": "dia125_utt3", "test": "dia279_utt15"}
_NAMES = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
_COUNTS = {
    "train": dict(zip(_NAMES, (1109, 271, 268, 1743, 4710, 683, 1205), strict=True)),
    "dev": dict(zip(_NAMES, (153, 22, 40, 163, 470, 111, 150), strict=True)),
    "test": dict(zip(_NAMES, (345, 68, 50, 402, 1256, 208, 281), strict=True)),
}
PUBLISHED = {
    **{f"split={part},bad=keep": counts for part, counts in _COUNTS.items()},
    "split=dev": _COUNTS["dev"],
    # One bad clip of each is left out, a neutral one in the test part.
    "split=train": {"": 9988},
    "split=test": {**_COUNTS["test"], "neutral": 1255},
}
_NEEDS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")


def rows(
    root: Path, *, split: str = "all", bad: str = "leave_out", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per utterance. ``split``: all, train, dev or test. ``bad``: leave_out or keep.
    ``labels``: the label set of the rows."""
    need_option("split", split, ("all", *FOLDERS))
    need_option("bad", bad, ("leave_out", "keep"))
    read = LabelReader(LABELS, labels)
    for part in FOLDERS if split == "all" else (split,):
        yield from once(_rows(root, part, BAD.get(part) if bad == "leave_out" else None, read))


def _rows(
    root: Path, part: str, bad: str | None, read: LabelReader
) -> Iterator[dict[str, Any] | Excluded]:
    folders = FOLDERS[part]
    clips = ClipIndex(root, [*folders, *(f"*/{one}" for one in folders)])
    name = f"{part}_sent_emo.csv"
    table = next((file for file in sorted(root.rglob(name))), root / name)
    for line in read_table(table, _NEEDS):
        if isinstance(line, Excluded):
            yield line
            continue
        clip = f"dia{line['Dialogue_ID']}_utt{line['Utterance_ID']}"
        row = f"meld-{part}-{clip}"
        if clip == bad:
            yield Excluded(row, "known bad clip", expected=True)
            continue
        label = read(line["Emotion"], row)
        if isinstance(label, Excluded):
            yield label
            continue
        yield labelled_row(
            row,
            QUESTION.format(read.names),
            label,
            talking(clips.find(clip, f"{folders[0]}/{clip}.mp4")),
            transcript=line["Utterance"],
            group={
                "speaker": line["Speaker"],
                "dialogue": f"{part}-{line['Dialogue_ID']}",
                "sentiment": line["Sentiment"].lower(),
            },
        )
