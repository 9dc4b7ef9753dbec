"""Ranked answers: the labels of a text, the most likely first.

A list is read up to the first item that is no label of the set: what stands before has its rank for
sure, and what stands behind has not. Three forms are read:

- numbered items, ``1. happy 2. sad``, ``First: happy, second: sad`` or ``第一：高兴``, which may be
  explained and need not be in order;
- items with a probability each, ``sad (20%), happy (70%)``, in the order of the probabilities;
- any other list, ``happy > sad > angry`` or ``高兴、悲伤``, in its order, and from the end where it
  ascends (``angry < happy``).

Numbers that are no ranks from 1 on, and ranks that the probabilities contradict, leave the order
open: there is no answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise, takewhile

from mmemo.answers.label_set import EMOTION_FORMS, LabelSet, normalise
from mmemo.answers.parsing import parse

_LONGEST = 6000  # characters that are read
_HIDDEN = 0xF0000  # a private plane: the first of the characters that stand for labels
_LABEL = "[\U000f0000-\U0010ffff]"
_ORDINALS = (
    ("first(?:ly)?", "most likely", "primary", "best guess", "top choice", "第一", "首先"),
    ("second(?:ly|ary)?", "第二", "其次"),
    ("third(?:ly)?", "第三", "再次"),
    ("fourth(?:ly)?", "第四"),
    ("fifth(?:ly)?", "第五"),
)
_WORDS = "|".join(
    f"(?P<r{rank}>{'|'.join(words)})" for rank, words in enumerate(_ORDINALS, start=1)
)
_MARK = re.compile(
    rf"(?:(?<=\s)|(?<=[,;{{>，；、。(])|(?<={_LABEL})|\A)[\"'*_(\[#]{{0,3}}(?:the )?(?:"
    r"(?:top|rank|no\.?|number|第)[\s_\-]*(?P<named>\d{1,2})[名位]?[\"'*)\]]{0,3}\s*[:.、)\-–—]?"
    r"|(?P<number>\d{1,2})(?:st|nd|rd|th)?[\"'*_\])]{0,3}\s*"
    rf"(?:[.):、](?!\d)|[-–—]\s|(?=[\u4e00-\u9fff]|{_LABEL}))"
    r"|(?<=#)(?P<hash>\d{1,2})\b[:.)]?"
    rf"|(?:{_WORDS})[\"'*]{{0,3}}(?:\s+(?:emotion|label|guess|choice))?\s*"
    rf"(?:[:,]|是|is\b|[-–—]\s|(?={_LABEL}))"
    r"|(?P<next>(?:and\s+)?(?:then|next|finally|lastly|last|followed by)\b:?"
    r"|(?:最后|然后|接着)是?))",
    re.IGNORECASE,
)
_PRIVATE = re.compile(_LABEL)
_APART = re.compile(
    r"\s*(?:[,;|\n，；、>&→≥]|->|=>|/|\s<\s|[.!。！](?=\s|\Z|[^\x00-\x7f])|其次|然后|接着|最后|以及|和"
    r"|\b(?:and then|and|then|followed by|finally|lastly)\b)\s*",
    re.IGNORECASE,
)
_ASCENDS = re.compile(rf"{_LABEL}\s*<\s*{_LABEL}")
_PROBABILITY = re.compile(
    r"[(\[:：=~≈]{0,3}\s?(?<![\w.])(?:(?P<percent>\d{1,3}(?:\.\d+)?)\s*%"
    r"|(?P<share>0?\.\d+|1\.0+|0\.0+))(?![\w.%]\d?)\s*[)\]]?"
)
_BARE = re.compile(rf"{_LABEL}[^\w{_LABEL[1:-1]}]{{0,4}}(\d{{1,3}})(?![\w.%]|\s*%)")
_HEAD = re.compile(r"\s[-–—]+\s|[—(（:：\n.。;；]|\b(?:because|since|due to)\b", re.IGNORECASE)
_MARKUP = re.compile(r"[{}\[\]\"'*_`<>“”‘’「」]")
_KNOWN = {form for forms in EMOTION_FORMS for form in forms}


def read_ranking(text: str, labels: LabelSet) -> list[str]:
    """The labels of an answer, each once, the most likely first; empty if none can be read.

    Args:
        text: the answer without its reasoning and tags.
        labels: the labels that may be named.
    """
    plain = _PRIVATE.sub("", unicodedata.normalize("NFKC", text[:_LONGEST]))[:_LONGEST]
    plain = re.sub(r"[^\S\n]+", " ", plain)  # runs of spaces would be searched again and again
    mentions = labels.find(plain)
    hidden, at = "", 0
    for place, one in enumerate(mentions):
        if one.start >= at:
            hidden += plain[at : one.start] + chr(_HIDDEN + place)
            at = one.end
    hidden += plain[at:]
    named = [plain[one.start : one.end] for one in mentions]
    reader = _Items(labels, named)
    numbered = _numbered(hidden, labels)
    if numbered is not None:
        return reader.ranked(numbered)
    items = _APART.split(hidden)
    if _ASCENDS.search(hidden) and ">" not in hidden:
        items = [one for line in hidden.split("\n") for one in line.split("<")][::-1]
    return reader.listed(items)


class _Items:
    """Reads the items of one list, in which characters stand for the labels ``named``."""

    def __init__(self, labels: LabelSet, named: Sequence[str]) -> None:
        self.labels, self.named = labels, named

    def ranked(self, items: Sequence[tuple[int, str]]) -> list[str]:
        """The labels of numbered items: of the first list with ranks from 1 on."""
        ranks = [rank for rank, _ in items]
        if sorted(ranks) == [*range(1, len(ranks) + 1)]:
            items = sorted(items)
        elif set(ranks) != {1}:  # "1. a 1. b" is how Markdown numbers
            # Behind the first list others may follow.
            run = takewhile(lambda one: one[0] == one[1], enumerate(ranks, start=1))
            items = items[: len([*run])]
        found, chances = self._prefix([_own(text) for _, text in items], heads=True)
        falling = all(one >= other for one, other in pairwise(chances))
        return _once(found) if falling or len(chances) < len(found) else []

    def listed(self, items: Sequence[str]) -> list[str]:
        """The labels of a list without numbers."""
        found, chances = self._prefix(items, heads=False)
        numbers = [int(one) for item in items for one in _BARE.findall(item)]
        if len(numbers) > 1 and not _in_order(numbers):
            return []
        if found and len(chances) == len(found):
            order = sorted(range(len(found)), key=lambda place: -chances[place])
            found = [found[place] for place in order]
        return _once(found)

    def _prefix(self, items: Sequence[str], *, heads: bool) -> tuple[list[str], list[float]]:
        """The labels before the first item without one, and the probabilities that they have."""
        found: list[str] = []
        chances: list[float] = []
        for item in items:
            chance = _PROBABILITY.search(item)
            rest = item if chance is None else item[: chance.start()] + " " + item[chance.end() :]
            head = _HEAD.split(rest, maxsplit=1)[0] if heads else rest
            # Two labels of one rank are no ranking, unless an explanation names the second one.
            several = heads and len({self._named(one) for one in _PRIVATE.findall(head)}) > 1
            label = None if several else self._label(head) or self._label(rest)
            if label is not None:
                found.append(label)
                if chance is not None:
                    percent, share = chance.group("percent", "share")
                    chances.append(float(percent) if share is None else 100 * float(share))
            elif heads or self._says(rest) or (found and re.search(r"\w", rest)):
                break
        return found, chances

    def _label(self, item: str) -> str | None:
        """The one label that an item names and does not deny."""
        text = _MARKUP.sub(" ", self._restored(item)).strip(" \t.,:;-–—•·()#")
        return self.labels.whole(text) or (parse(text, self.labels).label if text else None)

    def _says(self, item: str) -> bool:
        """Whether an item speaks of an emotion, and so is no preamble."""
        word = normalise(_MARKUP.sub(" ", item))
        return bool(_PRIVATE.search(item)) or word in _KNOWN

    def _restored(self, item: str) -> str:
        return _PRIVATE.sub(lambda one: self.named[ord(one.group()) - _HIDDEN], item)

    def _named(self, character: str) -> str | None:
        return self.labels.whole(self._restored(character))


def _numbered(hidden: str, labels: LabelSet) -> list[tuple[int, str]] | None:
    """Rank and text of each numbered item; None if the text has no numbered list."""
    if any(label.lstrip("-").isdecimal() for label in labels.labels):
        return None  # the numbers are the labels
    marks: list[tuple[int, int, int]] = []  # rank, start and end
    for mark in _MARK.finditer(hidden):
        rank = _rank(mark, marks[-1][0] if marks else 0)
        if rank is not None:
            marks.append((rank, *mark.span()))
    before = hidden[: marks[0][1]].rstrip() if marks else ""
    # Labels before the numbers belong to a preamble, or the numbers stand behind their labels.
    if len(marks) < 2 or (_PRIVATE.search(before) and before[-1] not in ":.。!"):
        return None
    ends = [*(start for _, start, _ in marks[1:]), len(hidden)]
    return [(rank, hidden[at:end]) for (rank, _, at), end in zip(marks, ends, strict=True)]


def _rank(mark: re.Match[str], last: int) -> int | None:
    """The rank that a mark gives; None for a "then" that goes on behind no ranks."""
    if mark.group("next") is not None:
        return last + 1 if last else None
    number = next((one for one in mark.group("named", "number", "hash") if one), None)
    if number is not None:
        return int(number)
    return next(r for r in range(1, len(_ORDINALS) + 1) if mark.group(f"r{r}") is not None)


def _in_order(numbers: Sequence[int]) -> bool:
    """Whether integers behind labels are the ranks 1, 2, ... or scores that fall. Any others may be
    either, and say two things about the order."""
    falls = all(one >= other for one, other in pairwise(numbers))
    return [*numbers] == [*range(1, len(numbers) + 1)] or (falls and max(numbers) > len(numbers))


def _own(text: str) -> str:
    """An item's text without the separator before the next one."""
    return text.strip().rstrip(",;>，；、|/ ").removesuffix("and").removesuffix("then").strip()


def _once(found: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(found))
