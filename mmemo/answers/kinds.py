"""Kinds of answers other than one label of a closed set: how the text of each is read.

A kind reads the text that a model wrote into a JSON value, or into a counted failure, as
:func:`mmemo.answers.parsing.parse` does for labels. A refusal or a text without such a value is
never dropped: it has no value, and each scorer says how it counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.parsing import parse, parse_open
from mmemo.answers.verdict import Status

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:[.,]\d+)?(?![\w]|[.,]\d)")


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
    The answer is a number, or a mapping of name to number. A number outside the range, or more
    numbers than asked for, make an answer malformed: which one was meant cannot be told.
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
        found = _named(parsed.text, self.names) if self.names else None
        if found is None:
            values = [_number(one) for one in NUMBER.findall(_scale_removed(parsed.text))]
            wanted = max(1, len(self.names))
            if len(values) != wanted:
                return Read("malformed")
            found = dict(zip(self.names or ("",), values, strict=True))
        if any(not self.low <= value <= self.high for value in found.values()):
            return Read("malformed")
        return Read("ok", found if self.names else found[""])


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


@dataclass(frozen=True, slots=True)
class Distribution:
    """Shares of the labels of a closed set, such as "happy 60%, sad 40%".

    Each part between commas, semicolons, line ends and "and" is a label, with or without a weight:
    "60% happy", "happy: 0.6", "happy 3/5". The answer maps each label to its share, in the set's
    order; weights that do not add up to 1 are divided by their sum. Labels without weights share
    alike, so a single label has all. Weights for some labels only, a label named twice, and a
    negative weight make the answer malformed.
    """

    labels: LabelSet
    name: str = "distribution"

    def read(self, text: str) -> Read:
        """The share of each label that the answer names."""
        opened = parse_open(text)
        if opened.status != "ok":
            return Read(opened.status)
        found: dict[str, float | None] = {}
        for part in _SHARE_PARTS.split(opened.text.translate(_BRACKETS)):
            if not normalise(part):
                continue
            weights = list(_WEIGHT.finditer(part))
            one = parse(_WEIGHT.sub(" ", part).strip(" \t-–*•=:"), self.labels)
            if one.label is None or one.label in found or len(weights) > 1:
                return Read(one.status if one.status == "refused" else "malformed")
            found[one.label] = _weight(weights[0]) if weights else None
        given = {label: 1.0 if weight is None else weight for label, weight in found.items()}
        total = sum(given.values())
        mixed = 0 < sum(weight is None for weight in found.values()) < len(found)
        if mixed or not 0 < total < math.inf or min(given.values()) < 0:
            return Read("malformed")
        kept = [label for label in self.labels.labels if given.get(label, 0) > 0]
        return Read("ok", {label: given[label] / total for label in kept})


_SHARE_PARTS = re.compile(r"[;\n、，；|+]|,(?!\d)|(?<!\d),|\band\b")
_WEIGHT = re.compile(
    r"(?P<minus>[-−](?=[\d.]))?(?<![\w.])(?P<one>\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s*/\s*(?P<of>\d+))?\s*(?:%|percent\b)?"
)
_BRACKETS = str.maketrans(dict.fromkeys("[]{}()\"'", " "))


def _weight(found: re.Match[str]) -> float:
    """The weight that a number, or a fraction, says; NaN for a part of nothing."""
    value = float(found["one"].replace(",", "."))
    of = float(found["of"] or 1)
    value = value / of if of else math.nan
    return -value if found["minus"] else value


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


def _named(text: str, names: tuple[str, ...]) -> dict[str, float] | None:
    """The number after each name; None unless every name has exactly one."""
    found: dict[str, float] = {}
    for name in names:
        pattern = rf"(?<!\w){re.escape(name)}(?!\w)\W{{0,6}}(?:is|=|:)?\s*({NUMBER.pattern})"
        values = set(re.findall(pattern, text, re.IGNORECASE))
        if len(values) != 1:
            return None
        found[name] = _number(values.pop())
    return found


def _scale_removed(text: str) -> str:
    """The text without the ends of a scale: "7 out of 10" and "7/10" are 7."""
    return re.sub(r"(\d)\s*(?:/|out of|of)\s*\d+(?:\.\d+)?", r"\1", text)


def _number(text: str) -> float:
    value = float(text.replace("−", "-").replace(",", "."))
    return 0.0 if value == 0 else value  # -0.0 would be another key in JSON
