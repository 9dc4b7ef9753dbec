"""Emotion wheel: pays for the F1 of an open list of emotion words against the true list.

Range: 0 to 1. None: the row has no labels, or none that a wheel knows.
Source: AffectGPT-R1's reward (arXiv 2508.01318). On each of five wheels, words are mapped to
classes of the inner ring, F1 compares the two sets of classes, and the score is the mean over the
wheels.

A model soon learns to list many words; the paper prevents this with a length penalty that it does
not give. Ours is a reconstruction: as many words as the truth has are free; beyond them the score
falls linearly, and is 0 at twice that number plus ``slack``.

``corrected`` (the default) repairs the released mapping (see ``mmemo/answers/emotion_wheels.py``)
and counts words that no wheel knows as wrong. ``official`` keeps the released mapping, in which
unknown words are free and a wheel that knows none of the true words is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.emotion_wheels import NUMBER, Mode, Wheels, load_wheels, split_words
from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import answer_text

PARTIAL_CREDIT = True
"""The F1 of sets: an answer of right and wrong words scores, if less than the right ones alone."""


def wheel_f1(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    labels: Sequence[Sequence[str]],
    folder: str,
    mode: Mode = "corrected",
    slack: int = 2,
    need_tag: bool = True,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row has no labels, or none that a wheel knows.

    Args:
        labels: the true words of each row.
        folder: AffectGPT's ``emotion_wheel`` folder.
        mode: ``corrected`` or ``official``.
        slack: number of words beyond twice the true number at which the score reaches 0.
        need_tag: whether the words must be in ``<answer>`` tags.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ("corrected", "official"):
        raise ValueError(f"mode is {mode!r}; use 'corrected' or 'official'")
    wheels = load_wheels(Path(folder))
    scores: list[float | None] = []
    for completion, truth in zip(completions, labels, strict=True):
        text = completion_text(completion)
        untagged = need_tag and "<answer>" not in text.lower()
        words = [] if untagged else split_words(answer_text(text), mode)
        true_words = split_words(", ".join(truth), mode)
        score = _mean_f1(wheels, words, true_words, mode)
        penalty = _length_factor(len(words), len(true_words), slack)
        scores.append(None if score is None else score * penalty)
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's true words in tags; None without any."""
    words = ", ".join(row.get("labels") or ())
    return f"<think></think><answer>{words}</answer>" if words else None


def _mean_f1(wheels: Wheels, words: list[str], truth: list[str], mode: Mode) -> float | None:
    found: list[float] = []
    for number in range(NUMBER):
        true_set = wheels.classes(truth, number, mode)
        if true_set:
            named = wheels.classes(words, number, mode)
            both = len(named & true_set)
            found.append(2 * both / (len(named) + len(true_set)))
    return sum(found) / len(found) if found else None


def _length_factor(listed: int, true_number: int, slack: int) -> float:
    over = max(0, listed - true_number)
    return max(0.0, 1 - over / (true_number + slack))
