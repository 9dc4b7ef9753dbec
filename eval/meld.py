"""MELD: seven emotions in the series Friends (Poria et al., ACL 2019).

GPL-3.0, from https://github.com/declare-lab/MELD; ``data/meld.py`` shows the folder. The test part
is asked without its one bad clip (2,609 of 2,610; ``--option bad=keep`` names it as unreadable).
The words are quoted in the question. WAF is the number of papers, in ``official`` by scikit-learn.

    mmemo eval eval/meld.py --data MELD.Raw --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

ADAPTER = "data/meld.py"
OPTIONS = {"split": "test"}
TASKS = {
    "emotion": Task(
        labels="meld",
        question="{transcript}Which emotion does the speaker express? One of {labels}.",
        paraphrases=(
            "{transcript}Name the speaker's emotion. Choose from {labels}.",
            "{transcript}How does the speaker feel? Answer with one word of {labels}.",
        ),
        official=weighted_f1,
        slices=("sentiment",),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
