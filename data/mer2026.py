"""MER2026: three challenge tracks on Chinese films and shows (arXiv 2604.19417).

CC BY-NC 4.0, gated; get it from https://huggingface.co/datasets/MERChallenge/MER2026. Layout of the
folder::

    video/NAME.mp4, audio/NAME.wav, subtitle_chieng.csv    name, chinese, english
    track1_train.csv                                       name, discrete (9,395; six emotions)
    track2_train_human.csv, track2_train_mercaptionplus.csv    name, openset = "[calm, happy]"
    track3_emoprefer.csv, track3_emopreferv2.csv           name, a1, a2, preference (a1, a2, same)
    track1_track2_candidate.csv, track3_candidate.csv      the clips to submit, without labels

Track 1 asks for an emotion: of the person in training, of the listener among the candidates. Track
2 asks for any words. Track 3 asks which of two descriptions people preferred; pairs that they found
equal are left out unless ``ties=keep``. ``form=pairs`` gives track 3 as preference pairs for DPO,
and ``order=reversed`` shows the second description first. Candidates have a placeholder as truth
(neutral, or a1), as in the baseline's code: their scores say nothing, only their answers are of
use.

    mmemo manifest data/mer2026.py --root MER2026 --output pairs.jsonl --option track=3 \
        --option form=pairs
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import (
    SOUNDS,
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    read_words,
    talking,
    words_of,
)
from mmemo.data.releases.tables import whole_table

LABELS = "mer2023"
COLUMNS = ("gold", "a1", "a2")
FILES = {
    "1": {"train": "track1_train.csv", "candidates": "track1_track2_candidate.csv"},
    "2": {
        "human": "track2_train_human.csv",
        "captions": "track2_train_mercaptionplus.csv",
        "candidates": "track1_track2_candidate.csv",
    },
    "3": {
        "votes": "track3_emoprefer.csv",
        "v2": "track3_emopreferv2.csv",
        "candidates": "track3_candidate.csv",
    },
}
PUBLISHED = {
    "track=1,split=train": {"": 9395},
    "track=1,split=candidates": {"": 20000},
    "track=2,split=human": {"": 1532},
    "track=2,split=captions": {"": 31327},
    "track=3,split=votes,ties=keep": {"": 574},
    "track=3,split=v2,ties=keep": {"": 2096},
    "track=3,split=candidates": {"": 10000},
}
PERSON = "Which emotion does the person express? Answer with one of these words: {}."
LISTENER = (
    "Which emotion does the listener, who is shown but does not speak, express? Answer with one of "
    "these words: {}."
)
OPEN = "Which emotions does the person express? List all words that fit, separated by commas."
DESCRIBE = "Describe the person's emotional state and the cues for it in face, voice and words."
CHOOSE = (
    'Here are two descriptions of the clip.\na1: "{}"\na2: "{}"\nWhich one describes the person\'s '
    "emotion better? Answer a1 or a2, or same if both are equally good."
)
_TIES = ("same", "tie")


def rows(
    root: Path,
    *,
    track: str = "1",
    split: str = "",
    ties: str = "leave_out",
    order: str = "forward",
    form: str = "choice",
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip, or per pair. ``split``: of the track, see ``FILES``; the first by default.
    ``ties``: leave_out or keep. ``order``: forward or reversed. ``form``: choice or pairs."""
    need_option("track", track, tuple(FILES))
    split = split or next(iter(FILES[track]))
    need_option("split", split, tuple(FILES[track]))
    need_option("ties", ties, ("leave_out", "keep"))
    need_option("order", order, ("forward", "reversed"))
    need_option("form", form, ("choice", "pairs"))
    needs = {"1": ("discrete",), "2": ("openset",), "3": ("a1", "a2", "preference")}[track]
    if split == "candidates":
        needs = needs[:2] if track == "3" else ()
    table = whole_table(root / FILES[track][split], ("name", *needs))
    words = read_words(root, ("subtitle_chieng.csv",))
    videos, sounds = ClipIndex(root, ["video"]), ClipIndex(root, ["audio"], SOUNDS)
    read = LabelReader(LABELS, LABELS)
    made: list[dict[str, Any] | Excluded] = []
    for place, line in enumerate(table):
        name, said = line["name"], words.get(line["name"], "")
        media = talking(videos.find(name, f"video/{name}.mp4"))
        media["audio"] = sounds.find(name, media["video"])
        row = _base(row_id(track, name, place), media, said)
        if track == "3":
            made.append(_pair(row, line, ties, order == "reversed", form))
        elif track == "2":
            made.append(_words(row, line.get("openset", "[neutral]")))
        else:
            made.append(_emotion(row, line, read, listener=split == "candidates"))
    yield from once(iter(made))


def row_id(track: str, name: str, place: int) -> str:
    """The id of a row of a table. A clip may be in several pairs of track 3, which have numbers."""
    return f"mer2026-3-{place:05d}-{name}" if track == "3" else f"mer2026-{track}-{name}"


def _base(sample_id: str, media: dict[str, str], said: str) -> dict[str, Any]:
    quoted = f'The person says: "{words_of(said)}"\n' if said.strip() else ""
    row = labelled_row(sample_id, quoted, "", media, transcript=said)
    del row["label"], row["completion"], row["group"]
    return row


def _emotion(
    row: dict[str, Any], line: dict[str, str], read: LabelReader, *, listener: bool
) -> dict[str, Any] | Excluded:
    label = read("neutral" if listener else line["discrete"], row["sample_id"])
    if isinstance(label, Excluded):
        return label
    question = (LISTENER if listener else PERSON).format(read.names)
    answer = f"<answer>{label}</answer>"
    return {**row, "prompt": row["prompt"] + question, "completion": answer, "label": label}


def _words(row: dict[str, Any], written: str) -> dict[str, Any] | Excluded:
    gold = [one.strip() for one in re.split(r"['\",，、]", written.strip("[] ")) if one.strip()]
    if not gold:
        return Excluded(row["sample_id"], "no labels", written)
    answer = f"<answer>{', '.join(gold)}</answer>"
    return {
        **row,
        "prompt": row["prompt"] + OPEN,
        "completion": answer,
        "gold": gold,
        "labels": gold,
    }


def _pair(
    row: dict[str, Any], line: dict[str, str], ties: str, turned: bool, form: str
) -> dict[str, Any] | Excluded:
    texts = [words_of(line[key]) for key in ("a1", "a2")]
    wanted = line.get("preference", "a1").lower()
    if wanted in _TIES:
        wanted = "same"
    if wanted not in ("a1", "a2", "same"):
        return Excluded(row["sample_id"], "label outside the set", wanted or "(empty)")
    if not all(texts):
        return Excluded(row["sample_id"], "an empty description")
    if texts[0] == texts[1]:
        return Excluded(row["sample_id"], "two equal descriptions")
    if wanted == "same" and (ties == "leave_out" or form == "pairs"):
        return Excluded(row["sample_id"], "people found both equal", expected=True)
    if form == "pairs":
        better = texts[wanted == "a2"]
        worse = texts[wanted == "a1"]
        return {**row, "prompt": row["prompt"] + DESCRIBE, "chosen": better, "rejected": worse}
    if turned:
        texts.reverse()
        wanted = {"a1": "a2", "a2": "a1"}.get(wanted, wanted)
    answer = f"<answer>{wanted}</answer>"
    question = CHOOSE.format(*texts)
    own = {"completion": answer, "gold": wanted, "a1": texts[0], "a2": texts[1]}
    return {**row, "prompt": row["prompt"] + question, **own}
