"""CMU-MOSI, CMU-MOSEI, CH-SIMS and CH-SIMS v2: how positive is what a person says?

Scores from -3 to 3 (MOSI, MOSEI: English) or -1 to 1 (SIMS, SIMS v2: Chinese). 1,284 / 229 / 686
training, validation and test clips in MOSI (Zadeh et al. 2016), 16,326 / 1,871 / 4,659 in MOSEI
(Zadeh et al., ACL 2018), 1,368 / 456 / 457 in SIMS (Yu et al., ACL 2020) and 2,722 / 647 / 1,034 in
SIMS v2 (Liu et al., ICMI 2022). For research; get them from https://github.com/thuiar/MMSA (raw
data) or their authors. Layouts of the folder::

    label.csv (or meta.csv)      video_id, clip_id, text, label, (label_T, label_A, label_V,) mode
    Raw/VIDEO/CLIP.mp4           or Video/Segmented/VIDEO_CLIP.mp4, Segmented/VIDEO_CLIP.mp4
    metadata/                    SIMS without label.csv: sentiment/label_{M,T,A,V}.csv,
                                 Translation.csv, {train,val,test}_index.csv

MMSA's feature files (.pkl) are pickles, which are not read; the labels are those of its label.csv.
The label of a row is the sign of its score, ``gold`` is the score. Speakers are not named; a video
(``group.speaker``) usually shows one person.

    mmemo manifest data/sentiment.py --root MOSI --output mosi.jsonl --split train --option set=mosi
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import ClipIndex, labelled_row, number, once, talking
from mmemo.data.releases.tables import whole_table
from mmemo.errors import DataError

LABELS = "polarity"
COLUMNS = ("gold",)
ENDS = {"mosi": 3, "mosei": 3, "sims": 1, "sims_v2": 1}
"""The scale of each set goes from minus this to this."""
QUESTION = (
    "How negative or positive is what the person expresses? Answer with a number from {low} (very "
    "negative) to {high} (very positive)."
)
_COUNTS = {
    "mosi": (1284, 229, 686),
    "mosei": (16326, 1871, 4659),
    "sims": (1368, 456, 457),
    "sims_v2": (2722, 647, 1034),
}
_SPLITS = ("train", "valid", "test")
PUBLISHED = {
    f"set={name},split={split}": {"": count}
    for name, counts in _COUNTS.items()
    for split, count in zip(_SPLITS, counts, strict=True)
}
_MODES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
_CHANNELS = {"label_T": "text", "label_A": "audio", "label_V": "video"}


def rows(
    root: Path, *, set: str = "mosi", split: str = "all"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``set``: mosi, mosei, sims or sims_v2. ``split``: all, train, valid or
    test."""
    need_option("set", set, tuple(ENDS))
    need_option("split", split, ("all", *_SPLITS))
    yield from once(_rows(root, set, split))


def polarity(score: float) -> str:
    """The sign of a score as a label."""
    return "positive" if score > 0 else "negative" if score < 0 else "neutral"


def _rows(root: Path, name: str, split: str) -> Iterator[dict[str, Any] | Excluded]:
    clips = ClipIndex(root, ["Raw", "."], key=_key)
    end = ENDS[name]
    for line in _lines(root):
        clip = f"{line['video_id']}_{_clip(line['clip_id'])}"
        row, mode = f"{name}-{clip}", _MODES.get(line["mode"].lower())
        score = number(line["label"])
        if mode is None:
            yield Excluded(row, "in no split", line["mode"] or "(empty)", expected=True)
        elif split not in ("all", mode):
            continue
        elif score is None or abs(score) > end:
            yield Excluded(row, "label outside the scale", line["label"] or "(empty)")
        else:
            written = f"{round(score, 4) + 0:g}"
            channels = {
                channel: polarity(found)
                for column, channel in _CHANNELS.items()
                if (found := number(line.get(column, ""))) is not None
            }
            default = f"Raw/{line['video_id']}/{line['clip_id']}.mp4"
            made = labelled_row(
                row,
                QUESTION.format(low=-end, high=end),
                polarity(score),
                talking(clips.find(clip, default)),
                transcript=line.get("text", ""),
                group={"speaker": line["video_id"]},
                gold=score + 0.0,  # -0.0 is written as 0.0
                completion=f"<answer>{written}</answer>",
            )
            if channels:
                made["modality_labels"] = channels
            yield made


def _lines(root: Path) -> list[dict[str, str]]:
    """The rows of the set's own table of labels."""
    needs = ("video_id", "clip_id", "label")
    for name in ("label.csv", "meta.csv"):
        if (root / name).is_file():
            return whole_table(root / name, (*needs, "mode", "text"))
    folder = root / "metadata"
    if not folder.is_dir():
        raise DataError(
            "is missing; --data must be the folder of the set", file=f"{root}/label.csv"
        )
    lines = whole_table(folder / "sentiment/label_M.csv", needs)
    modes: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for line in whole_table(folder / f"{part}_index.csv", ("index",)):
            modes[int(line["index"])] = part
    for column in _CHANNELS:
        own = whole_table(folder / f"sentiment/{column}.csv", needs, optional=True)
        found = {_id(line): line["label"] for line in own}
        lines = [{**line, column: found.get(_id(line), "")} for line in lines]
    said = whole_table(
        folder / "Translation.csv", ("video_id", "clip_id", "Chinese"), optional=True
    )
    words = {_id(line): line["Chinese"] for line in said}
    return [
        {**line, "mode": modes.get(place, ""), "text": words.get(_id(line), "")}
        for place, line in enumerate(lines)
    ]


def _id(line: Mapping[str, str]) -> tuple[str, str]:
    return line["video_id"], _clip(line["clip_id"])


def _clip(written: str) -> str:
    """The number of a clip without the zeros that one table has and another has not."""
    written = written.removesuffix(".0").removesuffix(".mp4")
    return written.lstrip("0") or "0" if written.isdigit() else written


def _key(path: Path) -> str:
    """``VIDEO_CLIP`` of a file in either layout."""
    if len(path.parts) > 1 and path.stem.isdigit():
        return f"{path.parts[-2]}_{_clip(path.stem)}"
    video, _, clip = path.stem.rpartition("_")
    return f"{video}_{_clip(clip)}" if video else path.stem
