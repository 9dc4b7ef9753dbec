"""EmoVoice-DB: does generated speech express the emotion that it was asked for?

Speech that any system made of the lines of ``test.jsonl`` lies in a folder beside the release, and
any model of the suite listens to it; ``data/spoken/emovoice.py`` says where to get the release
(MIT) and how the folders look. ``--option generated=target`` scores the release's own speech, which
bounds what this listener can recognise.

UAR is the recall averaged over five buckets: angry, happy, neutral, sad, and other for the other
three emotions. ``official`` takes an answer that cannot be read for other, as a classifier always
says something. ``similarity`` compares the generated voice with the release's by the model's own
audio encoder (the paper: by emotion2vec), and ``similarity_to_other`` with one of another emotion.

    mmemo eval eval/spoken/emovoice_tts.py --data DB --model M --option generated=generated/A
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.metrics import recall_score

from mmemo import content
from mmemo.answers.label_sets import emotion_set
from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.measured import voice_similarity
from mmemo.evaluation.task import Task

ADAPTER = "data/spoken/emovoice.py"
OPTIONS = {"split": "test", "generated": "generated"}
COLUMNS = ("gold", "target", "other")
EMOTIONS = emotion_set("emovoice").labels
BUCKETS: tuple[str, ...] = content.load(f"{ADAPTER}:BUCKETS")
OTHER = [word for one in EMOTIONS if one.name not in BUCKETS for word in one.words]
FORMS = {one.name: one.words for one in EMOTIONS if one.name in BUCKETS} | {"other": OTHER}
WORDS = ", ".join(one.name for one in EMOTIONS)


def official(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Recall averaged over the buckets that occur; an answer that cannot be read is other."""
    truth = [row["truth"] for row in rows]
    given = [row["answer"] or "other" for row in rows]
    recall = recall_score(truth, given, labels=sorted(set(truth)), average="macro")
    return {"recall": float(recall)}


TASKS = {
    "emotion": Task(
        labels=LabelSet(BUCKETS, FORMS),
        question=f"Which emotion does the speaker express? Answer with one of: {WORDS}.",
        paraphrases=(f"How does the speaker feel? Choose one of: {WORDS}.",),
        scorers=(use("measured", names=["similarity", "similarity_to_other"]),),
        official=official,
        slices=("emotion", "voice"),
        measure=voice_similarity,
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
