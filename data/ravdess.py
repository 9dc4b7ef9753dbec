"""RAVDESS: acted English speech of 24 actors, eight emotions, picture with sound.

1,440 speech clips (Livingstone and Russo, PLoS ONE 2018) under CC BY-NC-SA 4.0; get
``Video_Speech_Actor_*.zip`` from https://zenodo.org/records/1188976. Layout of the folder::

    Actor_01/01-01-03-01-02-01-01.mp4    modality, channel, emotion, intensity, statement,
                                         repetition, actor

Files without sound (modality 02) and songs (channel 02) are no rows. Copies of the sound alone
(modality 03, ``.wav``) are rows without picture if ``media=audio``. The release has no split. The
usual six folds hold four actors each: here fold 1 tests actors 1 to 4, fold 6 tests 21 to 24 (our
assignment; papers differ).

    mmemo manifest data/ravdess.py --root RAVDESS --output ravdess.jsonl --split train
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.folders import (
    CLIPS,
    SOUNDS,
    LabelReader,
    labelled_row,
    once,
    parts_of_folds,
    talking,
)

LABELS = "ravdess"
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."
_OTHERS = ("calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_COUNTS = {"neutral": 96, **dict.fromkeys(_OTHERS, 192)}
PUBLISHED = dict.fromkeys(("split=all", "fold=all", "split=test,fold=all"), _COUNTS)
SENTENCES = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
_NAME = re.compile(r"\d\d(?:-\d\d){6}")
_STREAMS = {"av": ("01", CLIPS), "audio": ("03", SOUNDS)}


def rows(
    root: Path, *, split: str = "all", fold: str = "6", media: str = "av", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``split``: all, or train or test of the ``fold`` 1 to 6; ``fold=all`` is
    the test parts of all, with their fold in ``group``. ``media``: av or audio. ``labels``: the
    label set of the rows."""
    parts_of_folds(split, fold, 6)
    need_option("media", media, tuple(_STREAMS))
    yield from once(_rows(root, split, fold, media, LabelReader(LABELS, labels)))


def _rows(
    root: Path, split: str, fold: str, media: str, read: LabelReader
) -> Iterator[dict[str, Any] | Excluded]:
    modality, suffixes = _STREAMS[media]
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in suffixes or not _NAME.fullmatch(file.stem):
            continue
        kind, channel, emotion, intensity, statement, _, actor = file.stem.split("-")
        own = str((int(actor) - 1) // 4 + 1)
        part = "test" if fold in (own, "all") else "train"
        if (kind, channel) != (modality, "01") or split not in ("all", part):
            continue
        label = read(emotion, f"ravdess-{file.stem}")
        if isinstance(label, Excluded):
            yield label
            continue
        path = file.relative_to(root).as_posix()
        yield labelled_row(
            f"ravdess-{file.stem}",
            QUESTION.format(read.names),
            label,
            talking(path) if media == "av" else {"audio": path},
            transcript=SENTENCES.get(statement, ""),
            group={
                "speaker": actor,
                "gender": "female" if int(actor) % 2 == 0 else "male",
                "fold": own if fold == "all" else "",
                "intensity": "strong" if intensity == "02" else "normal",
            },
        )
