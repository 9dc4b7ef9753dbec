"""KorFinASC: sentiment towards an aspect of Korean financial news, with and without its name.

Licence, source, layout and the option ``mask``: ``data/texts/korfinasc.py``. Metrics: accuracy and
macro-F1, over all answers, and accuracy for texts with a single entity and with several. The script
of the paper averages both over batches, so that macro-F1 depends on the size and order of the
batches; answers alone cannot repeat that, and it is not done here. The difference between the runs
with ``mask=none``, ``target`` and ``other`` says how much a model relies on the name: compare them
with ``mmemo compare``.

    mmemo eval eval/texts/korfinasc.py --data KorFinASC --model MODEL --option mask=target
"""

from __future__ import annotations

import sys

from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.task import Task

ADAPTER = "data/texts/korfinasc.py"
LABELS = LabelSet(
    ("positive", "negative", "neutral"),
    {"positive": ("긍정", "긍정적"), "negative": ("부정", "부정적"), "neutral": ("중립", "중립적")},
)
TASKS = {"sentiment": Task(labels=LABELS, slices=("entities", "verbatim"))}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
