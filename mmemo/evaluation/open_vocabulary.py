"""Open-vocabulary precision and recall: an answer may name any emotions, in any words.

Per clip, with the named words P and the true words G after words of one meaning became one group:
Acc = |P ∩ G| / |P| (a precision), Recall = |P ∩ G| / |G|, and their mean (OV-MER,
arXiv 2410.01495; CA-MER, arXiv 2508.01181, reports the same three). OV-MER lets GPT-3.5 group the
words of each clip anew, which nobody can repeat; here a grouping is a file or a rule, and is named
beside the number. So these values do not compare with those of the papers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from mmemo.errors import EvaluationError
from mmemo.evaluation.parsing import base_form
from mmemo.evaluation.wheels import NUMBER, Mode, load_wheels

Groups = Callable[[Iterable[str]], set[str]]
"""Words to the groups that they are in."""

FORMS = "forms"
"""The grouping that needs no file: word forms and exact synonyms, as answers are parsed."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision (Acc) and recall of one clip, 0 to 1."""

    precision: float
    recall: float

    @property
    def average(self) -> float:
        return (self.precision + self.recall) / 2


def overlap(
    words: Sequence[str], truth: Sequence[str], grouping: Sequence[Groups]
) -> Overlap | None:
    """Compare an answer's words with the true ones, averaged over the groupings (five wheels, or
    one). An answer without a word scores 0 on both. None where no grouping knows a true word.
    """
    found: list[tuple[float, float]] = []
    for groups in grouping:
        named, true = groups(words), groups(truth)
        if true:
            both = len(named & true)
            found.append((both / len(named) if named else 0.0, both / len(true)))
    if not found:
        return None
    return Overlap(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def load_grouping(name: str, mode: Mode = "corrected") -> Sequence[Groups]:
    """What makes words one group.

    Args:
        name: ``forms``; a JSON file of ``{"happy": ["joyful", "glad"], ...}``, whose other words
            are grouped by their forms; or AffectGPT's ``emotion_wheel`` folder, whose five wheels
            are five groupings.
        mode: how the wheels are read, see :mod:`mmemo.evaluation.wheels`.

    Raises:
        EvaluationError: the file or folder cannot be read.
    """
    if name == FORMS:
        return [_by_form]
    path = Path(name)
    if path.is_dir():
        wheels = load_wheels(path)
        return [lambda words, n=n: wheels.classes(words, n, mode) for n in range(NUMBER)]
    return [_read_groups(path)]


def _by_form(words: Iterable[str]) -> set[str]:
    return {form for word in words if (form := base_form(word))}


@lru_cache(maxsize=4)
def _read_groups(path: Path) -> Groups:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"grouping '{path}' cannot be read ({error}); use 'forms', a JSON file of groups, or "
            "AffectGPT's emotion_wheel folder"
        ) from error
    owner: dict[str, str] = {}
    entries: dict[str, Any] = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    for group, words in entries.items():
        if not isinstance(words, list):
            raise EvaluationError(f"{path}: the group '{group}' must be a list of words")
        for word in (group, *cast("list[object]", words)):
            form = base_form(str(word))
            if owner.setdefault(form, group) != group:
                raise EvaluationError(
                    f"{path}: '{word}' is in the groups '{owner[form]}' and '{group}'; keep one"
                )
    if not owner:
        raise EvaluationError(f'{path}: holds no groups; write {{"happy": ["joyful"], ...}}')
    return lambda words: {owner.get(form, form) for form in _by_form(words)}
