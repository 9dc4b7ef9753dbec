"""EMO-DB: seven acted emotions of ten German speakers, sound only (Burkhardt et al., 2005).

Free for research, from http://emodb.bilderbar.info; ``data/emodb.py`` shows the folder. All 535
utterances are asked; ``--option split=test`` asks two held-out speakers. Every sentence is spoken
in every emotion, so an answer from the words is at chance. UAR is the number of papers. One public
copy is cut to 2 s: say so beside a number made on it.

    mmemo eval eval/emodb.py --data EMODB --model MODEL
"""

from __future__ import annotations

import sys

from mmemo.evaluation.scorers.released import weighted_f1
from mmemo.evaluation.task import Task

ADAPTER = "data/emodb.py"
TASKS = {
    "emotion": Task(
        labels="emodb",
        question="Which emotion does the speaker express? One of {labels}.",
        paraphrases=(
            "Name the speaker's emotion. Choose from {labels}.",
            "How does the voice sound? Answer with one word of {labels}.",
        ),
        official=weighted_f1,
        slices=("gender", "sentence"),
    )
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
