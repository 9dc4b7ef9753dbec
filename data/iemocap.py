"""IEMOCAP: acted dialogues of ten actors in five sessions.

12 hours (Busso et al., LREV 2008), for research on request; get it from
https://sail.usc.edu/iemocap. Layout of the folder::

    Session5/dialog/EmoEvaluation/Ses05F_impro01.txt     [start - end], name, emotion, [v, a, d]
    Session5/dialog/transcriptions/Ses05F_impro01.txt    name [start-end]: text
    Session5/dialog/avi/DivX/Ses05F_impro01.avi          both people, the whole dialogue

A row is one utterance, a span of the dialogue's clip. Both people are in the picture: the side of
the speaker is not cut here. Labels are the six classes; ``labels=iemocap4`` gives the usual
four, where excitement is happiness (5,531 utterances). Other annotations (no agreement, surprise,
fear ...) are left out. The 7,433 of the processed six-way features are no count of these files.
Session 5 is the test part (1,241 utterances of four classes); ``session=1`` ... hold out another.

    mmemo manifest data/iemocap.py --root IEMOCAP_full_release --output iemocap.jsonl --split train
"""

from __future__ import annotations

import re
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
from mmemo.data.releases.tables import read_text
from mmemo.errors import DataError

LABELS = "iemocap6"
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."
SESSIONS = ("1", "2", "3", "4", "5")
OTHER = ("xxx", "oth", "sur", "fea", "dis")
PUBLISHED = {
    "labels=iemocap4": {"happy": 1636, "sad": 1084, "neutral": 1708, "angry": 1103},
    "split=test,labels=iemocap4": {"": 1241},
}
_LINE = re.compile(r"\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\s+(Ses\w+)\s+(\w+)\s")
_SAID = re.compile(r"(Ses\w+)\s+\[[^\]]*\]\s*:?\s*(.*)")


def rows(
    root: Path, *, split: str = "all", session: str = "5", labels: str = LABELS
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per utterance. ``split``: all, test (the ``session``) or train (the others).
    ``labels``: the label set of the rows."""
    need_option("split", split, ("all", "train", "test"))
    need_option("session", session, SESSIONS)
    read = LabelReader(LABELS, labels)
    for number in SESSIONS:
        if split == "all" or (number == session) == (split == "test"):
            yield from once(_rows(root / f"Session{number}/dialog", root, number, read))


def _rows(
    folder: Path, root: Path, session: str, read: LabelReader
) -> Iterator[dict[str, Any] | Excluded]:
    files = [file for file in sorted((folder / "EmoEvaluation").glob("*.txt")) if _is_own(file)]
    if not files:
        raise DataError("has no EmoEvaluation/*.txt; check --data", file=str(folder))
    where = folder.relative_to(root).as_posix()
    clips = ClipIndex(root, [f"{where}/avi/DivX", f"{where}/avi"])
    said = _transcripts(folder / "transcriptions")
    for file in files:
        path = clips.find(file.stem, f"{where}/avi/DivX/{file.stem}.avi")
        for start, end, name, emotion in _LINE.findall(read_text(file) + "\n"):
            if emotion.lower() in OTHER:
                yield Excluded(name, "not one of the classes", emotion, expected=True)
                continue
            label = read(emotion.lower(), name)
            if isinstance(label, Excluded):
                yield label
            elif float(end) <= float(start):
                yield Excluded(name, "empty span", f"{start} to {end} s")
            else:
                gender = "female" if name[-4] == "F" else "male"
                yield labelled_row(
                    f"iemocap-{name}",
                    QUESTION.format(read.names),
                    label,
                    talking(path),
                    transcript=said.get(name, ""),
                    group={
                        "speaker": f"Ses{session.zfill(2)}{name[-4]}",
                        "gender": gender,
                        "session": session,
                        "dialogue": file.stem,
                    },
                    start=float(start),
                    end=float(end),
                )


def _transcripts(folder: Path) -> dict[str, str]:
    """Name of each utterance to its words. Lines of other forms are remarks."""
    lines = [
        line.strip()
        for file in sorted(folder.glob("Ses*.txt"))
        if _is_own(file)
        for line in read_text(file).splitlines()
    ]
    return {found[1]: found[2].strip() for line in lines if (found := _SAID.fullmatch(line))}


def _is_own(file: Path) -> bool:
    return not file.name.startswith(".")
