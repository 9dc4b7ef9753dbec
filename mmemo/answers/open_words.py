"""The emotion words of an answer in any form, and the sentiment that they express.

AffectGPT (arXiv 2501.16566) lets Qwen2.5-7B extract the words of a description and choose their
sentiment, at temperature 0.7, so that no two runs agree. Here both are rules, which need no model
and always give the same. An answer that is a list is split, and keeps words that nobody knows. In
prose, the words of a vocabulary are found. A stated emotion ("the emotional state is ...") goes
before what is said in passing, and words that the text denies or only doubts do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from mmemo.answers.claims import denies, read_claims
from mmemo.answers.completion import answer_text, clean
from mmemo.answers.emotion_wheels import NUMBER, Wheels, split_words
from mmemo.answers.parsing import EMOTION_FORMS, base_form, normalise, parse_open

Sentiment = Literal["positive", "negative", "neutral"]
SENTIMENTS: tuple[Sentiment, ...] = ("positive", "negative", "neutral")

_POSITIVE = (
    "happy calm excited admiration amusement approval caring desire gratitude love optimism pride "
    "relief elation pleasure contentment affection infatuation hope triumph interest awe curiosity "
    "joyful joy powerful peaceful genius positive"
)
_NEGATIVE = (
    "angry sad fear disgust contempt worried anxious doubt helpless disappointed frustrated "
    "boredom annoyance confusion disapproval embarrassment grief nervousness remorse impatience "
    "distress shame bitterness malevolence sourness pain fatigue numbness jealousy "
    "mad disgusted scared fearful bad anger negative"
)
VALENCE = {**dict.fromkeys(_POSITIVE.split(), 1), **dict.fromkeys(_NEGATIVE.split(), -1)}
"""Our own valence of mmemo's emotions and of the wheels' inner words; others have none."""

# Forms of wheel words that describe anything but an emotion in most sentences.
_ORDINARY_TEXT = (
    "present presented presents aware busy care cares important challenged focus focused focusing "
    "connected connecting lost loss safe noticed critical bad weak distant respect expressive "
    "embodied attentive thoughtful creative interesting exposed empty secure low light down up off "
    "open strong clear real free normal serious strongly slight slightly sharp tense tone direct "
    "directed engaged engaging natural"
)
_ORDINARY = frozenset(_ORDINARY_TEXT.split())
_STATED = re.compile(
    r"\b(?:emotion(?:al state)?s?|feelings?|mood|labels?)(?: of [^.:\n]{1,60}?| \w+ing)?\s*"
    r"(?:\b(?:is|are|was|were|includes?|included|may be|might be|can be described as)\b:?|[:：])"
    r"(?P<said>[^.。!?\n]{1,400})",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_LONGEST_FORM = 4  # words
_LONGEST_ITEM = 4  # words of an item of a list
_PARTS = re.compile(r"[,;/\n，；、]")


@lru_cache(maxsize=1)
def own_forms() -> frozenset[str]:
    """The forms of mmemo's own emotions, in all its languages."""
    return frozenset(normalise(form) for forms in EMOTION_FORMS for form in forms if len(form) > 1)


@lru_cache(maxsize=4)
def _vocabulary(bases: frozenset[str] | None) -> tuple[frozenset[str], tuple[str, ...]]:
    """All forms, and those of scripts without spaces."""
    forms = own_forms() | (bases or frozenset())
    return forms, tuple(sorted(form for form in forms if not form.isascii()))


def emotion_words(text: str, forms: frozenset[str] | None = None) -> list[str]:
    """The emotion words of an answer, each once, in the order of the text; none where it refuses.

    Args:
        text: the completion.
        forms: words that count besides mmemo's own, such as the surface forms of the wheels.
    """
    opened = parse_open(text)
    if opened.status != "ok":
        return []
    plain = clean(opened.text)
    known, _ = _vocabulary(forms)
    if not _is_list(plain):
        return _of_prose(plain, forms)
    found: list[str] = []
    for item in split_words(plain, "corrected"):
        if item in known:
            found.append(item)
        elif not denies(item):
            found += _asserted(item, forms) or [item]
    return list(dict.fromkeys(found))


def _is_list(text: str) -> bool:
    """Whether a text is a list of words rather than a sentence."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return True
    parts = [part for part in _PARTS.split(inner) if part.strip()]
    return bool(parts) and all(len(_WORD.findall(part)) <= _LONGEST_ITEM for part in parts)


def _of_prose(text: str, forms: frozenset[str] | None) -> list[str]:
    """The words of the emotion that is stated last, or else all that the text asserts."""
    for stated in reversed(list(_STATED.finditer(text))):
        found = _asserted(stated.group("said"), forms)
        if found:
            return found
    return [word for word in _asserted(text, forms) if word not in _ORDINARY]


def _asserted(text: str, forms: frozenset[str] | None) -> list[str]:
    known, unspaced = _vocabulary(forms)
    low = normalise(text)
    words = _WORD.findall(low)
    spans = range(1, _LONGEST_FORM + 1)
    grams = (" ".join(words[at : at + n]) for at in range(len(words)) for n in spans)
    here = dict.fromkeys(one for one in grams if one in known)
    here |= dict.fromkeys(form for form in unspaced if form in low)
    if not here:
        return []
    asserted = read_claims(text, {form: (form,) for form in here}).asserted
    return sorted(asserted, key=lambda form: (low.find(form), form))


def sentiment_of(words: Iterable[str], wheels: Wheels | None = None) -> Sentiment:
    """The sentiment of some emotion words: the sign of the sum of their valences.

    A word has the valence of its base form, or else the mean valence of its nearest classes on the
    wheels. Without words the sentiment is neutral, as in the released prompt.
    """
    total = sum(_valence(word, wheels) for word in words)
    return "neutral" if abs(total) < 1e-9 else "positive" if total > 0 else "negative"


def stated_sentiment(text: str) -> Sentiment | None:
    """The sentiment that an answer names in so many words; None if it is anything else."""
    normal = normalise(answer_text(text))
    return next((one for one in SENTIMENTS if normal == one), None)


def _valence(word: str, wheels: Wheels | None) -> float:
    base = base_form(word)
    if base in VALENCE:
        return VALENCE[base]
    if wheels is None:
        return 0.0
    classes = [wheels.corrected(word, number) for number in range(NUMBER)]
    return sum(VALENCE.get(one, 0) for one in classes) / NUMBER
