"""MAFW: faces in films and shows, eleven single labels, five folds.

10,045 clips, of which 9,172 have a single label (Liu et al., ACM MM 2022). For research on request;
get it from https://mafw-database.github.io/MAFW. Layout of the folder::

    Train & Test Set/single/no_caption/set_1/test.txt      "00001.mp4 anger" in each line
    data/clips/00001.mp4

Older copies have ``split/single/...``. 21 clips have no sound: each clip is opened, and a row of
such a clip names no audio (``sound=trust`` takes all clips to have sound, which is faster).

    mmemo manifest data/mafw.py --root MAFW --output mafw.jsonl --split train --option fold=1
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import (
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    parts_of_folds,
    talking,
)
from mmemo.data.releases.tables import read_text
from mmemo.errors import DataError, MediaError
from mmemo.media.probe import probe

LABELS = "mafw"
QUESTION = "Which emotion does the person show most clearly? Answer with one of these words: {}."
PUBLISHED = {
    "split=test,fold=1": {"": 1839},
    "split=test,fold=all": {"": 9172},
    "split=all": {"": 9172},
}
_FOLDERS = ("Train & Test Set", "Train & Test Set (Single)", "split", ".")


def rows(
    root: Path, *, split: str = "all", fold: str = "1", sound: str = "probe", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``split``: all, train or test of the ``fold`` 1 to 5; ``fold=all`` gives
    the test parts of all, with their fold in ``group``. ``sound``: probe or trust. ``labels``: the
    label set of the rows."""
    lists = parts_of_folds(split, fold)
    need_option("sound", sound, ("probe", "trust"))
    yield from once(_rows(root, lists, sound == "probe", LabelReader(LABELS, labels)))


def _rows(
    root: Path, lists: Sequence[tuple[str, str]], check: bool, read: LabelReader
) -> Iterator[dict[str, Any] | Excluded]:
    clips = ClipIndex(root, ["data/clips", "clips", "data"])
    for part, fold in lists:
        for line in filter(None, map(str.strip, read_text(_list(root, fold, part)).splitlines())):
            name, _, written = re.sub(r"\s+", " ", line).partition(" ")
            stem = Path(name).stem
            label = read(written, f"mafw-{stem}")
            if isinstance(label, Excluded):
                yield label
                continue
            path = clips.find(stem, f"data/clips/{stem}.mp4")
            media = talking(path)
            if check and (root / path).is_file() and _is_silent(root / path):
                del media["audio"]
            yield labelled_row(
                f"mafw-{stem}",
                QUESTION.format(read.names),
                label,
                media,
                group={"fold": fold if part == "test" else ""},
            )


def _list(root: Path, fold: str, part: str) -> Path:
    tried = [root / one / f"single/no_caption/set_{fold}/{part}.txt" for one in _FOLDERS]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise DataError("is missing; --data must be MAFW's folder", file=str(tried[0]))
    return found


@cache  # rows may be made twice, to know the files that none names
def _is_silent(path: Path) -> bool:
    try:
        return probe(path, path.name).audio is None
    except MediaError:
        return False  # missing or broken, which is reported for every set alike
