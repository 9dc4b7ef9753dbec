"""Parse a model's text into one label of a closed set, or into a counted failure.

An answer is ``ok``, ``refused`` or ``malformed``. The last two count as wrong answers and are never
dropped. Parsing is strict: an answer that names several labels, or denies the one it names, is
malformed. :func:`parse` reads answers for evaluation, :func:`read_label` for rewards.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mmemo.answers.words import emotion_forms, languages
from mmemo.errors import EvaluationError

PARSER_VERSION = "1"
"""Written into results. Raise it with every change that can alter how an answer is read."""

Status = Literal["ok", "refused", "malformed"]
STATUSES: tuple[Status, ...] = ("ok", "refused", "malformed")

EMOTION_FORMS: tuple[tuple[str, ...], ...] = tuple(emotion_forms().values())
"""The forms of each emotion in every language, its base form first. Only forms and exact synonyms:
"worried" is not "afraid", because MER2023 and CA-MER count them apart."""

EMOTIONS: tuple[str, ...] = (
    *("angry", "happy", "sad", "fear", "surprise", "disgust", "neutral", "calm", "contempt"),
    *("worried", "anxious", "doubt", "helpless", "disappointed", "excited", "frustrated"),
)
"""The emotions that an answer may name where no label set is given."""

_BASE = {form: forms[0] for forms in EMOTION_FORMS for form in forms}
_ABBREVIATED = {
    short: emotion
    for language in languages().values()
    for emotion, short in language.abbreviations.items()
}

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
    """The labels an answer may name, and their other word forms.

    Args:
        labels: the labels, in the order in which reports list them.
        aliases: label -> its other forms.

    Raises:
        EvaluationError: a form belongs to two labels, or an alias to no label.
    """

    labels: tuple[str, ...]
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    _canonical: Mapping[str, str] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        canonical: dict[str, str] = {}
        unknown = set(self.aliases) - set(self.labels)
        if unknown:
            raise EvaluationError(f"'{min(unknown)}' has aliases but is not a label; remove them")
        for label in self.labels:
            for form in (label, *self.aliases.get(label, ())):
                key = normalise(form)
                if not key or canonical.get(key, label) != label:
                    owner = canonical.get(key, "nothing")
                    raise EvaluationError(
                        f"label form '{form}' of '{label}' already means {owner}; make forms unique"
                    )
                canonical[key] = label
        # The dataclass is frozen, so derived fields can only be set this way.
        object.__setattr__(self, "_canonical", canonical)
        object.__setattr__(self, "_pattern", _mention_pattern(canonical))

    def exact(self, text: str) -> str | None:
        """The label that the whole normalised ``text`` is a form of, or None."""
        return self._canonical.get(text)

    def mentions(self, text: str) -> list[tuple[int, str]]:
        """Start and label of each whole-word mention in the normalised ``text``, in order."""
        return [
            (found.start(), self._canonical[found.group().strip("().:")])
            for found in self._pattern.finditer(text)
        ]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed answer. ``text`` is the part that was read. ``label`` is set exactly when ``status``
    is ``ok``, except for open questions, which have no labels."""

    status: Status
    label: str | None
    text: str


def emotion_labels(labels: Iterable[str]) -> LabelSet:
    """The label set of an emotion benchmark: each label with the forms of its emotion.

    The forms are those of every language, so that "Happiness" and "高兴" answer "happy". A label
    may be such a form itself, or an abbreviation such as "HAP".

    Two labels of the benchmark that are forms of one emotion get no aliases.
    """
    wanted = tuple(labels)
    owners: dict[str, list[str]] = {}
    for label in wanted:
        normal = normalise(label)
        emotion = _BASE.get(normal) or _ABBREVIATED.get(normal)
        if emotion is not None:
            owners.setdefault(emotion, []).append(label)
    forms = emotion_forms()
    aliases = {
        own[0]: tuple(form for form in forms[emotion] if form != normalise(own[0]))
        for emotion, own in owners.items()
        if len(own) == 1
    }
    return LabelSet(wanted, aliases)


def yes_no() -> LabelSet:
    """The label set of a yes/no question."""
    return LabelSet(tuple(YES_NO), YES_NO)


def parse(text: str, labels: LabelSet) -> Parsed:
    """Parse one answer.

    The text after the last ``<answer>`` counts, up to its end tag, or to the end if the generation
    was cut off. Without the tag, all text outside ``<think>`` counts. A label of one character (the
    letter of a choice) must be the whole answer, begin it as in "B) ...", or be in brackets,
    because "a" is also an English article.
    """
    answer = answer_text(text)
    normal = normalise(answer)
    # An exact form goes before the refusals: "unclear" may be a label.
    exact = labels.exact(normal)
    if exact is not None:
        return Parsed("ok", exact, answer)
    if _REFUSAL.search(normal):
        return Parsed("refused", None, answer)
    mentions = labels.mentions(normal)
    # One label that is repeated is still one answer; two labels are a guess at both.
    if len({label for _, label in mentions}) != 1:
        return Parsed("malformed", None, answer)
    start, label = mentions[0]
    # If a label is itself a negation ("no"), only a negation in front of it denies it.
    denied = any(_NEGATION.fullmatch(normalise(name)) for name in labels.labels)
    if _NEGATION.search(normal[:start] if denied else labels_removed(normal, labels)):
        return Parsed("malformed", None, answer)
    return Parsed("ok", label, answer)


def parse_open(text: str) -> Parsed:
    """Parse an answer to an open question: ``ok`` if it has words and does not refuse. It has no
    label; open-vocabulary scores read its words."""
    answer = answer_text(text)
    normal = normalise(answer)
    if not normal:
        return Parsed("malformed", None, answer)
    return Parsed("refused" if _REFUSAL.search(normal) else "ok", None, answer)


@lru_cache(maxsize=256)
def labels_for(truth: str, classes: tuple[str, ...] | None = None) -> tuple[LabelSet, str | None]:
    """The label set to read an answer with, and the label of ``truth`` in it.

    Args:
        truth: the true emotion, in any form.
        classes: the labels an answer may name; None allows every known emotion and ``truth``.

    Returns:
        The label set, and the label that ``truth`` is a form of, or None if it is none.
    """
    labels = emotion_labels(classes or EMOTIONS)
    if classes is None and labels.exact(normalise(truth)) is None:
        labels = emotion_labels((*EMOTIONS, truth))
    return labels, labels.exact(normalise(truth))


def read_label(
    text: str, labels: LabelSet, max_words: int = 8, need_tag: bool = True
) -> str | None:
    """The one label that the answer of a completion names, or None, as rewards read it.

    A policy searches for whatever earns reward, so this is stricter than :func:`parse`: only a
    short answer counts, and by default only one in ``<answer>`` tags.

    Args:
        text: the completion.
        labels: the labels an answer may name.
        max_words: longest answer that is read; a copied prompt may hold the label by chance.
        need_tag: whether the answer must be in ``<answer>`` tags.
    """
    if need_tag and "<answer>" not in text.lower():
        return None
    if len(answer_text(text).split()) > max_words:
        return None
    return parse(text, labels).label


def answer_text(text: str) -> str:
    """The answer inside a generation, without its reasoning and tags."""
    starts = list(_ANSWER.finditer(text))
    if starts:
        # The last tag counts, because a model may name the tag while it reasons.
        tail = text[starts[-1].end() :]
        end = _ANSWER_END.search(tail)
        return (tail[: end.start()] if end else tail).strip()
    return _THINK.sub(" ", text).strip()


def answer_start(text: str) -> int | None:
    """The index where the answer of a generation begins: at its last ``<answer>`` tag, else after
    its reasoning. None if the reasoning was cut off."""
    tags = list(_ANSWER.finditer(text))
    if tags:
        return tags[-1].start()
    thoughts = list(_THINK.finditer(text))
    if not thoughts:
        return 0
    return thoughts[-1].end() if thoughts[-1].group(1) else None


def normalise(text: str) -> str:
    """Lower case, single spaces between words, and no punctuation at either end."""
    # NFKC makes full-width letters plain; contractions are matched with a plain apostrophe.
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"[\s_\-]+", " ", text)
    return text.strip(" .,;:!?\"'`()[]{}*#")


def base_form(word: str) -> str:
    """The base form of an emotion word: "joyful" and "Happiness" become "happy". Any other word is
    only normalised."""
    normal = normalise(word)
    return _BASE.get(normal, normal)


def labels_removed(normal: str, labels: LabelSet) -> str:
    """``normal`` without the label mentions, so that "no emotion" does not deny itself."""
    return labels._pattern.sub(" ", normal)  # pyright: ignore[reportPrivateUsage]


def _mention_pattern(forms: Mapping[str, str]) -> re.Pattern[str]:
    """A pattern that matches any form as a whole word, longer forms first."""
    parts: list[str] = []
    for form in sorted(forms, key=len, reverse=True):
        if len(form) == 1:
            letter = re.escape(form)
            # normalise() has removed brackets at both ends of the answer.
            parts.append(rf"\({letter}\)|\({letter}\Z|\A{letter}[).:](?!\w)")
            continue
        # Scripts without spaces between words have no word boundaries to match.
        spaced = all(ord(char) < 0x2E80 for char in form)
        edge = (r"(?<!\w)", r"(?!\w)") if spaced else ("", "")
        parts.append(edge[0] + re.escape(form) + edge[1])
    return re.compile("|".join(parts) if parts else r"(?!)")
