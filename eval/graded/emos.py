"""EmoS: seven emotions and 28 fine ones, against the votes of three raters.

About 5,000 Chinese and 5,000 English clips with picture, sound and words;
``data/graded/emos.py`` says where to get them, how the folder looks, and which columns are assumed.
``basic7`` is compared with the votes: KL, macro-F1 above 1/C, and accuracy and UAR under the
majority and plurality rules, which leave ties out. In WAR and the confusion matrix a tie counts as
the first of its labels, so read these where ``agreement`` is not ``tie``. ``goemotions`` takes any
number of labels; right are those of at least half of the raters. No scorer was released.

    mmemo eval eval/graded/emos.py --data EmoS --model MODEL --option language=en
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Several
from mmemo.answers.label_sets import label_set
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/graded/emos.py"
COLUMNS = ("task", "gold", "votes")
FINE = label_set("goemotions")
TASKS = {
    "basic7": Task(
        labels="emos",
        question="{transcript}Which emotion does the person express? Answer with one of: {labels}.",
        paraphrases=("{transcript}What does the person feel? Choose one of: {labels}.",),
        scorers=(use("votes", labels="emos"),),
        slices=("agreement", "language"),
    ),
    "goemotions": Task(
        answers=Several(FINE),
        question=(
            "{transcript}Which emotions does the person express? Answer with one or more of: "
            + ", ".join(FINE.labels)
            + "."
        ),
        scorers=(use("several", labels="goemotions"),),
        slices=("language",),
    ),
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
