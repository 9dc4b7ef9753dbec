"""KPoEM: which of 44 emotions readers feel at a line of a Korean poem, or at a whole one.

Licence, source and layout of the folder: ``data/texts/kpoem.py``. Metrics are the paper's: F1 micro
and macro, and Matthews' correlation as the mean over labels, all as scikit-learn computes them. The
release thresholds a classifier's outputs at 0.3; a model that writes names its labels instead. An
answer that cannot be read names none. Intervals are over poems, since lines of one poem are alike.

    mmemo eval eval/texts/kpoem.py --data KPoEM --model MODEL --option split=test
"""

from __future__ import annotations

import sys

from mmemo import content
from mmemo.answers.kinds import Several
from mmemo.answers.listing import slashed
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/texts/kpoem.py"
LABELS: tuple[str, ...] = content.load(f"{ADAPTER}:LABELS_44")
TASKS = {
    "emotions": Task(
        answers=Several(slashed(LABELS)),
        scorers=(use("several", labels=LABELS),),
        slices=("level", "poet"),
    )
}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
