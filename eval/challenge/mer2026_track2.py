"""MER2026, track 2: all emotions of a person, in any words (arXiv 2604.19417).

CC BY-NC 4.0, gated, from https://huggingface.co/datasets/MERChallenge/MER2026; ``data/mer2026.py``
shows the folder. The labels of the test part are not released: the 1,532 clips that people labelled
are asked (``--option split=captions`` asks 31,327 with labels of models), so a model that was
trained on them must not be. The score is MER2025's, the mean of the F on level 1 and level 2 of
five emotion wheels, as the released scorer computes it (``official_track2``) and corrected. It
needs AffectGPT's ``emotion_wheel`` folder, which the environment variable ``MMEMO_EMOTION_WHEEL``
names.

    mmemo eval eval/challenge/mer2026_track2.py --data MER2026 --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Text
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/mer2026.py"
OPTIONS = {"track": "2"}
TASKS = {
    "emotions": Task(
        answers=Text(),
        scorers=(use("words", mode="official"), use("words", mode="corrected")),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
