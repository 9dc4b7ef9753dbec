"""CMU-MOSI: how positive is what a person says, from -3 to 3 (Zadeh et al., 2016)?

For research, from https://github.com/thuiar/MMSA; ``data/sentiment.py`` shows the folder. The test
part is asked (686 clips), with the words quoted in the question. Accuracies on classes, F1, MAE and
Pearson's r are MMSA's, each with an interval; an answer without a number counts as the end of the
scale that is farther from the truth. ``official`` has MMSA's own names and rounding and leaves such
answers out.

    mmemo eval eval/sentiment/mosi.py --data MOSI --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Numbers
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.sentiment import mmsa_mosi
from mmemo.evaluation.task import Task

ADAPTER = "data/sentiment.py"
OPTIONS = {"set": "mosi", "split": "test"}
SCALE = "from -3 (very negative) to 3 (very positive)"
TASKS = {
    "sentiment": Task(
        answers=Numbers(-3, 3),
        question="{transcript}How negative or positive is what the person expresses? Answer with a "
        f"number {SCALE}.",
        paraphrases=(
            f"{{transcript}}Rate the person's sentiment with one number {SCALE}.",
            f"{{transcript}}How does the person feel about it? Give one number {SCALE}.",
        ),
        scorers=(use("sentiment", scale="mosi"),),
        official=mmsa_mosi,
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
