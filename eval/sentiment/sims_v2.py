"""CH-SIMS v2: how positive is what a person says, from -1 to 1 (Liu et al., ICMI 2022)?

For research, from https://github.com/thuiar/ch-sims-v2; ``data/sentiment.py`` shows the folder. The
test part is asked (1,034 clips), with the words quoted in the question. Accuracies on classes, F1,
MAE and Pearson's r are MMSA's, each with an interval; an answer without a number counts as the end
of the scale that is farther from the truth. ``official`` has MMSA's own names and leaves such
answers out.

    mmemo eval eval/sentiment/sims_v2.py --data SIMSv2 --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Numbers
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.sentiment import mmsa_sims
from mmemo.evaluation.task import Task

ADAPTER = "data/sentiment.py"
OPTIONS = {"set": "sims_v2", "split": "test"}
SCALE = "from -1 (very negative) to 1 (very positive)"
TASKS = {
    "sentiment": Task(
        answers=Numbers(-1, 1),
        question="{transcript}How negative or positive is what the person expresses? Answer with a "
        f"number {SCALE}.",
        paraphrases=(
            f"{{transcript}}Rate the person's sentiment with one number {SCALE}.",
            f"{{transcript}}How does the person feel about it? Give one number {SCALE}.",
        ),
        scorers=(use("sentiment", scale="sims"),),
        official=mmsa_sims,
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
