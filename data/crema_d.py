"""CREMA-D: acted English speech, rated three times: by the voice, by the face, and by both.

7,442 clips of 91 actors and 12 sentences (Cao et al., IEEE T-AFFC 2014) under the Open Database
License; get it from https://github.com/CheyneyComputerScience/CREMA-D. Layout of the release::

    VideoFlash/1001_IEO_NEU_XX.flv      actor, sentence, displayed emotion, level
    AudioWAV/, AudioMP3/                the sound alone, .wav or .mp3
    summaryTable.csv                    VoiceVote, FaceVote and MultiModalVote of each clip
    tabulatedVotes.csv                  optional: number of raters for each emotion
    VideoDemographics.csv               optional: age, sex, race, ethnicity of each actor

The label is what most raters perceived in the whole clip, and clips with a tie there are left out.
``label=voice`` and ``label=face`` are what raters perceived in the sound, or the picture, alone,
which is then all that a row has; ``label=displayed`` takes the emotion that the actor was asked
for, which is often another one; a clip without its .flv is then a row of its sound. Each row also
has the labels of voice and face, and CA-MER's conflict subset where they define one.

    mmemo manifest data/crema_d.py --root CREMA-D --output crema_d.jsonl --option label=perceived
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo.answers.label_sets import emotion_set, mapping
from mmemo.data.adapter import need_option
from mmemo.data.conflict import slice_of
from mmemo.data.sample import CONFLICTS, Conflict
from mmemo.errors import DataError

LABELS = "crema_d"
SPLITS = ("all", "train", "validation", "test")
STIMULI = {"perceived": "MultiModal", "voice": "Voice", "face": "Face"}
"""What raters were shown to the name that the tables have for it."""
HEARD = {"VideoFlash": ".flv", "AudioWAV": ".wav", "AudioMP3": ".mp3"}
ASKED = {
    "voice": "Which emotion does the voice express?",
    "face": "Which emotion does the face express?",
    "both": "Which emotion does the person express? Consider both the face and the voice.",
}
QUESTION = "{} Answer with one of these words: {}."


@dataclass(frozen=True)
class Clip:
    """A clip of the release. ``votes`` are the raters' most frequent emotions by stimulus, as the
    table writes them, with a colon between tied ones; ``counts`` the numbers of raters."""

    name: str
    votes: Mapping[str, str]
    counts: Mapping[str, Mapping[str, int]]
    group: Mapping[str, str]

    @property
    def actor(self) -> str:
        """The number of the actor."""
        return self.name.split("_")[0]

    @property
    def displayed(self) -> str:
        """The letter of the emotion that the actor was asked for."""
        return self.name.split("_")[2][0]

    @property
    def split(self) -> str:
        """The split, apart by actor (ours: the release has none): actors whose number ends in 0 or
        5 are test, in 1 or 6 validation."""
        return {0: "test", 1: "validation"}.get(int(self.actor) % 5, "train")

    @property
    def agreement(self) -> str:
        """The conflict subset, why the clip is in none, or ``tie`` if raters tied on one of the
        three."""
        if any(":" in vote for vote in self.votes.values()):
            return "tie"
        return slice_of(self.votes["voice"], self.votes["face"], self.votes["perceived"])

    @property
    def conflict(self) -> Conflict | None:
        """The conflict subset, if the clip is in one."""
        return next((name for name in CONFLICTS if name == self.agreement), None)

    def media(self, root: Path, shown: str) -> dict[str, str]:
        """The file of each stream of what is ``shown``: both, voice or face. The voice is read from
        the first file that there is."""
        paths = [f"{folder}/{self.name}{end}" for folder, end in HEARD.items()]
        if shown == "voice":
            return {"audio": next((path for path in paths if (root / path).is_file()), paths[0])}
        streams = ("video", "face") if shown == "face" else ("video", "audio", "face")
        return dict.fromkeys(streams, paths[0])


def rows(
    root: Path, *, split: str = "all", label: str = "perceived", labels: str = LABELS
) -> Iterator[dict[str, Any]]:
    """One row per clip. ``split``: all, train, validation or test. ``labels``: the label set of the
    rows; clips without a label in it are left out."""
    need_option("split", split, SPLITS)
    need_option("label", label, ("perceived", "displayed", "voice", "face"))
    emotions = codes(labels)
    for clip in clips(root):
        emotion = emotions.get(clip.displayed if label == "displayed" else clip.votes[label])
        if split not in ("all", clip.split) or emotion is None:
            continue
        shown = label if label in ASKED else "both"
        heard = clip.media(root, "voice")
        if label == "displayed" and not heard["audio"].endswith(".flv"):
            shown = "voice"
        media = heard if shown == "voice" else clip.media(root, shown)
        names = ", ".join(emotion_set(labels).names)
        row: dict[str, Any] = {
            "sample_id": f"crema_d-{clip.name}",
            "prompt": "".join(f"<{one}>" for one in media) + QUESTION.format(ASKED[shown], names),
            "completion": f"<answer>{emotion}</answer>",
            **media,
            "label": emotion,
            "modality_labels": modality_labels(clip, emotions),
            "group": clip.group,
        }
        if clip.conflict is not None and label in ("perceived", "displayed"):
            row["conflict"] = clip.conflict
        yield row


def codes(labels: str = LABELS) -> dict[str, str]:
    """The letter of each emotion in votes to its label in a set."""
    found = mapping(LABELS, labels).by_code
    return {code: label for code, label in found.items() if len(code) == 1}


def modality_labels(clip: Clip, emotions: Mapping[str, str]) -> dict[str, str]:
    """The labels of voice and face, where raters did not tie."""
    sides = {"audio": clip.votes["voice"], "video": clip.votes["face"]}
    return {side: emotions[vote] for side, vote in sides.items() if vote in emotions}


def counts(root: Path) -> dict[str, int]:
    """The number of clips, and of those in each subset, by the tables alone."""
    found = Counter(clip.agreement for clip in clips(root))
    return {"clips": found.total(), **dict(found.most_common())}


def clips(root: Path) -> Iterator[Clip]:
    """All clips, in the order of the table."""
    people = {row["ActorID"]: row for row in _table(root / "VideoDemographics.csv", optional=True)}
    raters = _raters(root / "tabulatedVotes.csv")
    for row in _table(root / "summaryTable.csv"):
        name = row["FileName"]
        actor, sentence, _displayed, _level = name.split("_")
        group = {"speaker": actor, "sentence": sentence}
        for key, column in {"gender": "Sex", "race": "Race", "ethnicity": "Ethnicity"}.items():
            if actor in people:
                group[key] = people[actor][column]
        votes = {shown: row[f"{column}Vote"] for shown, column in STIMULI.items()}
        yield Clip(name, votes, raters.get(name, {}), group)


def _raters(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Clip to stimulus to letter to number of raters. The first digit of a row's number tells the
    stimulus: 1 the voice, 2 the face, 3 both."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in _table(path, optional=True):
        shown = {"1": "voice", "2": "face", "3": "perceived"}.get(row[""][:1])
        if shown is None:
            raise DataError(f"row '{row['']}' must begin with 1, 2 or 3", file=str(path))
        votes = {code: int(row[code]) for code in codes() if int(row[code])}
        found.setdefault(row["fileName"], {})[shown] = votes
    return found


def _table(path: Path, *, optional: bool = False) -> list[dict[str, str]]:
    if not path.exists():
        if optional:
            return []
        raise DataError("is missing; --root must be CREMA-D's folder", file=str(path))
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))
