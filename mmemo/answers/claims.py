"""Which cues a text claims: cues that it asserts, denies or hedges.

Facial-R1 (arXiv 2511.10254) counts every mention of an action unit as a claim, and therefore
forbids "no", "not" and "maybe" in its prompt. Here, each mention is read in its clause instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmemo.answers.parsing import normalise

# A full stop inside a number, as in 0.8, ends no clause.
_CLAUSE = re.compile(
    r"[.;:!?\n]+(?=\s|$)|\n+|\b(?:but|however|although|though|while|whereas|yet|instead|rather)\b"
)
# "No doubt" and "not only" assert what follows them.
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
    """Names of cues, by what the text says about them. The three sets are disjoint."""

    asserted: frozenset[str]
    denied: frozenset[str]
    """Cues that the text denies, or both asserts and denies: a contradiction is not a claim."""
    hedged: frozenset[str]


def read_claims(text: str, phrases: Mapping[str, Iterable[str]]) -> Claims:
    """Find the cues that ``text`` mentions, and whether it asserts, denies or hedges them.

    A negation applies up to the next comma of its clause, and to a whole list that ends in "or":
    "no frown, but raised cheeks" asserts the cheeks, whereas "no frown, smile or tears" asserts
    nothing. A hedge applies to its whole clause.

    Args:
        phrases: the name of a cue -> the wordings that express it, matched as whole words and
            case-insensitively. If one wording is part of another, the longest one wins.
    """
    # Wordings are normalised like the text, or "Raised brow" would never match.
    owner = {normalise(wording): name for name, listed in phrases.items() for wording in listed}
    # An alternation takes the first branch that matches, so the longest wordings come first.
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
    # A cue that is hedged here and asserted or denied there is not hedged.
    return Claims(
        frozenset(asserted), frozenset(denied), frozenset(found["hedged"] - asserted - denied)
    )


def _lines(text: str) -> str:
    """Normalise line by line, so that the end of a line still ends a clause."""
    return "\n".join(normalise(line) for line in text.splitlines())


def _kind(clause: str, start: int, end: int, following: int) -> str:
    if _HEDGES.search(clause) or (_EITHER.search(clause, 0, start) and " or " in clause):
        return "hedged"
    # A denial after a cue is that of the nearest cue, so the text is cut at the next mention.
    after = clause[end:following]
    if _DENIED_AFTER.search(after):
        return "denied"
    before = [one.end() for one in _DENIED_BEFORE.finditer(clause, 0, start)]
    if before:
        between = clause[before[-1] : start]
        if "," not in between or _OPEN_LIST.search(clause, before[-1]):
            return "denied"
    return "asserted"
