"""Beyond Hate: memes that are hateful, uncivil or intolerant, and what a model misses of them.

Licence, source, layout and how memes become clips: ``data/texts/beyond_hate.py``. Metrics: accuracy
and F1 of the question about hate, F1 of both kinds, and FNR - FPR, the share of bad memes that pass
minus the share of others that are called bad; above 0, a model says too little. An answer that
cannot be read calls nothing bad.

    mmemo eval eval/texts/beyond_hate.py --data BeyondHate --model MODEL --option picture=none
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Several
from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/texts/beyond_hate.py"
KINDS = LabelSet(
    ("uncivil", "intolerant"), {"uncivil": ("incivility",), "intolerant": ("intolerance",)}
)
TASKS = {
    "hateful": Task(labels="yes_no", scorers=(use("several", labels=["yes"], none="no"),)),
    "kinds": Task(
        answers=Several(KINDS), scorers=(use("several", labels=list(KINDS.labels), per_label=True),)
    ),
}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
