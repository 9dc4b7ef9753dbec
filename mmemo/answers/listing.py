"""Lists of labels, and texts that refuse: what the kinds of answers read in free writing.

A list is parted by commas, semicolons, slashes, line ends and "and". Labels may hold such
separators themselves, as "불평/불만" and "Pleasure / Ecstasy" do, so the longest run of parts that
is a label counts as that label.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from mmemo.answers.completion import clean
from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.parsing import parse, parse_open
from mmemo.answers.verdict import Status
from mmemo.answers.words import lower, rules_for

_SEPARATORS = re.compile(
    r"[,;/|&+\n\r、，；·•]|\band\b|(?<=\s)(?:그리고|및|आणि|व)(?=\s)|(?<=\s)\d+[.)](?!\d)"
    r"|^\s*\d+[.)](?!\d)"
)
"""What parts a list. Labels that hold such a part are found first."""
_WITHIN = (
    re.compile("[和与及]"),
    re.compile(r"(?<=[가-힣])(?:과|와|하고|이랑|랑)\s+"),
    re.compile(r"[.。!]+\s*|\s+as well as\s+"),
)
"""What may part two labels, and is also within words and sentences."""
_AND_SO_ON = ("etc", "and so on", "so on", "등", "等")
_NONE = re.compile(
    r"no (?:label|emotion)s?|none of (?:them|these|those|the (?:above|labels|emotions))"
)
_EMPTY = re.compile(r"\W*(?:\w+\W+)?\[\s*\]\W*")
_CONCLUDES = re.compile(
    r"(?:\b(?:answer|label|emotion)s?\b|정답|답|감정|答案|情绪)\s*(?:is|are|은|는|是)?\s*:",
    re.IGNORECASE,
)
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
    listed = unicodedata.normalize("NFKC", opened.text)
    if none and _names_none(listed, none):
        return "ok", []
    if opened.status == "malformed":
        return "malformed", []
    found = _labels_of(listed, labels)
    said = list(_CONCLUDES.finditer(listed))
    if found is None and said:
        found = _labels_of(listed[said[-1].end() :], labels)
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


def _names_none(text: str, none: str) -> bool:
    """Whether a text says that there is no label, in words or as an empty list of JSON."""
    plain = normalise(text)
    usual = none.casefold() == "none" and _NONE.fullmatch(plain) is not None
    return plain == normalise(none) or usual or _EMPTY.fullmatch(text[:100]) is not None


def _labels_of(text: str, labels: LabelSet) -> list[str] | None:
    """The labels of a list; None if a part of it is none."""
    text = text.strip(" []{}\t\n")
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
        read = [label] if label else _read_part(text[slice(*parts[start - 1])], labels, whole)
        if read is None:
            return None
        found += read
    return found or None


def _read_part(part: str, labels: LabelSet, whole: Mapping[str, str]) -> list[str] | None:
    """The label that a part names in words; or several, if each of its pieces begins with one."""
    part = part.strip(_MARKS)
    label = parse(part, labels).label
    if label is not None:
        return [label]
    for within in _WITHIN:
        pieces = [piece.strip() for piece in within.split(part) if normalise(piece)]
        if len(pieces) > 1 and all(_begins(piece, labels) for piece in pieces):
            read = [parse(piece, labels).label for piece in pieces]
            found = [one for one in read if one is not None]
            return found if len(found) == len(pieces) else None
    words = [whole.get(_joined(word)) for word in part.split()]
    named = [word for word in words if word is not None]
    return named if len(words) == len(named) > 1 else None


def _begins(text: str, labels: LabelSet) -> bool:
    """Whether a text begins with a label."""
    found = labels.find(text)
    return bool(found) and found[0].start == 0


def _parts(text: str) -> list[tuple[int, int]]:
    """Start and end of each part of a list that has words."""
    cuts = [0, *(cut for one in _SEPARATORS.finditer(text) for cut in one.span()), len(text)]
    spans = zip(cuts[::2], cuts[1::2], strict=True)
    plain = ((span, normalise(text[slice(*span)].strip(_MARKS))) for span in spans)
    return [span for span, part in plain if part and part not in _AND_SO_ON]


def _joined(text: str) -> str:
    """A form without spaces around its punctuation, so that "불평 / 불만" is "불평/불만"."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", normalise(text.strip(_MARKS)))
