"""The one emotion that a completion names, read as in evaluation but less generously.

A policy looks for whatever earns reward, so a reward reads only a short answer in ``<answer>``
tags, and any second emotion spoils it.
"""

from __future__ import annotations

from functools import lru_cache

from mmemo.evaluation.parsing import (
    EMOTION_FORMS,
    LabelSet,
    answer_text,
    emotion_labels,
    normalise,
    parse,
)

EMOTIONS: tuple[str, ...] = tuple(forms[0] for forms in EMOTION_FORMS)
"""Every emotion whose word forms are known."""


@lru_cache(maxsize=256)
def labels_for(truth: str, classes: tuple[str, ...] | None = None) -> tuple[LabelSet, str | None]:
    """The labels an answer may name, and which of them ``truth`` is (None: none of them).

    Without ``classes`` these are all known emotions and the truth itself.
    """
    labels = emotion_labels(classes or EMOTIONS)
    if classes is None and labels.exact(normalise(truth)) is None:
        labels = emotion_labels((*EMOTIONS, truth))
    return labels, labels.exact(normalise(truth))


def read_label(
    text: str, labels: LabelSet, max_words: int = 8, need_tag: bool = True
) -> str | None:
    """The one label that the answer of a completion names, None where it names none or several.

    Args:
        max_words: a longer answer is not read: a copied prompt may hold the label by chance.
        need_tag: whether the answer must stand in ``<answer>``.
    """
    if need_tag and "<answer>" not in text.lower():
        return None
    if len(answer_text(text).split()) > max_words:
        return None
    return parse(text, labels).label


def same_emotion(word: str) -> str:
    """One name for all forms of an emotion; an unknown word is its own."""
    label = labels_for(EMOTIONS[0])[0].exact(normalise(word))
    return label or normalise(word)
