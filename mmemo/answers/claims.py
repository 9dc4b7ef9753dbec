"""What a text claims about cues: said to be there, said not to be there, or left open.

Facial-R1 (arXiv 2511.10254) counts every mention of an action unit as a claim and therefore forbids
"no", "not" and "maybe" in its prompt. Here a mention is read in its clause instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmemo.answers.parsing import normalise

_CLAUSE = re.compile(
    r"[.;:!?\n]+(?=\s|$)|\n+|\b(?:but|however|although|though|while|whereas|yet|instead|rather)\b"
)
_DENIED_BEFORE = re.compile(
    r"\b(?:no(?! doubt)|not(?! only| just| merely)|never|neither|nor|none|without|cannot|lacks?)\b"
    r"|\b(?:lacking|absent|absence|missing)\b|n't\b"
)
_DENIED_AFTER = re.compile(
    r"^[^,]*?(?:\b(?:absent|missing|inactive|lacking)\b"
    r"|\b(?:is|are|was|were|does|do|did|can|could)(?: ?not|n't)\b|\bcannot\b)"
)
_HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibl[ey]|might|may|could|unclear|unsure|uncertain|unlikely|whether|if)\b"
    r"|\bnot (?:sure|clear|certain)\b|\bhard to (?:tell|say|see)\b"
)
_EITHER = re.compile(r"\beither\b")
_OPEN_LIST = re.compile(r"\b(?:or|nor)\b")


@dataclass(frozen=True, slots=True)
class Claims:
    """Names of cues by what the text says of them. No name is in two of the sets."""

    asserted: frozenset[str]
    denied: frozenset[str]
    """Said not to be there, or both said and denied: a contradiction claims nothing."""
    hedged: frozenset[str]


def read_claims(text: str, phrases: Mapping[str, Iterable[str]]) -> Claims:
    """Find the cues that ``text`` names.

    Args:
        phrases: a cue's name -> the wordings that mean it, matched as whole words without regard
            to case. The longest wording wins where one lies inside another.

    A denial reaches to the end of its part of the clause (to the comma), and over a whole list
    that ends in "or": in "no frown, but raised cheeks" the cheeks are claimed, in "no frown, smile
    or tears" nothing is. A hedge reaches over its whole clause.
    """
    owner = {normalise(wording): name for name, listed in phrases.items() for wording in listed}
    wordings = sorted((wording for wording in owner if wording), key=len, reverse=True)
    if not wordings:
        return Claims(frozenset(), frozenset(), frozenset())
    mention = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, wordings))})(?!\w)")
    found: dict[str, set[str]] = {"asserted": set(), "denied": set(), "hedged": set()}
    for clause in _CLAUSE.split(_lines(text)):
        mentions = list(mention.finditer(clause))
        for index, one in enumerate(mentions):
            following = mentions[index + 1].start() if index + 1 < len(mentions) else len(clause)
            kind = _kind(clause, one.start(), one.end(), following)
            found[kind].add(owner[one.group()])
    asserted = found["asserted"] - found["denied"]
    denied = found["denied"]
    return Claims(
        frozenset(asserted), frozenset(denied), frozenset(found["hedged"] - asserted - denied)
    )


def _lines(text: str) -> str:
    """Normalised line by line, so that a line's end still ends a clause."""
    return "\n".join(normalise(line) for line in text.splitlines())


def _kind(clause: str, start: int, end: int, following: int) -> str:
    if _HEDGES.search(clause) or (_EITHER.search(clause, 0, start) and " or " in clause):
        return "hedged"
    after = clause[end:following]
    if _DENIED_AFTER.search(after):
        return "denied"
    before = [one.end() for one in _DENIED_BEFORE.finditer(clause, 0, start)]
    if before:
        between = clause[before[-1] : start]
        if "," not in between or _OPEN_LIST.search(clause, before[-1]):
            return "denied"
    return "asserted"
