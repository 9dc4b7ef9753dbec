"""Parse a model's text into one label of a closed set, or into a counted failure.

An answer is ``ok``, ``refused`` or ``malformed``. The last two count as wrong answers and are never
dropped. There are two readings. ``verdict`` finds the label that a person would take from the text,
for benchmarks (:mod:`mmemo.answers.verdict`). ``strict`` takes only an answer that is a label and
nothing else, for rewards (:mod:`mmemo.answers.strict`). Under both, an answer that names several
labels, or denies the one it names, is malformed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mmemo.answers.completion import answer_start, answer_text, clean, has_answer_tag
from mmemo.answers.label_set import (
    EMOTION_FORMS,
    EMOTIONS,
    YES_NO,
    LabelSet,
    base_form,
    emotion_labels,
    label_set,
    labels_for,
    labels_removed,
    normalise,
    yes_no,
)
from mmemo.answers.strict import read_strict
from mmemo.answers.verdict import Status, read_verdict
from mmemo.answers.words import lower, rules_for
from mmemo.errors import EvaluationError

__all__ = [
    "EMOTIONS",
    "EMOTION_FORMS",
    "PARSER_VERSION",
    "READINGS",
    "STATUSES",
    "YES_NO",
    "LabelSet",
    "Parsed",
    "ReadingName",
    "Status",
    "answer_start",
    "answer_text",
    "base_form",
    "emotion_labels",
    "label_set",
    "labels_for",
    "labels_removed",
    "normalise",
    "parse",
    "parse_open",
    "read_label",
    "yes_no",
]

PARSER_VERSION = "2"
"""Written into results. Raise it with every change that can alter how an answer is read."""

STATUSES: tuple[Status, ...] = ("ok", "refused", "malformed")

ReadingName = Literal["verdict", "strict"]
READINGS: tuple[ReadingName, ...] = ("verdict", "strict")

_READ = {"verdict": read_verdict, "strict": read_strict}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed answer. ``text`` is the part that was read. ``label`` is set exactly when ``status``
    is ``ok``, except for open questions, which have no labels."""

    status: Status
    label: str | None
    text: str


def parse(
    text: str,
    labels: LabelSet | Iterable[str],
    reading: ReadingName = "verdict",
    *,
    reasoning_opened: bool = False,
) -> Parsed:
    """Parse one answer.

    The text after the last ``<answer>`` counts, up to its end tag, or to the end if the generation
    was cut off. Without the tag, all text outside reasoning counts. A label of one character (the
    letter of a choice) must be marked as a choice, because "a" is also an English article.

    Args:
        text: the completion.
        labels: the labels an answer may name: a label set, or the names of emotions, of choices,
            or yes and no, whose forms are then known.
        reading: ``verdict`` or ``strict``.
        reasoning_opened: whether the prompt ended with an opened ``<think>``, so that a text
            without any tag is reasoning that was cut off.

    Raises:
        EvaluationError: ``reading`` is neither.
    """
    if reading not in _READ:
        raise EvaluationError(f"reading is '{reading}'; use {' or '.join(READINGS)}")
    answer = answer_text(text, reasoning_opened=reasoning_opened)
    status, label = _READ[reading](answer, label_set(labels))
    return Parsed(status, label, answer)


def parse_open(text: str) -> Parsed:
    """Parse an answer to an open question: ``ok`` if it has words and does not refuse. It has no
    label; open-vocabulary scores read its words."""
    answer = answer_text(text)
    plain = lower(clean(answer))
    if not normalise(answer):
        return Parsed("malformed", None, answer)
    refused = rules_for(plain).search("refusal.patterns", plain)
    return Parsed("refused" if refused else "ok", None, answer)


def read_label(
    text: str,
    labels: LabelSet | Iterable[str],
    max_words: int = 8,
    need_tag: bool = True,
    *,
    reading: ReadingName = "strict",
) -> str | None:
    """The one label that the answer of a completion names, or None, as rewards read it.

    Only a short answer counts, and by default only one in ``<answer>`` tags.

    Args:
        text: the completion.
        labels: the labels an answer may name, as in :func:`parse`.
        max_words: longest answer that is read; a copied prompt may hold the label by chance.
        need_tag: whether the answer must be in ``<answer>`` tags.
        reading: as in :func:`parse`.
    """
    if need_tag and not has_answer_tag(text):
        return None
    if len(answer_text(text).split()) > max_words:
        return None
    return parse(text, labels, reading).label
