"""Emotion similarity: a near miss earns part of the credit, early in training.

EMO-RL (EMNLP Findings 2025): with the angle θ between two emotions on Plutchik's wheel and
S = (cos θ + 1) / 2, the reward is 1 for the right label, α·S where S > 0.7 (neighbours on the
wheel), else 0; α falls from 1 to 0 over training, here linearly in the steps. Two changes. The
right label is recognised first: taken literally, S of neutral with neutral is 1/2 and a right
"neutral" earns 0. And an emotion without a place on the wheel is only ever right or wrong.

The places are Plutchik's eight; contempt lies between anger and disgust, whose dyad it is, and
worry and anxiety at fear, as its milder degrees. These last are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import labels_for, read_label

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
    trainer_state: Any = None,
    alpha: float | None = None,
    threshold: float = 0.7,
    max_words: int = 8,
    need_tag: bool = True,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row has no label.

    Args:
        label: the true labels.
        trainer_state: has ``global_step`` and ``max_steps``.
        alpha: credit of a near miss; None falls from 1 to 0 over the run.
        threshold: least S that earns it.
        max_words, need_tag: as in ``outcome.py``.
    """
    credit = _alpha(trainer_state) if alpha is None else alpha
    scores: list[float | None] = []
    for completion, truth in zip(completions, label, strict=True):
        if truth is None:
            scores.append(None)
            continue
        labels, right = labels_for(truth)
        named = read_label(completion_text(completion), labels, max_words, need_tag)
        scores.append(_score(named, right, credit, threshold))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's label in tags; None without a label."""
    return None if row.get("label") is None else f"<think></think><answer>{row['label']}</answer>"


def _score(named: str | None, right: str | None, credit: float, threshold: float) -> float:
    if named is None:
        return 0.0
    if named == right:
        return 1.0
    if named not in DEGREES or right not in DEGREES:
        return 0.0
    angle = math.radians(DEGREES[named] - DEGREES[right])
    near = (math.cos(angle) + 1) / 2
    return credit * near if near > threshold else 0.0


def _alpha(state: Any) -> float:
    steps = getattr(state, "max_steps", 0) or 0
    return max(0.0, 1 - state.global_step / steps) if steps > 0 else 1.0
