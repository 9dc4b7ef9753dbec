"""Kinds of answers other than one label of a closed set: how the text of each is read.

A kind reads the text that a model wrote into a JSON value, or into a counted failure, as
:func:`mmemo.answers.parsing.parse` does for labels. A refusal or a text without such a value is
never dropped: it has no value, and each scorer says how it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.numerals import read_number, read_numbers
from mmemo.answers.parsing import parse, parse_open
from mmemo.answers.verdict import Status


@dataclass(frozen=True, slots=True)
class Read:
    """What was read. ``answer`` is a JSON value, and None unless ``status`` is ``ok``."""

    status: Status
    answer: Any = None


class AnswerKind(Protocol):
    """How the answers of a task are read."""

    @property
    def name(self) -> str:
        """The kind's name in ``predictions.jsonl``."""
        ...

    def read(self, text: str) -> Read:
        """The value that the text of a completion gives."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """Free text: any answer that has words and does not refuse. The answer is its text."""

    name: str = "text"

    def read(self, text: str) -> Read:
        """The text outside the reasoning."""
        parsed = parse_open(text)
        return Read(parsed.status, parsed.text.strip() if parsed.status == "ok" else None)


@dataclass(frozen=True, slots=True)
class Numbers:
    """One number, or one for each name, from ``low`` to ``high``.

    With names, ``arousal: 3, valence: 2`` is read by name, and a list of as many numbers in order.
    The answer is a number, or a mapping of name to number. A number outside the range, or numbers
    that disagree, make an answer malformed: which one was meant cannot be told
    (:mod:`mmemo.answers.numerals`).
    """

    low: float
    high: float
    names: tuple[str, ...] = ()
    name: str = "numbers"

    def read(self, text: str) -> Read:
        """The number or numbers of the answer."""
        parsed = parse_open(text)
        if parsed.status != "ok":
            return Read(parsed.status)
        if self.names:
            values = read_numbers(parsed.text, self.low, self.high, self.names)
        else:
            value = read_number(parsed.text, self.low, self.high)
            values = None if value is None else [value]
        if values is None or any(not self.low <= value <= self.high for value in values):
            return Read("malformed")
        return Read("ok", dict(zip(self.names, values, strict=True)) if self.names else values[0])


@dataclass(frozen=True, slots=True)
class Several:
    """Any number of labels of a closed set, in the set's order. ``none`` is the word for no label.

    Each part between commas, semicolons, line ends and "and" must be a label; a part that is none
    makes the answer malformed.
    """

    labels: LabelSet
    none: str = "none"
    name: str = "several"

    def read(self, text: str) -> Read:
        """The labels that the answer lists."""
        found = _listed(text, self.labels, self.none)
        if isinstance(found, Read):
            return found
        return Read("ok", [label for label in self.labels.labels if label in found])


@dataclass(frozen=True, slots=True)
class Ranked:
    """Up to ``n`` labels of a closed set, the most likely first."""

    labels: LabelSet
    n: int = 3
    name: str = "ranked"

    def read(self, text: str) -> Read:
        """The labels in the order of the answer, each once."""
        found = _listed(text, self.labels, "")
        if isinstance(found, Read):
            return found
        return Read("ok", found[: self.n]) if found else Read("malformed")


def _listed(text: str, labels: LabelSet, none: str) -> list[str] | Read:
    """The labels of a list, each once, in its order; or why it cannot be read."""
    opened = parse_open(text)
    if opened.status != "ok":
        return Read(opened.status)
    if none and normalise(opened.text) == normalise(none):
        return []
    found: list[str] = []
    for part in re.split(
        r"[,;/\n、，；]|\band\b|(?<=\s)\d+[.)]|^\s*\d+[.)]", opened.text.strip(" []")
    ):
        if not normalise(part):
            continue
        one = parse(part.strip(" \t-*•'\"[]"), labels)
        if one.label is None:
            return Read("malformed")
        found.append(one.label)
    return list(dict.fromkeys(found))
