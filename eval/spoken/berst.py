"""BERSt: emotion in spoken, raised and shouted nonsense phrases, near and far from the phone.

532 test clips of 98 actors' 4,526, CC BY 4.0; ``data/spoken/berst.py`` says where to get them and
how the folder looks. UAR and accuracy, over all clips and by shout level, distance and obstruction.
The right answer is the emotion that the actor was asked for and not what listeners heard, so 100 %
is no ceiling that a listener could reach. With ``--option ask=both`` the words are asked for as
well, and scored by their word error rate (needs ``pip install jiwer``).

    mmemo eval eval/spoken/berst.py --data BERSt --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Text
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/spoken/berst.py"
OPTIONS = {"split": "test"}
COLUMNS = ("task", "gold")
STRATA = ("shout", "distance", "obstructed", "gender")
TASKS = {
    "emotion": Task(
        labels="berst",
        question="Which emotion does the speaker express? Answer with one of: {labels}.",
        paraphrases=("How does the speaker feel? Choose one of: {labels}.",),
        slices=STRATA,
    ),
    "transcript": Task(
        answers=Text(refusals=False),
        scorers=(use("eval/spoken/wer.py:wer"),),
        slices=("shout", "distance"),
    ),
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
