"""The label sets of the field: their labels, how files and answers write them, and how one set maps
to another. The data are in ``label_sets.toml``, the words of each language in ``languages/``.

Sets are mapped by meaning and never merged silently. A label gets the target's label for the same
emotion, or none and the reason: "worried" of MER2023 is not "fear", because CA-MER counts them
apart. Only a set's own convention joins two emotions, as IEMOCAP's four classes count excitement as
happiness.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmemo.answers.label_set import LabelSet, normalise
from mmemo.answers.words import emotion_forms, labelled_languages
from mmemo.config import nearest
from mmemo.errors import EvaluationError

_FILE = Path(__file__).with_name("label_sets.toml")
_SHORTEST_CODE = 3
"""Letters of a code that an answer may also say. A shorter one may be the letter of a choice."""


@dataclass(frozen=True, slots=True)
class EmotionLabel:
    """One label of a set.

    ``emotion`` is the base form of what it means, ``covers`` are the other emotions that the set
    counts as this label, ``codes`` is how files write it, and ``forms`` what an answer may say for
    it in this set, by language.
    """

    name: str
    emotion: str
    covers: tuple[str, ...]
    codes: tuple[str, ...]
    forms: Mapping[str, tuple[str, ...]]

    @property
    def emotions(self) -> tuple[str, ...]:
        """All emotions that the set counts as this label, its own first."""
        return (self.emotion, *self.covers)

    def called(self, language: str) -> str:
        """The label's name in a language, ``en`` for the set's own."""
        if language == "en":
            return self.name
        own = self.forms.get(language) or labelled_languages()[language].labels[self.emotion]
        return own[0]

    @property
    def words(self) -> tuple[str, ...]:
        """Everything that an answer may say for the label, in any language."""
        spoken = [form for emotion in self.emotions for form in emotion_forms()[emotion]]
        own = [form for forms in self.forms.values() for form in forms]
        codes = [c for c in self.codes if c.isalpha() and len(c) >= _SHORTEST_CODE]
        return (self.name, *spoken, *own, *codes)


@dataclass(frozen=True, slots=True)
class EmotionSet:
    """The label set of a data set. ``also`` are other names of the set."""

    name: str
    title: str
    source: str
    also: tuple[str, ...]
    labels: tuple[EmotionLabel, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The labels as the set writes them, in its order."""
        return tuple(label.name for label in self.labels)

    @property
    def by_code(self) -> dict[str, str]:
        """How files write each label -> its name."""
        return {code: label.name for label in self.labels for code in label.codes}

    def find(self, written: str) -> EmotionLabel:
        """The label that a file or an answer writes as ``written``: a code such as ``05`` or
        ``exc``, or a form in any language.

        Raises:
            EvaluationError: the set has no such label.
        """
        # Codes first: in EMO-DB's files, "A" is fear.
        for label in self.labels:
            if written.strip() in label.codes:
                return label
        key = normalise(written)
        for label in self.labels:
            if key in map(normalise, (*label.codes, *label.words)):
                return label
        raise EvaluationError(
            f"'{written}' is no label of {self.name}; its labels are {', '.join(self.names)}"
        )

    def label_set(self, language: str = "en") -> LabelSet:
        """The set as answers are read with. Forms of every language are read; ``language`` is that
        of the labels, ``en`` or ``zh``.

        Raises:
            EvaluationError: there are no words of the language.
        """
        known = labelled_languages()
        if language not in known:
            raise EvaluationError(
                f"there are no labels in language '{language}'; use {' or '.join(known)}"
            )
        aliases = {label.called(language): label.words for label in self.labels}
        return LabelSet(tuple(aliases), aliases)


@dataclass(frozen=True, slots=True)
class MappedLabel:
    """Where a label goes. ``target`` is None where the other set has no label for it, and
    ``reason`` says why."""

    label: str
    target: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class LabelMapping:
    """The mapping of every label of one set to another set. See :func:`mapping`."""

    source: EmotionSet
    target: EmotionSet
    rows: tuple[MappedLabel, ...]

    def __getitem__(self, written: str) -> MappedLabel:
        """Where the label goes that a file or an answer writes as ``written``.

        Raises:
            EvaluationError: the source has no such label.
        """
        name = self.source.find(written).name
        return next(row for row in self.rows if row.label == name)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The labels without a target."""
        return tuple(row.label for row in self.rows if row.target is None)

    @property
    def merged(self) -> Mapping[str, tuple[str, ...]]:
        """Each target that more than one label goes to, and those labels."""
        counts = Counter(row.target for row in self.rows)
        return {
            target: tuple(row.label for row in self.rows if row.target == target)
            for target, count in counts.items()
            if target is not None and count > 1
        }

    @property
    def by_code(self) -> dict[str, str]:
        """How the source's files write each label -> its target; without the dropped ones."""
        targets = {row.label: row.target for row in self.rows}
        codes = self.source.by_code
        return {code: to for code, name in codes.items() if (to := targets[name]) is not None}

    def table(self) -> list[dict[str, str]]:
        """One row for each label: what it becomes, and why."""
        return [
            {"label": row.label, "becomes": row.target or "(dropped)", "why": row.reason}
            for row in self.rows
        ]

    def describe(self) -> str:
        """What the mapping joins and loses, in a sentence for a log or a results table."""
        if self.source == self.target:
            return f"labels of {self.source.name}: {', '.join(self.source.names)}"
        joined = [f"{' and '.join(labels)} become {to}" for to, labels in self.merged.items()]
        if self.dropped:
            joined.append(f"{self.target.name} has no label for {', '.join(self.dropped)}")
        what = "; ".join(joined) or "one label for each"
        return f"labels of {self.source.name} as labels of {self.target.name}: {what}"


@dataclass(frozen=True, slots=True)
class Circumplex:
    """Where an emotion lies on the circumplex of affect (Russell 1980).

    ``degrees`` run counter-clockwise from pleasure over arousal, and are None at the neutral
    centre; ``distance`` from it is 0 to 1. ``source`` is ``russell``, or ``placed``: by us, without
    a measurement behind it.
    """

    degrees: float | None
    distance: float
    source: str

    @property
    def valence(self) -> float:
        """Displeasure (-1) to pleasure (1)."""
        return self.distance * math.cos(math.radians(self.degrees or 0.0))

    @property
    def arousal(self) -> float:
        """Sleepiness (-1) to arousal (1)."""
        return self.distance * math.sin(math.radians(self.degrees or 0.0))


def set_names() -> tuple[str, ...]:
    """The name of every registered label set."""
    return tuple(_registry())


def emotion_set(name: str) -> EmotionSet:
    """A registered label set, by its name or another name of it, such as ``mosei``.

    Raises:
        EvaluationError: there is no such set.
    """
    sets = _registry()
    for found in sets.values():
        if _plain(name) in map(_plain, (found.name, *found.also)):
            return found
    guess = nearest(name.casefold(), [one for s in sets.values() for one in (s.name, *s.also)])
    hint = f"did you mean '{guess}'?" if guess else f"the sets are {', '.join(sets)}"
    raise EvaluationError(f"there is no label set '{name}'; {hint}")


def label_set(name: str, language: str = "en") -> LabelSet:
    """The registered set ``name`` as answers are read with. See :meth:`EmotionSet.label_set`.

    Raises:
        EvaluationError: there is no such set, or no words of the language.
    """
    return emotion_set(name).label_set(language)


def mapping(source: str, target: str) -> LabelMapping:
    """Map each label of one registered set to a label of another.

    A label goes to the target's label for the same emotion. It goes nowhere where the target has
    none, and where it covers emotions that the target counts apart: "happy" of ``iemocap4`` may be
    "happy" or "excited" of ``iemocap6``.

    Raises:
        EvaluationError: there is no such set.
    """
    here, there = emotion_set(source), emotion_set(target)
    return LabelMapping(here, there, tuple(_mapped(label, here, there) for label in here.labels))


def circumplex(emotion: str) -> Circumplex:
    """Where an emotion lies on the circumplex.

    Args:
        emotion: any form of it, in any language.

    Raises:
        EvaluationError: the emotion is not known.
    """
    key = normalise(emotion)
    for base, forms in emotion_forms().items():
        if key in forms:
            return _places()[base]
    raise EvaluationError(
        f"no place on the circumplex is known for '{emotion}'; the emotions are "
        f"{', '.join(_places())}"
    )


def set_table() -> list[dict[str, str]]:
    """One row for each registered set: what the command line and the documentation show."""
    return [
        {
            "set": found.name,
            "data": found.title,
            "also": ", ".join(found.also),
            "labels": ", ".join(found.names),
            "source": found.source,
        }
        for found in _registry().values()
    ]


def label_table(name: str) -> list[dict[str, str]]:
    """One row for each label of a set.

    Raises:
        EvaluationError: there is no such set.
    """
    return [_row(label) for label in emotion_set(name).labels]


def _plain(name: str) -> str:
    """Without case and separators: "CREMA-D" is ``crema_d``."""
    return re.sub(r"[\W_]+", "", name.casefold())


def _row(label: EmotionLabel) -> dict[str, str]:
    place = circumplex(label.emotion)
    # One spelling of each, and not the Chinese ones, which have a column.
    spelled = {normalise(word): word for word in reversed(label.words) if word[0] < "\u2e80"}
    also = [word for key, word in reversed(spelled.items()) if key != normalise(label.name)]
    return {
        "label": label.name,
        "codes": ", ".join(label.codes),
        "Chinese": label.called("zh"),
        "read as well": ", ".join(also),
        "valence": f"{place.valence:.2f}",
        "arousal": f"{place.arousal:.2f}",
        "angle": "-" if place.degrees is None else f"{place.degrees:g}°",
        "place": place.source,
    }


def _mapped(label: EmotionLabel, here: EmotionSet, there: EmotionSet) -> MappedLabel:
    found = [one for one in there.labels if set(one.emotions) & set(label.emotions)]
    if not found:
        return MappedLabel(label.name, None, f"{there.name} has no label for {label.emotion}")
    if len(found) > 1:
        apart = " and ".join(one.name for one in found)
        why = f"{here.name} counts as {label.name} what {there.name} counts apart: {apart}"
        return MappedLabel(label.name, None, why)
    target = found[0]
    if label.emotion not in target.emotions:
        why = f"{there.name} has no label for {label.emotion}, only for {target.name}"
        return MappedLabel(label.name, None, why)
    lost = [emotion for emotion in label.emotions if emotion not in target.emotions]
    reason = "the same emotion"
    if label.emotion != target.emotion:
        reason = f"{there.name} counts {label.emotion} as {target.name}"
    if lost:
        reason += f"; in {here.name} it may also be {' or '.join(lost)}, which {there.name} lacks"
    return MappedLabel(label.name, target.name, reason)


@lru_cache(maxsize=1)
def _data() -> Mapping[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _registry() -> Mapping[str, EmotionSet]:
    return {name: _read(name, values) for name, values in _data()["sets"].items()}


def _read(name: str, values: Mapping[str, Any]) -> EmotionSet:
    def of(table: str, label: str) -> tuple[str, ...]:
        return tuple(values.get(table, {}).get(label, ()))

    forms: Mapping[str, Mapping[str, Sequence[str]]] = values.get("forms", {})
    labels = tuple(
        EmotionLabel(
            label,
            emotion,
            of("covers", label),
            of("codes", label),
            {code: tuple(own[label]) for code, own in forms.items() if label in own},
        )
        for label, emotion in values["labels"].items()
    )
    also = tuple(values.get("also", ()))
    return EmotionSet(name, values["title"], values["source"], also, labels)


@lru_cache(maxsize=1)
def _places() -> Mapping[str, Circumplex]:
    tables = _data()["circumplex"]
    places = {word: Circumplex(float(at), 1.0, "russell") for word, at in tables["russell"].items()}
    for word, (degrees, distance) in tables["placed"].items():
        at = float(degrees) if distance else None
        places[word] = Circumplex(at, float(distance), "placed")
    return places
