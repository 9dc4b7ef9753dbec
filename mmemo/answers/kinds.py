"""Kinds of answers other than one label of a closed set: how the text of each is read.

A kind reads the text that a model wrote into a JSON value, or into a counted failure, as
:func:`mmemo.answers.parsing.parse` does for labels. A refusal or a text without such a value is
never dropped: it has no value, and each scorer says how it counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.listing import read_list, refuses
from mmemo.answers.numerals import read_number, read_numbers
from mmemo.answers.parsing import parse, parse_open
from mmemo.answers.ranking import read_ranking
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
    """Free text: any answer that has words and does not refuse. The answer is its text.

    It refuses only if every sentence does, because a reply such as "I can't say how sorry I am.
    Tell me more." says something. With ``refusals: false`` no text refuses; "She does not know."
    may be the right answer to a question about a text.
    """

    refusals: bool = True
    name: str = "text"

    def read(self, text: str) -> Read:
        """The text outside the reasoning."""
        parsed = parse_open(text)
        if parsed.status == "malformed":
            return Read("malformed")
        if parsed.status == "refused" and self.refusals and refuses(parsed.text):
            return Read("refused")
        return Read("ok", parsed.text.strip())


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

    Each part between commas, semicolons, slashes, line ends and "and" must be a label; a part that
    is none makes the answer malformed. A label may hold such separators itself, as "Pleasure /
    Ecstasy" does (:mod:`mmemo.answers.listing`).
    """

    labels: LabelSet
    none: str = "none"
    name: str = "several"

    def read(self, text: str) -> Read:
        """The labels that the answer lists."""
        status, found = read_list(text, self.labels, self.none)
        kept = [label for label in self.labels.labels if label in found]
        return Read(status, kept if status == "ok" else None)


@dataclass(frozen=True, slots=True)
class Ranked:
    """Up to ``n`` labels of a closed set, the most likely first (:mod:`mmemo.answers.ranking`)."""

    labels: LabelSet
    n: int = 3
    name: str = "ranked"

    def read(self, text: str) -> Read:
        """The labels by rank, each once. A list is read up to its first item that is no label."""
        opened = parse_open(text)
        if opened.status != "ok":
            return Read(opened.status)
        found = read_ranking(opened.text, self.labels)
        return Read("ok", found[: self.n]) if found else Read("malformed")


@dataclass(frozen=True, slots=True)
class Fields:
    """One label for each of several fields, such as an emotion and an intent.

    ``Emotion: happy. Intent: agreeing`` is read by name; else a list of as many labels in order.
    The answer is a mapping of field to label.
    """

    fields: Mapping[str, LabelSet]
    name: str = "fields"

    def read(self, text: str) -> Read:
        """The label of each field."""
        opened = parse_open(text)
        if opened.status != "ok":
            return Read(opened.status)
        found = self._by_name(opened.text) or self._in_order(opened.text)
        return Read("ok", found) if found else Read("malformed")

    def _by_name(self, text: str) -> dict[str, str] | None:
        """What follows each field's name, up to the next name; None unless it is one label."""
        pattern = rf"(?<!\w)({'|'.join(map(re.escape, self.fields))})(?!\w)"
        _, *pieces = re.split(pattern, text, flags=re.IGNORECASE)
        names = {field.lower(): field for field in self.fields}
        found: dict[str, str] = {}
        for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
            field = names.get(name.lower())
            label = None if field is None else parse(piece, self.fields[field]).label
            if field is None or label is None or found.get(field, label) != label:
                return None
            found[field] = label
        return found if set(found) == set(self.fields) else None

    def _in_order(self, text: str) -> dict[str, str] | None:
        parts = [one for one in re.split(r"[,;/\n_、，；]|\band\b", text) if normalise(one)]
        if len(parts) != len(self.fields):
            return None
        found = {
            field: parse(part, labels).label
            for part, (field, labels) in zip(parts, self.fields.items(), strict=True)
        }
        return {field: one for field, one in found.items() if one} if all(found.values()) else None
