"""MER2026, track 1: six emotions of a listener in a dialogue (arXiv 2604.19417).

CC BY-NC 4.0, gated, from https://huggingface.co/datasets/MERChallenge/MER2026; ``data/mer2026.py``
shows the folder. The labels of the test part are not released: the training part is asked (9,395
clips, where the emotion is the person's own), so a model that was trained on it must not be. The
challenge ranks by weighted F1, in ``official``. To submit, ask the candidates, and write their
answers; an answer that names no emotion becomes ``--fallback``:

    mmemo eval eval/challenge/mer2026_track1.py --data MER2026 --model MODEL
    mmemo eval eval/challenge/mer2026_track1.py --data MER2026 --model MODEL \
        --option split=candidates --output-dir runs/candidates
    python eval/challenge/mer2026_submit.py --track 1 --run runs/candidates --output track1.csv
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

ADAPTER = "data/mer2026.py"
OPTIONS = {"track": "1"}
TASKS = {"emotion": Task(labels="mer2023", official=weighted_f1)}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
