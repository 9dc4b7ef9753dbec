"""Emotion similarity: pays for the right label, and early in training also for neighbouring ones.

Range: 0 to 1. None: the row has no label, or one outside the classes.
Source: EMO-RL (EMNLP Findings 2025). With the angle θ between two emotions on Plutchik's wheel and
S = (cos θ + 1) / 2, the reward is 1 for the right label, α·S where S > 0.7 (neighbours on the
wheel), else 0. α falls from 1 to 0 over training; here, linearly in the steps.

Two changes are ours. The right label is recognised first; taken literally, S of neutral with
neutral is 1/2, so that a right "neutral" would earn 0. And an emotion without a position on the
wheel is only ever right or wrong. The positions are those of Plutchik's eight emotions; we placed
contempt between anger and disgust, whose dyad it is, and worry and anxiety at fear, as its milder
degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import base_form, labels_for, read_label

DEGREES: Mapping[str, float] = {
    "happy": 0,
    "trust": 45,
    "fear": 90,
    "worried": 90,
    "anxious": 90,
    "surprise": 135,
    "sad": 180,
    "disgust": 225,
    "contempt": 247.5,
    "angry": 270,
    "anticipation": 315,
}


def similarity(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    label: Sequence[str | None],
    classes: Sequence[str] | None = None,
    trainer_state: Any = None,
    alpha: float | None = None,
    threshold: float = 0.7,
    max_words: int = 8,
    need_tag: bool = True,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row has no label among the classes.

    Args:
        label: the true labels.
        classes: the labels that an answer may name; mmemo passes those of the manifests. None
            allows every emotion whose forms mmemo knows and the row's own label.
        trainer_state: its ``global_step`` and ``max_steps`` determine α.
        alpha: fixed α; None decreases it from 1 to 0 over the run.
        threshold: S above which a wrong label earns credit.
        max_words: maximum length of an answer in words; a longer one scores 0.
        need_tag: whether the answer must be in ``<answer>`` tags.
    """
    credit = _alpha(trainer_state) if alpha is None else alpha
    scores: list[float | None] = []
    for completion, truth in zip(completions, label, strict=True):
        if truth is None:
            scores.append(None)
            continue
        labels, right = labels_for(truth, None if classes is None else tuple(classes))
        if right is None:
            scores.append(None)
            continue
        named = read_label(completion_text(completion), labels, max_words, need_tag)
        scores.append(_score(named, right, credit, threshold))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's label in tags; None without a label."""
    return None if row.get("label") is None else f"<think></think><answer>{row['label']}</answer>"


def _score(named: str | None, right: str, credit: float, threshold: float) -> float:
    if named is None:
        return 0.0
    if named == right:
        return 1.0
    # A label set writes its labels in any form: the wheel has their base forms.
    one, other = base_form(named), base_form(right)
    if one not in DEGREES or other not in DEGREES:
        return 0.0
    angle = math.radians(DEGREES[one] - DEGREES[other])
    near = (math.cos(angle) + 1) / 2
    return credit * near if near > threshold else 0.0


def _alpha(state: Any) -> float:
    steps = getattr(state, "max_steps", 0) or 0
    return max(0.0, 1 - state.global_step / steps) if steps > 0 else 1.0
