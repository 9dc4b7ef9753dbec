"""The labels that an answer may name, in every form that means one of them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mmemo.answers.words import NEVER, emotion_forms, labelled_languages, lower, simplified
from mmemo.errors import EvaluationError

EMOTION_FORMS: tuple[tuple[str, ...], ...] = tuple(emotion_forms().values())
"""The forms of each emotion in every language, its base form first. Only forms and exact synonyms:
"worried" is not "afraid", because MER2023 and CA-MER count them apart."""

EMOTIONS: tuple[str, ...] = (
    *("angry", "happy", "sad", "fear", "surprise", "disgust", "neutral", "calm", "contempt"),
    *("worried", "anxious", "doubt", "helpless", "disappointed", "excited", "frustrated"),
)
"""The emotions that an answer may name where no label set is given."""

_BASE = {form: base for base, forms in emotion_forms().items() for form in forms}
_ABBREVIATED = {
    short: emotion
    for language in labelled_languages().values()
    for emotion, short in language.abbreviations.items()
}

YES_NO: Mapping[str, tuple[str, ...]] = {
    "yes": ("yeah", "yep", "yup", "true", "是的", "是", "对"),
    "no": ("nope", "nah", "false", "不是", "没有", "否"),
}

_LETTER = r"[^\W_\u2e80-\U0010ffff]"  # "_happy_" is happy, and so is "是happy"
# The vowel signs of Indic scripts are no letters to `re`, but राग is not within अनुराग.
_INDIC = "[\u0900-\u0dff]"
_EDGES = (f"(?<!{_LETTER})(?<!{_INDIC})", f"(?!{_LETTER})(?!{_INDIC})")
_LONGEST_FORM = 200  # characters, with what normalising removes
_SIGNED = re.compile(r"-\d+(?:\.\d+)?")
_BRACKETED = r"[(\[{{]\s*{0}\s*[)\]}}]"
# After these a single letter is a choice, and before those an upper-case one is no article.
_CHOSEN = r"(?:options?|answer|choice|choose|select|pick|letter|is|it's|选项|选择|选|答案|是)"
_BOUND = (r"(?<![^\W\u2e80-\U0010ffff]|['’])", r"(?![^\W\u2e80-\U0010ffff]|['’])")
_NO_ARTICLE = _BOUND[1] + r"(?! (?!(?:and|or|is|because|since|but|as|are|was|seems|fits)\b)[a-z])"


@dataclass(frozen=True, slots=True)
class Mention:
    """A label that a text names at ``start`` to ``end``."""

    start: int
    end: int
    label: str


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
    _words: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _letters: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        canonical: dict[str, str] = {}
        forms: set[str] = set()
        unknown = set(self.aliases) - set(self.labels)
        if unknown:
            raise EvaluationError(f"'{min(unknown)}' has aliases but is not a label; remove them")
        for label in self.labels:
            for form in (label, *self.aliases.get(label, ())):
                forms.add(" ".join(lower(form).split()))
                key = normalise(form)
                if not key or canonical.get(key, label) != label:
                    owner = canonical.get(key, "nothing")
                    raise EvaluationError(
                        f"label form '{form}' of '{label}' already means {owner}; make forms unique"
                    )
                canonical[key] = label
        # The dataclass is frozen, so derived fields can only be set this way.
        object.__setattr__(self, "_canonical", canonical)
        object.__setattr__(self, "_words", _words(forms | set(canonical)))
        object.__setattr__(self, "_letters", _letters(canonical))

    @property
    def forms(self) -> Mapping[str, str]:
        """Every normalised form and its label."""
        return self._canonical

    def exact(self, text: str) -> str | None:
        """The label that the whole normalised ``text`` is a form of, or None."""
        return self._canonical.get(text)

    def whole(self, text: str) -> str | None:
        """The label that the whole ``text`` is a form of, or None."""
        return None if len(text) > _LONGEST_FORM else self._canonical.get(normalise(text))

    def find(self, text: str) -> list[Mention]:
        """The labels that ``text`` names, in order. The letter of a choice must be marked as one:
        in brackets, at the start as in "B) ...", after "option", or in upper case where it can be
        no English word."""
        found = [
            Mention(*one.span(), self._canonical[normalise(one.group())])
            for one in self._words.finditer(lower(text))
        ]
        if self._letters is not NEVER:
            taken = text
            for one in found:
                taken = taken[: one.start] + "\n" * (one.end - one.start) + taken[one.end :]
            for one in self._letters.finditer(taken):
                group = next(name for name, value in one.groupdict().items() if value is not None)
                label = self._canonical[normalise(one.group(group))]
                found.append(Mention(*one.span(group), label))
            found.sort(key=lambda one: one.start)
        return found

    def mentions(self, text: str) -> list[tuple[int, str]]:
        """Start and label of each mention in ``text``, in order."""
        return [(one.start, one.label) for one in self.find(text)]


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
    aliases = {
        own[0]: tuple(form for form in emotion_forms()[emotion] if form != normalise(own[0]))
        for emotion, own in owners.items()
        if len(own) == 1
    }
    return LabelSet(wanted, aliases)


def yes_no() -> LabelSet:
    """The label set of a yes/no question."""
    return LabelSet(tuple(YES_NO), YES_NO)


def label_set(labels: LabelSet | Iterable[str]) -> LabelSet:
    """``labels`` themselves if they are a label set, else the set of these labels: those of a
    yes/no question, or emotions with their forms. A single text is the name of a registered set,
    such as ``dfew``.

    Raises:
        EvaluationError: there is no set of that name.
    """
    if isinstance(labels, str):
        # Imported here: the registry makes its label sets with this module.
        from mmemo.answers import label_sets

        return label_sets.label_set(labels)
    return labels if isinstance(labels, LabelSet) else _label_set(tuple(labels))


@lru_cache(maxsize=256)
def _label_set(labels: tuple[str, ...]) -> LabelSet:
    plain = {normalise(label): label for label in labels}
    if set(plain) == set(YES_NO):
        return LabelSet(labels, {plain[name]: forms for name, forms in YES_NO.items()})
    return emotion_labels(labels)


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


def normalise(text: str) -> str:
    """Lower case, single spaces between words, and no punctuation at either end."""
    # NFKC makes full-width letters plain; contractions are matched with a plain apostrophe.
    text = simplified(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))
    # A hyphen joins words; before a number of its own it is a minus, as in the -1 of a sentiment.
    text = re.sub(r"(?:(?!(?<!\w)-\d)[\s_\-])+", " ", text)
    return text.strip(" .,;:!?\"'`()[]{}*#")


def base_form(word: str) -> str:
    """The base form of an emotion word: "joyful" and "Happiness" become "happy". Any other word is
    only normalised."""
    normal = normalise(word)
    return _BASE.get(normal, normal)


def labels_removed(normal: str, labels: LabelSet) -> str:
    """``normal`` without the label mentions, so that "no emotion" does not deny itself."""
    return labels._words.sub(" ", normal)  # pyright: ignore[reportPrivateUsage]


def spaced(form: str) -> bool:
    """Whether the script of ``form`` has spaces between words, and so word boundaries to match."""
    return all(ord(char) < 0x2E80 for char in form)


def _words(forms: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any form of several characters as a whole word, longer forms first."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    firsts: set[str] = set()
    for form in sorted(forms, key=lambda form: (-len(form), form)):
        if len(form) > 1:
            # normalise() has made one space of hyphens, underscores and other space.
            words = [form] if _SIGNED.fullmatch(form) else re.split(r"[\s_-]+", form)
            parts[spaced(form)].append(r"[\s_\-]+".join(map(re.escape, words)))
            firsts.add(re.escape(form[0]))
    if not firsts:
        return NEVER
    whole = rf"{_EDGES[0]}(?:{'|'.join(parts[True])}){_EDGES[1]}" if parts[True] else ""
    both = "|".join(part for part in (whole, *parts[False]) if part)
    # Most places of a text begin no form, so its first letter is looked at first.
    return re.compile(rf"(?=[{''.join(sorted(firsts))}])(?:{both})")


def _letters(forms: Mapping[str, str]) -> re.Pattern[str]:
    """A pattern of the labels of one character, marked as a choice; its group holds the letter."""
    single = [form for form in forms if len(form) == 1]
    if not single:
        return NEVER
    any_case = "[" + "".join(re.escape(one + one.upper()) for one in single) + "]"
    upper = [one.upper() for one in single if one.isascii() and one.isalpha()]
    parts = [
        _BRACKETED.format(f"(?P<bracket>{any_case})"),
        rf"(?:(?<=\n)|\A)\W*(?P<first>{any_case})(?=\W*(?:\n|\Z)|[).:,、，。]\W|[).:][^\W\d]|\s*[-–—:]\s|[\u4e00-\u9fff])",
        rf"(?<![\w'’])(?P<closed>{any_case})\)",
        rf"(?<!\w)(?i:{_CHOSEN})\W{{0,4}}(?P<last>{any_case})(?=\W*(?:\n|\Z)|[.,;)]\s)",
    ]
    # The letters of a list, in either case: "a, b".
    glue, bare = r"\s*(?:[,;/&、或和与]|\b(?:and|or)\b)\s*", _BOUND[0]
    parts.append(rf"{bare}(?P<listed>{any_case})(?={glue}{any_case}(?!\w))")
    after = r"(?=\s*(?:[,;/&.、。)或和与]|\Z|\n|(?:and|or)\b))"
    parts.append(rf"(?:[,;/&、或和与]\s*|\b(?:and|or)\s+)(?P<more>{any_case}){after}")
    digits = "".join(one for one in single if one.isdecimal())
    if digits:
        parts.append(rf"(?<![\w.,])(?<!\s-)(?<!\A-)(?P<digit>[{digits}])(?![\w%]|[.,]\d)")
    if upper:
        letters = "".join(upper)
        # "I. D. card" has initials.
        initials = "".join(one for one in string.ascii_uppercase if one not in upper)
        initial = rf"(?<![{initials}]\. )" if initials else ""
        parts.append(rf"{_BOUND[0]}{initial}(?P<upper>[{letters}]){_NO_ARTICLE}")
        parts.append(rf"(?<=[\u4e00-\u9fff：:])(?P<beside>[{letters}])(?![a-zA-Z])")
        parts.append(rf"(?<=[Oo]ption )(?P<option>[{letters}])(?!\w)")
        sure = "".join(one for one in upper if one not in "AI")
        if sure:
            parts.append(rf"{_BOUND[0]}{initial}(?P<sure>[{sure}]){_BOUND[1]}")
    return re.compile("|".join(parts))


class ChoiceSet(LabelSet):
    """The letters of choices. An answer that is the text of a choice, and nothing else, names its
    letter; inside a longer answer only letters do, for its reasons may speak of several choices.

    Args:
        choices: their texts, 1 to 26. Equal ones stand for no letter.
    """

    __slots__ = ()

    def __init__(self, choices: Sequence[str]) -> None:
        letters = string.ascii_uppercase[: len(choices)]
        plain = [normalise(text) for text in choices]
        aliases = {
            letter: (text,)
            for letter, text, form in zip(letters, choices, plain, strict=True)
            if form and form.upper() not in set(letters) and plain.count(form) == 1
        }
        super().__init__(tuple(letters), aliases)
        object.__setattr__(self, "_words", NEVER)
