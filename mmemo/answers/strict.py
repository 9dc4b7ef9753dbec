"""The strict reading: an answer that is one label and says nothing else.

A policy searches for whatever earns reward, so this is a whitelist. Beside the label only words
that carry it may stand ("the emotion is", 情绪是) and punctuation. A second label, even of another
set, a list in any script, a negation and any other word make an answer malformed.
"""

from __future__ import annotations

import re
from functools import lru_cache

from mmemo.answers.completion import clean
from mmemo.answers.label_set import LabelSet, spaced
from mmemo.answers.negation import blanked
from mmemo.answers.verdict import Found
from mmemo.answers.words import LABEL, NEVER, carriers, lower, rules_for

_MALFORMED: Found = ("malformed", None)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")
_SEPARATORS = re.compile(r"[/|&+;、；]|\d")
# "Un-happy": what carries a label elsewhere may turn it round.
_PREFIXED = re.compile(rf"\w[-‐‑]+{LABEL}|{LABEL}[-‐‑]+\w")
_SAME = re.compile(r"[\s:：.,。，'\"*()（）\[\]{}!！#_=`~>-]*")


def read_strict(answer: str, labels: LabelSet) -> Found:
    """The status and label of an answer without its reasoning and tags."""
    text = clean(answer)
    exact = labels.whole(text)
    if exact is not None:
        return "ok", exact
    found = labels.find(text)
    rest = lower(blanked(text, found))
    rules = rules_for(rest)
    if len(found) != 1:
        refused = not found and rules.search("refusal.patterns", rest)
        return ("refused", None) if refused else _MALFORMED
    if rules.search("refusal.patterns", rest):
        return "refused", None
    return ("ok", found[0].label) if _carries(rest, carriers(rules), labels) else _MALFORMED


def _carries(rest: str, words: frozenset[str], labels: LabelSet) -> bool:
    """Whether ``rest`` has nothing but carrier words and punctuation around the label."""
    rest = _unspaced(words).sub(" ", rest)
    if _SEPARATORS.search(rest) or _PREFIXED.search(rest):
        return False
    for word in _WORD.findall(rest):
        lower = word.casefold()
        # A choice may be called by a word that elsewhere only carries, such as the letter a.
        if lower not in words or labels.exact(lower) is not None:
            return False
    return _SAME.fullmatch(_WORD.sub("", rest).replace(LABEL, "")) is not None


@lru_cache(maxsize=64)
def _unspaced(words: frozenset[str]) -> re.Pattern[str]:
    """The carriers of scripts without spaces, the longest first."""
    unspaced = sorted((word for word in words if not spaced(word)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, unspaced))) if unspaced else NEVER
