"""WASSA 2022 and 2023: empathy, distress and emotion of essays about the news.

Licence, source and layout of the folder: ``data/texts/wassa.py``. The metric of the shared task is
the mean of Pearson's r of empathy and of distress, and macro-F1 of the emotions. Its script rounds
each r to 4 digits before it takes the mean; the files of predictions that it reads have no gaps, so
its reading here leaves answers out that cannot be read. Ours counts such an answer as the end of
the scale that is farther from the truth, and as naming no emotion.

    mmemo eval eval/texts/wassa.py --data WASSA --model MODEL --option year=2022
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.answers.kinds import Numbers, Several
from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer, use
from mmemo.evaluation.scorers.numbers import numbers, pearson
from mmemo.evaluation.task import Task
from mmemo.statistics import Floats

ADAPTER = "data/texts/wassa.py"
SCALES = ("empathy", "distress")
EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise", "hope")


def mean_pearson(unreadable: Any = "farthest") -> Scorer:
    """The mean of Pearson's r of empathy and of distress, over sums (..., 2, 8)."""
    both = [numbers(of=one, unreadable=unreadable, low=1, high=7) for one in SCALES]

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        (empathy, scored), (distress, other) = (one.values(rows) for one in both)
        return np.stack([empathy, distress], 1), scored & other

    return Scorer(values, {"mean_pearson": Metric(lambda s: pearson(s).mean(-1), limits=(-1, 1))})


def official(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """The script's Pearson's r of each scale and their mean, of readable answers."""
    sums, _ = mean_pearson("left_out").values([dict(row) for row in rows])
    found = [round(float(one), 4) for one in pearson(sums.sum(0))]
    return {**dict(zip(SCALES, found, strict=True)), "mean": sum(found) / 2}


TASKS = {
    "empathy": Task(
        answers=Numbers(1, 7, names=SCALES),
        scorers=(
            use("eval/texts/wassa.py:mean_pearson"),
            *(use("numbers", of=one, unreadable="farthest", low=1, high=7) for one in SCALES),
        ),
        official=official,
        slices=("gender",),
    ),
    "emotion": Task(
        answers=Several(LabelSet(EMOTIONS)),
        scorers=(use("several", labels=EMOTIONS, per_label=True),),
        slices=("gender",),
    ),
}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
