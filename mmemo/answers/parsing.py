"""From a model's text to one label of a closed set, or to a counted failure.

An answer is ``ok``, ``refused`` or ``malformed``. The last two are wrong answers, never dropped
ones. Reading is strict: what names several labels, or denies the one it names, is malformed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mmemo.errors import EvaluationError

PARSER_VERSION = "1"
"""Goes into results; raise it when a change can alter how any answer is read."""

Status = Literal["ok", "refused", "malformed"]
STATUSES: tuple[Status, ...] = ("ok", "refused", "malformed")

# Word forms of one emotion. Only forms and exact synonyms: "worried" is not "afraid", because
# MER2023 and CA-MER count them apart.
EMOTION_FORMS: tuple[tuple[str, ...], ...] = (
    ("angry", "anger", "angered", "angrily"),
    ("happy", "happiness", "happily", "joy", "joyful", "joyous"),
    ("sad", "sadness", "saddened", "sadly"),
    ("fear", "fearful", "afraid", "scared", "fearfully"),
    ("surprise", "surprised", "surprising"),
    ("disgust", "disgusted", "disgusting"),
    ("neutral", "neutrality", "no emotion", "emotionless"),
    ("calm", "calmness", "calmly"),
    ("contempt", "contemptuous"),
    ("worried", "worry", "worries"),
    ("anxious", "anxiety"),
    ("doubt", "doubtful"),
    ("helpless", "helplessness"),
    ("disappointed", "disappointment"),
    ("excited", "excitement"),
    ("frustrated", "frustration"),
)

_BASE = {form: forms[0] for forms in EMOTION_FORMS for form in forms}

YES_NO: Mapping[str, tuple[str, ...]] = {"yes": ("true",), "no": ("false",)}

_ANSWER = re.compile(r"<answer>", re.IGNORECASE)
_ANSWER_END = re.compile(r"</answer>", re.IGNORECASE)
_THINK = re.compile(r"<think>.*?(</think>|\Z)", re.IGNORECASE | re.DOTALL)
_NEGATION = re.compile(r"\b(not|no|never|neither|nor|none|without|cannot|isnt|wasnt)\b|n't\b")
_VERBS = r"(tell|say|determine|answer|identify|infer|judge|help|assist|provide|recogni[sz]e|know)"
_REFUSAL = re.compile(
    rf"\b(can(not|'t| not)|could(n't| not)|unable to|won't|will not) (\w+ )?{_VERBS}\b"
    r"|\b(don't|do not) know\b|\bnot (sure|certain|clear)\b|\bas an ai\b"
    r"|\b(impossible|hard|difficult) to (tell|say|determine|judge)\b"
    r"|^(unclear|unknown|unsure|undetermined|n/a|no answer|refuse[sd]?)$"
)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The labels an answer may name, and the other words that mean them.

    ``aliases`` maps a label to its other forms. A form that would mean two labels is refused.
    """

    labels: tuple[str, ...]
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    _canonical: Mapping[str, str] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        canonical: dict[str, str] = {}
        unknown = set(self.aliases) - set(self.labels)
        if unknown:
            raise EvaluationError(f"aliases are given for '{min(unknown)}', which is no label")
        for label in self.labels:
            for form in (label, *self.aliases.get(label, ())):
                key = normalise(form)
                if not key or canonical.get(key, label) != label:
                    owner = canonical.get(key, "nothing")
                    raise EvaluationError(
                        f"label form '{form}' of '{label}' already means {owner}; make forms unique"
                    )
                canonical[key] = label
        object.__setattr__(self, "_canonical", canonical)
        object.__setattr__(self, "_pattern", _mention_pattern(canonical))

    def exact(self, text: str) -> str | None:
        """The label that the whole normalised ``text`` is a form of."""
        return self._canonical.get(text)

    def mentions(self, text: str) -> list[tuple[int, str]]:
        """Start and label of each whole-word mention in the normalised ``text``, in order."""
        return [
            (found.start(), self._canonical[found.group().strip("().:")])
            for found in self._pattern.finditer(text)
        ]


@dataclass(frozen=True, slots=True)
class Parsed:
    """``label`` is set exactly when ``status`` is ``ok``, but never for an open question. ``text``
    is the part that was read."""

    status: Status
    label: str | None
    text: str


def emotion_labels(labels: Iterable[str]) -> LabelSet:
    """The label set of an emotion benchmark: each label with its noun and adjective forms.

    A form group that holds two of the benchmark's labels gives aliases to neither.
    """
    wanted = tuple(labels)
    aliases: dict[str, tuple[str, ...]] = {}
    for forms in EMOTION_FORMS:
        owners = [label for label in wanted if normalise(label) in forms]
        if len(owners) == 1:
            aliases[owners[0]] = tuple(f for f in forms if f != normalise(owners[0]))
    return LabelSet(wanted, aliases)


def yes_no() -> LabelSet:
    """The label set of a yes-or-no probe."""
    return LabelSet(tuple(YES_NO), YES_NO)


def parse(text: str, labels: LabelSet) -> Parsed:
    """Read one answer.

    The text after the last ``<answer>`` counts, up to its end tag or, where the generation was
    cut, to the end. Without the tag all text outside ``<think>`` counts. A label of one character
    (the letter of a choice) must be the whole answer, open it as in "B) ...", or stand in
    brackets: "a" is also an English article.
    """
    answer = answer_text(text)
    normal = normalise(answer)
    exact = labels.exact(normal)
    if exact is not None:
        return Parsed("ok", exact, answer)
    if _REFUSAL.search(normal):
        return Parsed("refused", None, answer)
    mentions = labels.mentions(normal)
    if len({label for _, label in mentions}) != 1:
        return Parsed("malformed", None, answer)
    start, label = mentions[0]
    # Where a label is itself a negation ("no"), only a negation in front of it denies it.
    denied = any(_NEGATION.fullmatch(normalise(name)) for name in labels.labels)
    if _NEGATION.search(normal[:start] if denied else labels_removed(normal, labels)):
        return Parsed("malformed", None, answer)
    return Parsed("ok", label, answer)


def parse_open(text: str) -> Parsed:
    """Read an answer in words of its own: ``ok`` without a label, wherever it has words and does
    not refuse. What the words are, scores say."""
    answer = answer_text(text)
    normal = normalise(answer)
    if not normal:
        return Parsed("malformed", None, answer)
    return Parsed("refused" if _REFUSAL.search(normal) else "ok", None, answer)


def answer_text(text: str) -> str:
    """The part of a generation that is its answer."""
    starts = list(_ANSWER.finditer(text))
    if starts:
        tail = text[starts[-1].end() :]
        end = _ANSWER_END.search(tail)
        return (tail[: end.start()] if end else tail).strip()
    return _THINK.sub(" ", text).strip()


def answer_start(text: str) -> int | None:
    """Where the answer begins in a generation: at its last tag, else behind its reasoning. None
    where the reasoning was cut off before its end."""
    tags = list(_ANSWER.finditer(text))
    if tags:
        return tags[-1].start()
    thoughts = list(_THINK.finditer(text))
    if not thoughts:
        return 0
    return thoughts[-1].end() if thoughts[-1].group(1) else None


def normalise(text: str) -> str:
    """Lower case, one space between words, no punctuation around the whole."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"[\s_\-]+", " ", text)
    return text.strip(" .,;:!?\"'`()[]{}*#")


def base_form(word: str) -> str:
    """One spelling for all forms of an emotion ("joyful" and "Happiness" are happy); any other
    word is only normalised."""
    normal = normalise(word)
    return _BASE.get(normal, normal)


def labels_removed(normal: str, labels: LabelSet) -> str:
    """``normal`` without the label mentions, so that "no emotion" does not deny itself."""
    return labels._pattern.sub(" ", normal)  # pyright: ignore[reportPrivateUsage]


def _mention_pattern(forms: Mapping[str, str]) -> re.Pattern[str]:
    """Matches any form as a whole word, longer forms first."""
    parts: list[str] = []
    for form in sorted(forms, key=len, reverse=True):
        if len(form) == 1:
            letter = re.escape(form)
            # Brackets at the very ends of an answer are gone by now.
            parts.append(rf"\({letter}\)|\({letter}\Z|\A{letter}[).:](?!\w)")
            continue
        # Scripts written without spaces have no word boundaries to ask for.
        spaced = all(ord(char) < 0x2E80 for char in form)
        edge = (r"(?<!\w)", r"(?!\w)") if spaced else ("", "")
        parts.append(edge[0] + re.escape(form) + edge[1])
    return re.compile("|".join(parts) if parts else r"(?!)")


# The one emotion that a completion names, read as in evaluation but less generously.
#
# A policy looks for whatever earns reward, so a reward reads only a short answer in ``<answer>``
# tags, and any second emotion spoils it.


EMOTIONS: tuple[str, ...] = tuple(forms[0] for forms in EMOTION_FORMS)
"""Every emotion whose word forms are known."""


@lru_cache(maxsize=256)
def labels_for(truth: str, classes: tuple[str, ...] | None = None) -> tuple[LabelSet, str | None]:
    """The labels an answer may name, and which of them ``truth`` is (None: none of them).

    Without ``classes`` these are all known emotions and the truth itself.
    """
    labels = emotion_labels(classes or EMOTIONS)
    if classes is None and labels.exact(normalise(truth)) is None:
        labels = emotion_labels((*EMOTIONS, truth))
    return labels, labels.exact(normalise(truth))


def read_label(
    text: str, labels: LabelSet, max_words: int = 8, need_tag: bool = True
) -> str | None:
    """The one label that the answer of a completion names, None where it names none or several.

    Args:
        max_words: a longer answer is not read: a copied prompt may hold the label by chance.
        need_tag: whether the answer must stand in ``<answer>``.
    """
    if need_tag and "<answer>" not in text.lower():
        return None
    if len(answer_text(text).split()) > max_words:
        return None
    return parse(text, labels).label


def same_emotion(word: str) -> str:
    """One name for all forms of an emotion; an unknown word is its own."""
    label = labels_for(EMOTIONS[0])[0].exact(normalise(word))
    return label or normalise(word)
