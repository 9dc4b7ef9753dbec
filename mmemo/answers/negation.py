"""Which of the labels that a text names it denies.

A negation counts where it governs a label. Its scope begins behind it and ends with its clause: at
a sentence's end, at "but", "because" or a new subject, and at a comma unless a list with "or" goes
on behind it ("not happy, sad or angry"). Words behind a label may deny it too ("happiness is not
visible"). Phrases that only look like negations ("not only", "cannot hide", 不仅) are none. In
languages of which little is known (German, French, Spanish, Japanese, Korean), a negation denies
every label of its clause.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mmemo.answers.label_set import Mention
from mmemo.answers.words import LABEL, MASKED, Rules, Span, pattern

_ALWAYS = re.compile(r"[.!?;:。！？；]+(?=\s|$|[^\x00-\x7f])|\n+|\s[-–—]+\s|—|…|->|→|=>")
_ASIDE = re.compile(r"^,[^,.;:\n]{1,40},")
_COMMAS = re.compile(r"[,，]")


def blanked(text: str, mentions: Sequence[Mention]) -> str:
    """``text`` with each label blanked out, at its length."""
    chars = list(text)
    for one in mentions:
        chars[one.start : one.end] = LABEL * (one.end - one.start)
    return "".join(chars)


def masked(blank: str, rules: Rules, within: Sequence[Span]) -> str:
    """``blank`` with each phrase in some spans that is no negation blanked out as well."""
    for one in rules.find("negation.none", blank, within):
        phrase = "".join(char if char == LABEL else MASKED for char in one.group())
        blank = blank[: one.start()] + phrase + blank[one.end() :]
    return blank


def denied(
    text: str, mentions: Sequence[Mention], rules: Rules, within: Sequence[Span]
) -> list[bool]:
    """For each mention, whether a negation governs it.

    Args:
        within: the sentences that have mentions.
        text: what :func:`masked` made of the text, in which the mentions stand where they stood.
    """
    ends = _boundaries(text, rules, within)
    negators = rules.find("negation.before", text, within)
    anywhere = rules.find("negation.anywhere", text, within)
    found: list[bool] = []
    for one in mentions:
        start = max((end for _, end in ends if end <= one.start), default=0)
        stop = min((begin for begin, _ in ends if begin >= one.end), default=len(text))
        before = [n.end() for n in negators if start <= n.end() <= one.start]
        found.append(
            any(_governs(text, at, one.start, stop, rules) for at in before)
            or rules.match("negation.after", text, one.end) is not None
            or any(start <= n.start() < stop for n in anywhere)
        )
    return found


def _governs(text: str, at: int, label: int, stop: int, rules: Rules) -> bool:
    """Whether a negation that ends ``at`` governs the label that begins at ``label``."""
    aside = _ASIDE.match(text[at:label])
    if aside is not None:
        at += aside.end()
    if not _COMMAS.search(text, at, label):
        return True
    # A list goes on across its commas as far as the label behind its last "or".
    last = [found.end() for found in rules.find("negation.list_or", text, [(at, stop)])]
    if not last:
        return False
    until = text.find(LABEL, last[-1])
    return until >= label and not _COMMAS.search(text, last[-1], until)


def _boundaries(text: str, rules: Rules, within: Sequence[Span]) -> list[Span]:
    ends = [found.span() for start, end in within for found in _ALWAYS.finditer(text, start, end)]
    ends += [(edge, edge) for span in within for edge in span]
    ends += [found.span() for found in rules.find("negation.ends", text, within)]
    for verb in rules.find("negation.ends_unless_denied", text, within):
        # "Nothing suggests happiness": a negation right before the verb governs what follows it.
        before = text[max(0, verb.start() - 60) : verb.start()]
        if not any(_denying(code).search(before) for code in rules.codes):
            ends.append(verb.span())
    return ends


@lru_cache(maxsize=16)
def _denying(code: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern(code, 'negation.denied_verb').pattern})\Z")
