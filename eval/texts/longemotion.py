"""LongEmotion: emotion in long texts, as six tasks.

Licence, source, layout and the options ``task``, ``rag``, ``top`` and ``size`` (prompts of passages
that are retrieved): ``data/texts/longemotion.py``. Metrics: accuracy of classification and
detection, token F1 of answers to questions. Summaries (five parts with three ratings of 1 to 5),
conversations (three ratings of 0 to 5 in each of four stages) and expression (six of 0 to 100) are
judged; without a judge (``benchmark.judge``) only their overlap with a reference is given.

The official readings are in ``mmemo/evaluation/scorers/long_texts.py``. The release runs three
times, adds up the right answers of all, and divides by the number of questions of one, so that
accuracy may pass 100 %; one run is scored here.

    mmemo eval eval/texts/longemotion.py --data LongEmotion --model MODEL --option rag=true
"""

from __future__ import annotations

import sys

from mmemo.answers.kinds import Text
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers import long_texts
from mmemo.evaluation.task import Task

ADAPTER = "data/texts/longemotion.py"
OVERLAP = use("text", metrics=["token_f1", "rouge_l"])
TASKS = {
    "classification": Task(
        labels=long_texts.options, official=long_texts.json_accuracy("Emotion"), slices=("source",)
    ),
    "detection": Task(labels=long_texts.options, official=long_texts.json_accuracy("index")),
    "qa": Task(
        answers=Text(refusals=False),
        scorers=(use("text", metrics=["token_f1", "exact"]),),
        official=long_texts.question_f1,
    ),
    **{
        f"conversation{number}": Task(
            answers=Text(),
            scorers=(*long_texts.judges(long_texts.REPLY, titles, 0, 5), OVERLAP),
            slices=("point",),
        )
        for number, titles in enumerate(long_texts.STAGES, start=1)
    },
    "summary": Task(
        answers=Text(),
        scorers=(*long_texts.judges(long_texts.SUMMARY, long_texts.PARTS, 1, 5), OVERLAP),
    ),
    "expression": Task(
        answers=Text(),
        scorers=long_texts.judges(long_texts.FEELINGS, long_texts.EXPRESSION, 0, 100),
    ),
}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
