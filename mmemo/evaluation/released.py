"""Readings of answers as released scorers of emotion recognition take them, for ``Task.official``.

They repeat their defects, so that a number can be set beside a paper's; our own numbers stand
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, recall_score

from mmemo.answers.parsing import answer_text

Rows = Sequence[Mapping[str, Any]]


def exact_match(rename: Mapping[str, str] | None = None) -> Callable[[Rows], dict[str, float]]:
    """WAR and UAR as HumanOmni's and R1-Omni's ``eval_mafw_dfew.py`` computes them, of 1.

    The whole answer must equal the label, in its case and up to its last dot; only spaces in front
    are forgiven. So "Happy" or "happy." for happy is wrong there. UAR is the mean recall over the
    classes that occur in the truth. Their script reads answers without tags; we take the text
    inside ``<answer>`` where there is one, as R1-Omni's answers have it.

    Args:
        rename: labels of the truth that the script writes in another way.
    """
    names = rename or {}

    def official(rows: Rows) -> dict[str, float]:
        truth = [names.get(row["truth"], row["truth"]) for row in rows]
        given = [answer_text(row["raw"]).lstrip() for row in rows]
        classes = np.unique(truth)
        recalls = recall_score(truth, given, average=None, labels=classes, zero_division=0)
        shares = np.array([truth.count(name) for name in classes]) / len(truth)
        return {"war": float(np.sum(shares * recalls)), "uar": float(np.mean(recalls))}

    return official


def weighted_f1(rows: Rows) -> dict[str, float]:
    """Weighted F1 (WAF) and accuracy by scikit-learn, as MELD, MERBench and the MER challenges
    compute them. Those score classifiers, which always name a class: an answer that names none is
    here a class of its own, so it stays and is wrong."""
    truth = [str(row["truth"]) for row in rows]
    given = [str(row["answer"]) if row["status"] == "ok" else "(none)" for row in rows]
    waf = f1_score(truth, given, average="weighted", zero_division=0)
    return {"waf": float(waf), "acc": float(accuracy_score(truth, given))}
