"""CREMA-D: acted English speech, rated three times: by the voice, by the face, and by both.

7,442 clips of 91 actors and 12 sentences (Cao et al., IEEE T-AFFC 2014) under the Open Database
License; get it from https://github.com/CheyneyComputerScience/CREMA-D. Layout of the release::

    VideoFlash/1001_IEO_NEU_XX.flv      actor, sentence, displayed emotion, level
    summaryTable.csv                    VoiceVote, FaceVote and MultiModalVote of each clip
    VideoDemographics.csv               optional: age, sex, race, ethnicity of each actor

The label is what most raters perceived in the whole clip, and clips with a tie there are left out;
``label=displayed`` takes the emotion that the actor was asked for, which is often another one.
Each row also has the labels of voice and face, and CA-MER's conflict subset where they define one.

    mmemo manifest data/crema_d.py --root CREMA-D --output crema_d.jsonl --option label=perceived
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.answers.label_sets import emotion_set, mapping
from mmemo.data.adapter import need_option
from mmemo.data.conflict import slice_of
from mmemo.data.sample import CONFLICTS
from mmemo.errors import DataError

LABELS = "crema_d"
QUESTION = (
    "<video><audio><face>Which emotion does the person express? Consider both the face and the "
    "voice. Answer with one of these words: {}."
)


def rows(
    root: Path, *, split: str = "all", label: str = "perceived", labels: str = LABELS
) -> Iterator[dict[str, Any]]:
    """One row per clip. ``split``: all, train, validation or test, apart by actor (ours: the
    release has none): actors whose number ends in 0 or 5 are test, in 1 or 6 validation.
    ``labels``: the label set of the rows; clips without a label in it are left out."""
    need_option("split", split, ("all", "train", "validation", "test"))
    need_option("label", label, ("perceived", "displayed"))
    people = {row["ActorID"]: row for row in _table(root / "VideoDemographics.csv", optional=True)}
    # Votes are written as one letter, displayed emotions as three.
    emotions = {code: to for code, to in mapping(LABELS, labels).by_code.items() if len(code) == 1}
    question = QUESTION.format(", ".join(emotion_set(labels).names))
    for votes in _table(root / "summaryTable.csv"):
        name = votes["FileName"]
        actor, sentence, displayed, _level = name.split("_")
        own = {0: "test", 1: "validation"}.get(int(actor) % 5, "train")
        audio, video, both = (votes[f"{key}Vote"] for key in ("Voice", "Face", "MultiModal"))
        emotion = emotions.get(both if label == "perceived" else displayed[0])
        if split not in ("all", own) or emotion is None:
            continue
        modes = {"audio": audio, "video": video}
        row: dict[str, Any] = {
            "sample_id": f"crema_d-{name}",
            "prompt": question,
            "completion": f"<answer>{emotion}</answer>",
            **dict.fromkeys(("video", "audio", "face"), f"VideoFlash/{name}.flv"),
            "label": emotion,
            "modality_labels": {m: emotions[vote] for m, vote in modes.items() if vote in emotions},
            "group": {"speaker": actor, "sentence": sentence},
        }
        if {audio, video, both} <= emotions.keys() and slice_of(audio, video, both) in CONFLICTS:
            row["conflict"] = slice_of(audio, video, both)
        for key, column in {"gender": "Sex", "race": "Race", "ethnicity": "Ethnicity"}.items():
            if actor in people:
                row["group"][key] = people[actor][column]
        yield row


def _table(path: Path, *, optional: bool = False) -> list[dict[str, str]]:
    if not path.exists():
        if optional:
            return []
        raise DataError("is missing; --root must be CREMA-D's folder", file=str(path))
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
