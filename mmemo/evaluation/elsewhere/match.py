"""Which prediction answers which question.

By id, in this order; a later way counts only where the earlier ones find nothing, and only if it
finds exactly one question:

1. ``id``: the question's ``sample_id``, letter by letter.
2. ``file``: the path of a clip of the question, or as much of its end as both have, without the
   ending of media files and in either case: ``videos/dia0_utt3.mp4`` is ``test/dia0_utt3.avi``.
3. ``number``: the same without leading zeros, which spreadsheets cut off: ``42`` is ``00042``.

Never by position, unless that is asked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmemo.errors import DataError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.elsewhere.prediction import Prediction

_MEDIA = re.compile(
    r"\.(?:mp4|avi|mkv|mov|webm|flv|m4v|mpe?g|wav|mp3|flac|m4a|ogg|opus|aac|npy|jpe?g|png|txt)$"
)
WAYS = ("id", "file", "number")


@dataclass(frozen=True, slots=True)
class Matching:
    """``answers``: by the question's place, its prediction. ``ways``: how many were found in which
    way. ``unmatched``: predictions without a question, each with the reason. ``repeated``:
    predictions that say the same again."""

    answers: Mapping[int, Prediction]
    ways: Mapping[str, int]
    unmatched: Sequence[tuple[Prediction, str]]
    repeated: int


def match(questions: Sequence[Question], predictions: Sequence[Prediction], file: str) -> Matching:
    """Match predictions to questions by their ids.

    Raises:
        DataError: two predictions answer one question differently.
    """
    indexes = {way: _index(questions, way) for way in WAYS}
    tasks = {question.task for question in questions}
    answers: dict[int, Prediction] = {}
    ways: Counter[str] = Counter()
    unmatched: list[tuple[Prediction, str]] = []
    repeated = 0
    for one in predictions:
        way, places = _find(one, indexes)
        if one.task in tasks:
            places = [place for place in places if questions[place].task == one.task]
        if len(places) != 1:
            reason = f"fits {len(places)} questions" if places else "has no question"
            unmatched.append((one, reason))
            continue
        place = places[0]
        other = answers.get(place)
        if other is not None and other.text != one.text:
            raise DataError(
                f"{other.name} and {one.name} answer the question "
                f"'{questions[place].sample.sample_id}' differently; keep one",
                file=file,
            )
        if other is not None:
            repeated += 1
            continue
        answers[place] = one
        ways[way] += 1
    return Matching(answers, dict(ways), unmatched, repeated)


def match_by_position(
    questions: Sequence[Question], predictions: Sequence[Prediction], file: str
) -> Matching:
    """The nth prediction answers the nth question, in the order of the benchmark's rows.

    Raises:
        DataError: there are not as many of the one as of the other, or an id is another question's.
    """
    if len(questions) != len(predictions):
        raise DataError(
            f"holds {len(predictions)} predictions for {len(questions)} questions, so they cannot "
            "be matched by position; give ids",
            file=file,
        )
    order = sorted(range(len(questions)), key=lambda place: questions[place].sample.source)
    known = {question.sample.sample_id for question in questions}
    for place, one in zip(order, predictions, strict=True):
        name = questions[place].sample.sample_id
        if known.intersection(one.ids) and name not in one.ids:
            raise DataError(
                f"{one.name} is at the position of the question '{name}'; leave out --by-position",
                file=file,
            )
    answers = dict(zip(order, predictions, strict=True))
    return Matching(answers, {"position": len(answers)}, [], 0)


def _find(
    one: Prediction, indexes: Mapping[str, Mapping[str, list[int]]]
) -> tuple[str, Sequence[int]]:
    for way in WAYS:
        for name in one.ids:
            for key in _keys(name, way):
                places = indexes[way].get(key)
                if places:
                    return way, places
    return "", ()


def _index(questions: Sequence[Question], way: str) -> dict[str, list[int]]:
    """Key to the places of the questions that have it."""
    found: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        sample = question.sample
        names = [sample.sample_id]
        if way != "id":
            names += [ref.path for ref in sample.media.values()]
        for key in dict.fromkeys(key for name in names for key in _keys(name, way)):
            found.setdefault(key, []).append(place)
    return found


def _keys(name: str, way: str) -> list[str]:
    """The keys of a name, the longest first."""
    if way == "id":
        return [name]
    plain = unicodedata.normalize("NFC", name).strip().casefold().replace("\\", "/")
    parts = [part for part in _MEDIA.sub("", plain).split("/") if part not in ("", ".", "..")]
    if way == "number":
        parts = [part.lstrip("0") or "0" for part in parts[-1:] if part.isdecimal()]
    return ["/".join(parts[start:]) for start in range(len(parts))]
