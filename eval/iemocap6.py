"""IEMOCAP, six classes: excitement apart from happiness, and frustration (Busso et al., 2008).

For research on request, from https://sail.usc.edu/iemocap; ``data/iemocap.py`` shows the folder.
Session 5 is asked; ``--option session=1`` ... asks another of the five folds. The words are quoted
in the question, and both people are in the picture. WAR is papers' WA, UAR their UA; WAF is in
``official``.

    mmemo eval eval/iemocap6.py --data IEMOCAP_full_release --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

ADAPTER = "data/iemocap.py"
OPTIONS = {"split": "test"}
TASKS = {
    "emotion": Task(
        labels="iemocap6",
        question="{transcript}Which emotion does the speaker express? One of {labels}.",
        paraphrases=(
            "{transcript}Name the speaker's emotion. Choose from {labels}.",
            "{transcript}How does the speaker feel? Answer with one word of {labels}.",
        ),
        official=weighted_f1,
        slices=("gender",),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
