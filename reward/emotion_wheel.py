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

As a score of an evaluation, it also logs each answer's precision and recall on each wheel, without
the length penalty, from which the results have MER-UniBench's own average beside the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.emotion_wheels import Mode, load_grouping, overlap, precision_recall, split_words
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
    log_extra: Any = None,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row has no labels, or none that a wheel knows.

    Args:
        labels: the true words of each row.
        log_extra: gets the precision and recall on each wheel.
        folder: AffectGPT's ``emotion_wheel`` folder.
        mode: ``corrected`` or ``official``.
        slack: number of words beyond twice the true number at which the score reaches 0.
        need_tag: whether the words must be in ``<answer>`` tags.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ("corrected", "official"):
        raise ValueError(f"mode is {mode!r}; use 'corrected' or 'official'")
    wheels = load_grouping(folder, mode)
    scores: list[float | None] = []
    pairs: list[Any] = []
    for completion, truth in zip(completions, labels, strict=True):
        text = completion_text(completion)
        untagged = need_tag and "<answer>" not in text.lower()
        words = [] if untagged else split_words(answer_text(text), mode)
        true_words = split_words(", ".join(truth), mode)
        found = overlap(words, true_words, wheels)
        penalty = _length_factor(len(words), len(true_words), slack)
        scores.append(None if found is None else found.f1 * penalty)
        pairs.append(precision_recall(words, true_words, wheels))
    if log_extra is not None:
        log_extra("precision_recall", pairs)
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's true words in tags; None without any."""
    words = ", ".join(row.get("labels") or ())
    return f"<think></think><answer>{words}</answer>" if words else None


def _length_factor(listed: int, true_number: int, slack: int) -> float:
    over = max(0, listed - true_number)
    return max(0.0, 1 - over / (true_number + slack))
