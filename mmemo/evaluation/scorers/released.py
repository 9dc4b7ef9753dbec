"""Readings of answers as released scorers of emotion recognition take them, for ``Task.official``.

They repeat their defects, so that a number can be set beside a paper's; our own numbers stand
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from mmemo.answers.completion import answer_text, has_answer_tag

Rows = Sequence[Mapping[str, Any]]


def exact_match(rename: Mapping[str, str] | None = None) -> Callable[[Rows], dict[str, float]]:
    """WAR and UAR as HumanOmni's and R1-Omni's ``eval_mafw_dfew.py`` computes them, of 1.

    The whole answer must equal the label, in its case and up to its last dot; only spaces in front
    are forgiven. So "Happy" or "happy." for happy is wrong there. UAR is the mean recall over the
    classes that occur in the truth. Their script reads answers without tags; we take the text
    inside ``<answer>`` where there is one, as R1-Omni's answers have it. Where the rows are of
    several folds, ``_of_folds`` is the mean of the folds' numbers, as papers give it.

    Args:
        rename: labels of the truth that the script writes in another way.
    """
    names = rename or {}

    def of(rows: Rows) -> dict[str, float]:
        truth = [names.get(row["truth"], str(row["truth"])) for row in rows]
        given = [_said(row["raw"]).lstrip() for row in rows]
        right = [one == gold for one, gold in zip(given, truth, strict=True)]
        recalls = [
            np.mean([hit for hit, gold in zip(right, truth, strict=True) if gold == name])
            for name in sorted(set(truth))
        ]
        # Their WAR, the recalls weighted by the classes' shares, is the accuracy.
        return {"war": float(np.mean(right)), "uar": float(np.mean(recalls))}

    def official(rows: Rows) -> dict[str, float]:
        folds = {row.get("group", {}).get("fold") for row in rows}
        if None in folds or len(folds) < 2:  # one fold, or none
            return of(rows)
        own = [[row for row in rows if row["group"]["fold"] == fold] for fold in sorted(folds)]
        parts = [of(one) for one in own]
        means = {f"{key}_of_folds": float(np.mean([one[key] for one in parts])) for key in parts[0]}
        return {**of(rows), **means}

    return official


def weighted_f1(rows: Rows) -> dict[str, float]:
    """Weighted F1 (WAF) and accuracy by scikit-learn, as MELD, MERBench and the MER challenges
    compute them. Those score classifiers, which always name a class: an answer that names none is
    here a class of its own, so it stays and is wrong."""
    truth = [str(row["truth"]) for row in rows]
    given = [str(row["answer"]) if row["status"] == "ok" else "(none)" for row in rows]
    return {"waf": _waf(truth, given), "acc": float(accuracy_score(truth, given))}


def mer_multi(rows: Rows) -> dict[str, float]:
    """MER2023's number for its first track: weighted F1 - 0.25 MSE of valence. ``rows`` are those
    of both tasks, ``emotion`` and ``valence``. Clips without a read valence are not in the MSE, and
    are ``left_out``."""
    emotion = weighted_f1([row for row in rows if row["task"] == "emotion"])["waf"]
    valence = [row for row in rows if row["task"] == "valence"]
    read = [row for row in valence if row["status"] == "ok"]
    found = {"waf": emotion, "left_out": float(len(valence) - len(read))}
    if read:
        error = float(np.mean([(row["truth"] - row["answer"]) ** 2 for row in read]))
        found |= {"mse": error, "combined": emotion - 0.25 * error}
    return found


def preferences(rows: Rows) -> dict[str, float]:
    """WAF and accuracy of MER2026's third track as its ``utils/common.py`` computes them.

    An answer is what it begins with, in any case: a1, a2 or same; or else the first of them that
    occurs in it; or else same. On two classes, pairs that people found equal are left out, and an
    answer of same counts as a1: whoever always says same gets a1's share. On three classes they
    stay. The class names are also found inside words.
    """
    truth = [str(row["truth"]) for row in rows]
    given = [_preferred(_said(row["raw"]).lower()) for row in rows]
    pairs = list(zip(truth, given, strict=True))
    decided = [(gold, "a1" if one == "same" else one) for gold, one in pairs if gold != "same"]
    found: dict[str, float] = {}
    for name, kept in (("two_class", decided), ("three_class", pairs)):
        if kept:
            golds, ones = [gold for gold, _ in kept], [one for _, one in kept]
            found[f"{name}_waf"] = _waf(golds, ones)
            found[f"{name}_acc"] = float(accuracy_score(golds, ones))
    return found


def _said(raw: str) -> str:
    """The text inside ``<answer>``, or all of it to the last space."""
    return answer_text(raw) if has_answer_tag(raw) else raw


def _waf(truth: Sequence[str], given: Sequence[str]) -> float:
    return float(f1_score(truth, given, average="weighted", zero_division=0))  # pyright: ignore


def _preferred(text: str) -> str:
    names = ("a1", "a2", "same")
    begun = next((name for name in names if text.startswith(name)), None)
    places = [(text.find(name), name) for name in names if name in text]
    return begun or (min(places)[1] if places else "same")
