"""Answers that give each label a number: "sad: 75%, angry: 20%" or ``{"sad": 0.75}``.

A person takes the label with the highest one. Numbers count as probabilities only if all of them
are per cent, or lie between 0 and 1, or add up to about 100; other numbers may be ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.label_set import LabelSet, Mention, normalise

_NUMBER = r"(?P<number>\d{1,3}(?:\.\d{1,6})?)\s*(?P<percent>%|per ?cent)?"
_SCORE = re.compile(rf"\W{{0,4}}[\s:：=|(（\-–—~≈]\W{{0,4}}{_NUMBER}(?![\d.]*\w)", re.IGNORECASE)
_HUNDRED, _TOLERANCE = 100, 5


def highest(text: str, mentions: Sequence[Mention]) -> str | None:
    """The label with the highest number behind it, if each of several labels has one."""
    if len({one.label for one in mentions}) < max(2, len(mentions)):
        return None
    values: dict[str, float] = {}
    per_cent: set[bool] = set()
    for index, one in enumerate(mentions):
        stop = mentions[index + 1].start if index + 1 < len(mentions) else len(text)
        found = _SCORE.match(text, one.end, stop)
        if found is None:
            return None
        values[one.label] = float(found.group("number"))
        per_cent.add(found.group("percent") is not None)
    return _best(values, per_cent == {True}) if len(per_cent) == 1 else None


def highest_value(values: Mapping[str, Any], labels: LabelSet) -> str | None:
    """The same of a JSON object whose keys are labels."""
    found: dict[str, float] = {}
    for key, value in values.items():
        label = labels.exact(normalise(str(key)))
        if label is None or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        found[label] = float(value)
    return _best(found, False) if len(found) > 1 else None


def _best(values: Mapping[str, float], per_cent: bool) -> str | None:
    shares = all(0 <= value <= 1 for value in values.values())
    if not (shares or per_cent or abs(sum(values.values()) - _HUNDRED) <= _TOLERANCE):
        return None
    top = max(values.values())
    best = [label for label, value in values.items() if value == top]
    return best[0] if len(best) == 1 else None
