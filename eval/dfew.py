"""DFEW: seven emotions of faces in films, five folds (Jiang et al., ACM MM 2020).

For research on request, from https://dfew-dataset.github.io; ``data/dfew.py`` shows the folder. The
test part of fold 1 (2,341 clips) is asked; papers report the mean of the five folds, which
``--option fold=all`` gives in ``official`` (11,697 clips). WAR is the headline, UAR stands beside
it. ``official`` is R1-Omni's scorer, where the answer must be the label to the letter. HumanOmni
and R1-Omni were trained on DFEW: do not compare a zero-shot model with them.

    mmemo eval eval/dfew.py --data DFEW --model MODEL --option fold=1
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import exact_match
from mmemo.evaluation.task import Task

ADAPTER = "data/dfew.py"
OPTIONS = {"split": "test", "fold": "1"}
TASKS = {
    "emotion": Task(
        labels="dfew",
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
