"""RAVDESS: eight acted emotions of 24 speakers (Livingstone and Russo, PLoS ONE 2018).

CC BY-NC-SA 4.0, from https://zenodo.org/records/1188976; ``data/ravdess.py`` shows the folder. All
1,440 speech clips are asked, as R1-Omni does; ``--option split=test --option fold=1`` asks one of
six folds by actor, and ``--option fold=all`` all clips, with the mean of the folds in ``official``.
WAR is the headline, UAR stands beside it. ``official`` is R1-Omni's scorer, which writes fearful as
fear and surprised as surprise, keeps calm, and wants the label to the letter.

    mmemo eval eval/ravdess.py --data RAVDESS --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import exact_match
from mmemo.evaluation.task import Task

ADAPTER = "data/ravdess.py"
TASKS = {
    "emotion": Task(
        labels="ravdess",
        question="Which emotion does the speaker express? One of {labels}.",
        paraphrases=(
            "Name the speaker's emotion. Choose from {labels}.",
            "How does the speaker sound and look? Answer with one word of {labels}.",
        ),
        official=exact_match({"fearful": "fear", "surprised": "surprise"}),
        slices=("gender", "intensity"),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
