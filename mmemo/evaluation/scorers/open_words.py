"""A score of open answers by the groups of their words, in the form of a reward function, for the
``scores`` of an evaluation: ``eval/ca_mer.py:words``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mmemo.answers.emotion_wheels import (
    FORMS,
    Mode,
    load_grouping,
    overlap,
    precision_recall,
    split_words,
)
from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import parse_open

VALUES = ("precision", "recall", "average", "f1")


def word_scores(path: str) -> list[dict[str, Any]]:
    """The ``scores`` of a config that rate open answers by all four values, with ``path`` naming
    :func:`words`."""
    return [
        {"path": path, "name": value, "params": {"value": value, "grouping": FORMS}}
        for value in VALUES
    ]


def words(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    labels: Sequence[Sequence[str]],
    task: Sequence[str],
    value: Literal["precision", "recall", "average", "f1"],
    of: str = "open_vocabulary",
    grouping: str = FORMS,
    mode: Mode = "corrected",
    log_extra: Any = None,
    **_: Any,
) -> list[float | None]:
    """A score of the open answers from 0 to 1. With P the groups of the answer and G those of the
    truth, it is |P ∩ G| / |P| (``precision``, called Acc in the papers), |P ∩ G| / |G|
    (``recall``), their mean (``average``) or their harmonic mean (``f1``). None for answers of
    other tasks, and where the grouping contains none of the true words.

    Args:
        labels, task: the true words and the task of each row.
        of: the name of the open task.
        grouping, mode: how words are grouped, see ``mmemo/answers/emotion_wheels.py``.
        log_extra: gets the precision and recall under each grouping for ``f1``, from which the
            results have MER-UniBench's own average beside the mean of ``f1``.
    """
    groups = load_grouping(grouping, mode)
    scores: list[float | None] = []
    pairs: list[Any] = []
    for completion, true, name in zip(completions, labels, task, strict=True):
        answer = parse_open(completion_text(completion))
        predicted = split_words(answer.text, "corrected") if answer.status == "ok" else []
        found = overlap(predicted, true, groups) if name == of else None
        scores.append(None if found is None else getattr(found, value))
        pairs.append(None if found is None else precision_recall(predicted, true, groups))
    if log_extra is not None and value == "f1":
        log_extra("precision_recall", pairs)
    return scores
