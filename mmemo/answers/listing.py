"""Lists of labels, and texts that refuse: what the kinds of answers read in free writing.

A list is parted by commas, semicolons, slashes, line ends and "and". Labels may hold such
separators themselves, as "불평/불만" and "Pleasure / Ecstasy" do, so the longest run of parts that
is a label counts as that label.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mmemo.answers.completion import clean
from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.parsing import parse, parse_open
from mmemo.answers.verdict import Status
from mmemo.answers.words import lower, rules_for

_SEPARATORS = re.compile(
    r"[,;/|\n\r、，；/·•]|\band\b|(?<=\s)(?:그리고|및|आणि|व|[&+])(?=\s)|(?<=\s)\d+[.)](?!\d)|^\s*\d+[.)](?!\d)"
)
"""What parts a list. Labels that hold such a part are found first."""
_CHINESE_AND = re.compile("[和与及]")  # it also is within words
_SENTENCES = re.compile(r"[.!?;。！？；\n]+")
_MARKS = " \t-*•'\"[]{}"
_POLITE = 4  # words of a sentence beside a refusal, such as "I'm sorry."


def slashed(labels: Sequence[str]) -> LabelSet:
    """The set of labels such as "불평/불만" or "흐뭇함(귀여움/예쁨)", which an answer may also name
    by any of their parts that no other label has."""
    parts = {label: [one.strip() for one in re.split(r"[/(){}]", label)] for label in labels}
    owners = Counter(normalise(one) for own in parts.values() for one in set(own))
    whole = {normalise(label) for label in labels}
    aliases = {
        label: [p for p in own if owners[normalise(p)] == 1 and normalise(p) not in whole | {""}]
        for label, own in parts.items()
    }
    return LabelSet(tuple(labels), {label: own for label, own in aliases.items() if own})


def read_list(text: str, labels: LabelSet, none: str) -> tuple[Status, list[str]]:
    """The labels that an answer lists, each once, in its order; and whether it could be read.
    ``none`` is the word for no label; "" if there is none."""
    opened = parse_open(text)
    if opened.status == "malformed":
        return "malformed", []
    listed = unicodedata.normalize("NFKC", opened.text).strip(" []{}\t\n")
    if none and normalise(listed) == normalise(none):
        return "ok", []
    found = _labels_of(listed, labels)
    if found is None:
        return ("refused" if opened.status == "refused" else "malformed"), []
    return "ok", list(dict.fromkeys(found))


def refuses(text: str) -> bool:
    """Whether every sentence refuses, but for short ones beside a refusal."""
    refusals = 0
    for sentence in _SENTENCES.split(lower(clean(text))):
        if rules_for(sentence).search("refusal.patterns", sentence):
            refusals += 1
        elif len(sentence.split()) > _POLITE:
            return False
    return refusals > 0


def _labels_of(text: str, labels: LabelSet) -> list[str] | None:
    """The labels of a list; None if a part of it is none."""
    whole = {_joined(form): label for form, label in labels.forms.items()}
    longest = 1 + max((len(_SEPARATORS.findall(form)) for form in labels.forms), default=0)
    parts = _parts(text)
    found: list[str] = []
    start = 0
    while start < len(parts):
        # A label that holds a separator was taken apart, so the longest run that is one counts.
        ends = range(min(len(parts), start + longest), start, -1)
        runs = (
            (end, whole.get(_joined(text[parts[start][0] : parts[end - 1][1]]))) for end in ends
        )
        start, label = next(((end, label) for end, label in runs if label), (start + 1, None))
        read = [label] if label else _read_part(text[slice(*parts[start - 1])], labels)
        if read is None:
            return None
        found += read
    return found or None


def _read_part(part: str, labels: LabelSet) -> list[str] | None:
    """The label that a part names in words, or those between the "and"s of a Chinese one."""
    part = part.strip(_MARKS)
    for pieces in ([part], _CHINESE_AND.split(part)):
        found = [one for piece in pieces if (one := parse(piece, labels).label) is not None]
        if len(found) == len(pieces):
            return found
    return None


def _parts(text: str) -> list[tuple[int, int]]:
    """Start and end of each part of a list that has words."""
    cuts = [0, *(cut for one in _SEPARATORS.finditer(text) for cut in one.span()), len(text)]
    spans = zip(cuts[::2], cuts[1::2], strict=True)
    return [span for span in spans if normalise(text[slice(*span)].strip(_MARKS))]


def _joined(text: str) -> str:
    """A form without spaces around its punctuation, so that "불평 / 불만" is "불평/불만"."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", normalise(text.strip(_MARKS)))
