"""Outcome: pays for an answer that names the clip's emotion and no other.

Range: 0 or 1. None: the row has no label, or one outside the classes.
Source: EmotionThinker's R_o (arXiv 2601.15668).

The label is read as in evaluation: letter case, word forms ("anger") and exact synonyms ("joyful")
do not matter, and the last ``<answer>`` counts. An answer with several labels scores 0, so that
naming all of them earns nothing (Visual-RFT's loophole), whatever the label set. So does a long
answer, which may name the label by chance, such as a copy of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import labels_for, read_label


def outcome(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    label: Sequence[str | None],
    classes: Sequence[str] | None = None,
    max_words: int = 8,
    need_tag: bool = True,
    **_: Any,
) -> list[float | None]:
    """1 for the right label, else 0; None where the row has no label among the classes.

    Args:
        label: the true labels.
        classes: the labels that an answer may name; mmemo passes those of the manifests. None, as
            in TRL's trainers, allows every emotion whose forms mmemo knows and the row's own label.
        max_words: maximum length of an answer in words; a longer one scores 0.
        need_tag: whether the answer must be in ``<answer>`` tags.
    """
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
        scores.append(float(named == right))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's label in tags; None without a label."""
    return None if row.get("label") is None else f"<think></think><answer>{row['label']}</answer>"
