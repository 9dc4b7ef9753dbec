"""MER2024: six emotions in Chinese films and shows (Lian et al., MRAC 2024).

For research under an agreement, from https://huggingface.co/datasets/MERChallenge/MER2024;
``data/mer2024.py`` shows the folder. test1 is asked (1,169 clips); ``--option split=test2`` asks
the clips with noise, ``split=semi`` both. Subtitles are quoted where the folder has them. The
challenge ranks by weighted F1, in ``official``.

    mmemo eval eval/mer2024.py --data MER2024 --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

ADAPTER = "data/mer2024.py"
OPTIONS = {"split": "test1"}
TASKS = {
    "emotion": Task(
        labels="mer2024",
        question="{transcript}Which emotion does the person express? One of {labels}.",
        paraphrases=(
            "{transcript}Name the person's emotion. Choose from {labels}.",
            "{transcript}How does the person feel? Answer with one word of {labels}.",
        ),
        official=weighted_f1,
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
