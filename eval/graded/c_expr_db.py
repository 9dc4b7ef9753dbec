"""C-EXPR-DB: seven compound expressions, and other, in segments of 56 videos in the wild.

For research on request (Kollias, CVPR 2023); ``data/graded/c_expr_db.py`` says where to get it and
how the folder looks. Weighted F1 is the number of the literature; accuracy (WAR) and UAR stand
beside it. ``official`` is scikit-learn's weighted F1 over the answers that name a class, because
scorers of classifiers know no others. With ``--option ask=both`` the two basic emotions of each
compound are asked for as well, in any order.

    mmemo eval eval/graded/c_expr_db.py --data C-EXPR-DB --model MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.metrics import f1_score

from mmemo import content
from mmemo.answers.kinds import Several
from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/graded/c_expr_db.py"
COLUMNS = ("task", "gold")
CLASSES: dict[str, list[str]] = content.load(f"{ADAPTER}:CLASSES")
BASIC: dict[str, tuple[str, ...]] = content.load(f"{ADAPTER}:BASIC")


def official(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Weighted F1 of the answers that name a class, and the share that they are."""
    named = [(row["truth"], row["answer"]) for row in rows if row["status"] == "ok"]
    found = {"answered": len(named) / len(rows)}
    if named:
        truth, given = zip(*named, strict=True)
        found["weighted_f1"] = float(f1_score(truth, given, average="weighted"))
    return found


TASKS = {
    "compound": Task(
        labels=LabelSet(tuple(CLASSES), CLASSES),
        question="Which compound expression does the face show? Answer with one of: {labels}.",
        paraphrases=("Two emotions mix in this face. Name the mixture, one of: {labels}.",),
        official=official,
    ),
    "parts": Task(
        answers=Several(LabelSet(tuple(BASIC), BASIC)),
        question="Which two emotions does the face show at once? Two of: " + ", ".join(BASIC),
        scorers=(use("several", labels=list(BASIC)),),
    ),
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
