"""MER2023: six emotions and valence in Chinese films and shows (Lian et al., ACM MM 2023).

For research under an agreement, from http://merchallenge.cn; ``data/mer2023.py`` shows the folder.
test1 is asked (411 clips); ``--option split=test2`` asks the clips with noise, ``split=test3`` the
third part, which has no valence. Subtitles are quoted where the folder has them. The challenge
ranks by weighted F1, in ``official``, and its first track by weighted F1 - 0.25 MSE of valence,
which ``mmemo.evaluation.scorers.released.mer_multi`` computes from the rows of
``predictions.jsonl``. The scale of valence, -5 to 5, is assumed.

    mmemo eval eval/mer2023.py --data MER2023 --model MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.answers.kinds import Numbers
from mmemo.data.adapter import Excluded
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold")
LABELS = "mer2023"
ADAPTED = content.load_module("data/mer2023.py")
PUBLISHED = {
    f"split={part}": {"": n} for part, n in (("test1", 822), ("test2", 824), ("test3", 834))
}
TASKS = {
    "emotion": Task(
        labels="mer2023",
        question="{transcript}Which emotion does the person express? One of {labels}.",
        paraphrases=(
            "{transcript}Name the person's emotion. Choose from {labels}.",
            "{transcript}How does the person feel? Answer with one word of {labels}.",
        ),
        official=weighted_f1,
    ),
    "valence": Task(
        answers=Numbers(-5, 5),
        question="{transcript}How unpleasant or pleasant is the person's emotion? Answer with a "
        "number from -5 (very unpleasant) to 5 (very pleasant).",
        scorers=(use("numbers", unreadable="farthest", low=-5, high=5),),
    ),
}


def rows(root: Path, *, split: str = "test1") -> Iterator[dict[str, Any] | Excluded]:
    """Two questions about each clip; one where its valence is not known."""
    for row in ADAPTED.rows(root, split=split):
        if isinstance(row, Excluded):
            yield row
            continue
        valence = row.pop("valence", None)
        yield row
        if valence is not None:
            name = f"{row['sample_id']}-valence"
            own = {key: value for key, value in row.items() if key not in ("label", "completion")}
            yield {**own, "sample_id": name, "task": "valence", "gold": valence}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
