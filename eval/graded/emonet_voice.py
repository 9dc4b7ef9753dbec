"""EmoNet-Voice Bench: the strength of one of 40 emotions in a voice, 0 to 10, against experts.

12,600 synthetic clips, CC BY 4.0; ``data/graded/emonet_voice.py`` says where to get them and how
the folder looks. CCC, Pearson, Spearman, MAE and RMSE are given over all clips, by emotion, and on
the clips whose raters all heard the emotion (``heard``: ``all``).

An answer without a number counts as the end of the scale that is farther from the truth.
``official`` drops it and says in ``answered`` which share is left: no scorer was released, and
numbers on this scale are reported so. ``--option ask=both`` also asks for the three most likely of
the 40 emotions where all raters heard it: accuracy at 1, 2 and 3, ours.

    mmemo eval eval/graded/emonet_voice.py --data EMONET --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Numbers, Ranked
from mmemo.answers.label_sets import label_set
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.numbers import answered
from mmemo.evaluation.task import Task

ADAPTER = "data/graded/emonet_voice.py"
COLUMNS = ("task", "gold")
TASKS = {
    "intensity": Task(
        answers=Numbers(0, 10),
        scorers=(use("numbers", low=0, high=10, unreadable="farthest"),),
        official=answered,
        slices=("heard", "emotion"),
    ),
    "emotion": Task(answers=Ranked(label_set("emonet"), 3), scorers=(use("ranked"),)),
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
