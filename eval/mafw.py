"""MAFW: eleven emotions of faces in films and shows, five folds (Liu et al., ACM MM 2022).

For research on request, from https://mafw-database.github.io/MAFW; ``data/mafw.py`` shows the
folder. The test part of fold 1 (1,839 clips) is asked; papers report the mean of the five folds,
which ``--option fold=all`` gives in ``official`` (9,172 clips). The few clips without sound are
asked by their picture alone. WAR is the headline, UAR stands beside it. ``official`` is R1-Omni's
scorer, where the answer must be the label to the letter.

    mmemo eval eval/mafw.py --data MAFW --model MODEL --option fold=1
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import exact_match
from mmemo.evaluation.task import Task

ADAPTER = "data/mafw.py"
OPTIONS = {"split": "test", "fold": "1"}
TASKS = {
    "emotion": Task(
        labels="mafw",
        question="Which emotion does the person show most clearly? One of {labels}.",
        paraphrases=(
            "Name the emotion of the person in the clip. Choose from {labels}.",
            "How does this person feel? Answer with one word of {labels}.",
        ),
        official=exact_match(),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
