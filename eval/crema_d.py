"""CREMA-D as a conflict benchmark: what raters perceived in the voice, in the face, and in both.

7,442 acted clips (Cao et al., IEEE T-AFFC 2014; Open Database License), each rated three times by
about ten people; ``data/crema_d.py`` says where to get them and how the folder looks. 1,400 clips
have a tie in one of the three; of the others, the three agree on 3,034, both goes with the face on
1,887 (video-aligned) and with the voice on 548 (audio-aligned), is neither although voice and face
agree on 214, and all differ on 359; ``--dry-run`` counts them, even without the clips.

Tasks: ``emotion`` asks about the whole clip, ``voice`` about the sound alone, and ``face`` about
the picture; each is scored by accuracy and against the votes. ``votes`` asks for the share of each
emotion, of clips with ties too. ``ask=emotion,votes`` chooses; ``split`` as in the adapter.

    mmemo eval eval/crema_d.py --model MODEL --data CREMA-D --option split=test
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.answers.kinds import Distribution
from mmemo.answers.parsing import label_set
from mmemo.data.adapter import Excluded, need_option
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "votes")
WORDS = " Answer with one of these words: {labels}."
SHARES = (
    " Others do not all answer alike. What share of them answers anger, disgust, fear, happiness, "
    "neutral and sadness? Answer as: anger 10%, disgust 0%, and so on."
)
VOTES = (use("votes", labels="crema_d"),)
release = content.load_module("data/crema_d.py")
asked, counts = release.ASKED, release.counts
TASKS = {
    "emotion": Task(labels="crema_d", question=asked["both"] + WORDS, scorers=VOTES),
    "voice": Task(labels="crema_d", question=asked["voice"] + WORDS, scorers=VOTES),
    "face": Task(labels="crema_d", question=asked["face"] + WORDS, scorers=VOTES),
    "votes": Task(
        answers=Distribution(label_set("crema_d")), question=asked["both"] + SHARES, scorers=VOTES
    ),
}


def rows(
    root: Path, *, split: str = "all", ask: str = "emotion,voice,face"
) -> Iterator[dict[str, Any] | Excluded]:
    """The questions about each clip; see above for the options."""
    need_option("split", split, release.SPLITS)
    for name in (wanted := [name.strip() for name in ask.split(",")]):
        need_option("ask", name, tuple(TASKS))
    emotions = release.codes()
    for clip in (clip for clip in release.clips(root) if split in ("all", clip.split)):
        for task in wanted:
            shown = task if task in ("voice", "face") else "perceived"
            media = clip.media(root, shown)
            vote, raters = clip.votes[shown], clip.counts.get(shown, {})
            votes = {emotions[code]: number for code, number in raters.items()}
            name = f"{clip.name}/{task}"
            row: dict[str, Any] = {"sample_id": name, "task": task, "votes": votes, **media}
            row["prompt"] = "".join(f"<{one}>" for one in media)
            row["group"] = {**clip.group, "agreement": clip.agreement}
            if task == "emotion":
                row["modality_labels"] = release.modality_labels(clip, emotions)
                row |= {"conflict": clip.conflict} if clip.conflict else {}
            if task == "votes":
                yield {**row, "gold": votes} if votes else Excluded(name, "no votes")
            elif vote not in emotions:
                yield Excluded(name, f"tie on the {task}", vote, expected=True)
            else:
                yield {**row, "label": emotions[vote]}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
