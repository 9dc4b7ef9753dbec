"""MER2026, track 3: which of two descriptions of a clip did people prefer (arXiv 2604.19417)?

CC BY-NC 4.0, gated, from https://huggingface.co/datasets/MERChallenge/MER2026; ``data/mer2026.py``
shows the folder. 574 pairs with the majority of three people, or 2,096 of one person each with
``--option split=v2``. Pairs that people found equal are left out of our accuracy and WAF, where an
answer of same, or none, is wrong. ``official`` is the challenge's WAF and accuracy on two and three
classes, where same counts as a1; give ``--option ties=keep`` for its three. A model may favour the
first place: ``--option order=reversed`` asks the other way round. A reward model is tested by
``eval/challenge/mer2026_reward.py``.

    mmemo eval eval/challenge/mer2026_track3.py --data MER2026 --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import preferences
from mmemo.evaluation.task import Task

ADAPTER = "data/mer2026.py"
OPTIONS = {"track": "3"}
TASKS = {"preference": Task(labels=("a1", "a2", "same"), official=preferences)}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
