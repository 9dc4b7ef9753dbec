"""Words: open-vocabulary answers, scored as MER-UniBench does (AffectGPT, arXiv 2501.16566).

Three metrics, each on five emotion wheels or on word forms:

- ``set``: precision P = |Y ∩ Ŷ| / |Ŷ| and recall R = |Y ∩ Ŷ| / |Y| of the named classes Ŷ, where Y
  are the true ones. P and R are averaged over the answers on each wheel, F = 2PR / (P + R) is made
  of these means, and the wheels' F are averaged. ``track2`` is MER2025's score, the mean of the F
  on level 1 and level 2 of the wheels.
- ``hit``: the share of answers that name the one true class (hit rate), and how few other classes
  of the data set they name, |Y ∩ Ŷ| / |Ŷ ∩ C| with the classes C of all labels (mscore).
- ``sentiment``: weighted F1 (WAF) and accuracy of positive against negative; a truth of 0 is left
  out.

``official`` repeats the released scorer with its defects. It maps words by the alphabet, leaves an
item out on every wheel that does not know its truth ("neutral" on all of them), drops unknown words
of an answer, which costs no precision, and counts a neutral or unknown sentiment as negative.
``corrected`` maps words to the nearest class, leaves nothing out, and counts such a sentiment as
wrong for both classes.

Both read the text of an answer. Where at least half of the answers of a run are lists in brackets,
``official`` splits them as the released scorer does; else the words come from
:func:`mmemo.answers.open_words.emotion_words`, in place of the model that the release asks.

Shapes: n answers; sums of ``set`` and ``hit`` (..., 2, W, 5): levels, wheels, and P, R, 1, hits and
mscore; sums of ``sentiment`` (..., 2, 3): the truth negative or positive, the answer negative,
positive or neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmemo.answers.completion import answer_text, has_answer_tag
from mmemo.answers.emotion_wheels import (
    NUMBER,
    Level,
    Mode,
    Wheels,
    load_wheels,
    split_official,
    split_words,
)
from mmemo.answers.open_words import emotion_words, sentiment_of, stated_sentiment
from mmemo.answers.parsing import base_form
from mmemo.errors import EvaluationError
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.evaluation.scorers.set_scores import (
    official_f1,
    official_precision,
    official_recall,
    over_groupings,
)
from mmemo.statistics import Floats

FORMS = "forms"
FOLDER = "emotion_wheel"
VARIABLE = "MMEMO_EMOTION_WHEEL"
_LEVELS: tuple[Level, ...] = (1, 2)
_PRECISION, _RECALL, _ONE, _HITS, _MSCORE = range(5)
Words = Sequence[Sequence[str]]


def words(
    *,
    metric: Literal["set", "hit", "sentiment"] = "set",
    mode: Mode = "corrected",
    folder: str | None = None,
) -> Scorer:
    """The scorer of words. The names of its metrics begin with the mode.

    Args:
        metric: which metric, see the module's docstring.
        mode: the released scorer's way, or ours.
        folder: AffectGPT's ``emotion_wheel`` folder, or ``forms`` for word forms and synonyms
            alone; by default the folder that ``MMEMO_EMOTION_WHEEL`` names, or ``emotion_wheel``
            here, or for ``sentiment`` none.

    Raises:
        EvaluationError: there are no wheels, or ``official`` is asked for without them.
    """
    if metric == "sentiment":
        return _sentiment_scorer(mode, find_wheels(folder, needed=False))
    wheels = None if folder == FORMS else find_wheels(folder)
    if wheels is None and mode == "official":
        raise EvaluationError("the official mode needs the wheels; give their folder")

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        sums = _word_sums(rows, wheels, mode)
        return sums, sums[..., _ONE].sum((1, 2)) > 0

    def metric_of(statistic: Callable[[Floats], Floats], level: int, *columns: int) -> Metric:
        def of_sums(sums: Floats) -> Floats:
            return statistic(np.take(sums[..., level, :, :], columns, axis=-1))

        return Metric(of_sums, limits=(0, 1))

    levels = _LEVELS if wheels is not None else _LEVELS[:1]
    found: dict[str, Metric] = {}
    for place, level in enumerate(levels):
        start = f"{mode}_" if level == 1 else f"{mode}_level2_"
        if metric == "hit":
            found[f"{start}hitrate"] = metric_of(_mean_of_wheels, place, _HITS, _ONE)
            found[f"{start}mscore"] = metric_of(_mean_of_wheels, place, _MSCORE, _ONE)
        else:
            columns = (_PRECISION, _RECALL, _ONE)
            found[f"{start}fscore"] = metric_of(official_f1, place, *columns)
            found[f"{start}precision"] = metric_of(official_precision, place, *columns)
            found[f"{start}recall"] = metric_of(official_recall, place, *columns)
    if metric == "set" and wheels is not None:
        found[f"{mode}_track2"] = Metric(_track2, limits=(0, 1))
    return Scorer(values, found)


def find_wheels(folder: str | None = None, *, needed: bool = True) -> Wheels | None:
    """The wheels in a folder, or where ``MMEMO_EMOTION_WHEEL`` or this folder has them.

    Raises:
        EvaluationError: there are none, although they are needed or named.
    """
    named = folder or os.environ.get(VARIABLE)
    if named is None and not Path(FOLDER).is_dir():
        if not needed:
            return None
        raise EvaluationError(
            "MER-UniBench needs AffectGPT's emotion_wheel folder (MERTools, MER2025_Track23); "
            f"name it in the environment variable {VARIABLE}"
        )
    return load_wheels(Path(named or FOLDER))


@dataclass(frozen=True, slots=True)
class Classes:
    """Maps words to classes. ``names(word, wheel, level)`` is None where it drops the word."""

    number: int
    levels: tuple[Level, ...]
    name: Callable[[str, int, Level], str | None]

    def of(self, words: Sequence[str], number: int, level: Level) -> set[str]:
        """The classes of some words."""
        found = {self.name(word, number, level) for word in words}
        return {one for one in found if one is not None}


def classes_of(wheels: Wheels | None, mode: Mode) -> Classes:
    """The classes on five wheels, or the one grouping by forms."""
    if wheels is None:
        return Classes(1, _LEVELS[:1], lambda word, number, level: base_form(word) or None)
    # The same few words occur in all answers.
    mapped = lru_cache(maxsize=None)(wheels.official if mode == "official" else wheels.corrected)
    return Classes(NUMBER, _LEVELS, mapped)


def word_sums(gold: Words, labels: Sequence[str], predicted: Words, classes: Classes) -> Floats:
    """What each answer adds to the sums, (n, levels, W, 5); 0 on wheels that do not know its truth.

    Args:
        gold: the true words of each answer.
        labels: the labels of the data set, of which mscore knows the classes.
        predicted: the words of each answer.
    """
    sums = np.zeros((len(gold), len(classes.levels), classes.number, 5))
    for place, level in enumerate(classes.levels):
        for number in range(classes.number):
            candidates = classes.of(labels, number, level)
            for row, (true_words, said_words) in enumerate(zip(gold, predicted, strict=True)):
                true = classes.of(true_words, number, level)
                if not true:
                    continue
                said = classes.of(said_words, number, level)
                both = len(true & said)
                sums[row, place, number] = (
                    both / len(said) if said else 0.0,
                    both / len(true),
                    1.0,
                    both,
                    both / len(said & candidates) if said & candidates else 0.0,
                )
    return sums


def sentiment_sums(gold: Sequence[float], predicted: Sequence[str], mode: Mode) -> Floats:
    """What each answer adds to the sums, (n, 2, 3); 0 where the truth is 0 or no number.

    Args:
        gold: below 0 negative, above 0 positive.
        predicted: ``positive``, ``negative`` or anything else.
    """
    sums = np.zeros((len(gold), 2, 3))
    places = {"negative": 0, "positive": 1}
    for row, (true, said) in enumerate(zip(gold, predicted, strict=True)):
        if true != 0 and not np.isnan(true):
            sums[row, int(true > 0), places.get(said, 0 if mode == "official" else 2)] = 1.0
    return sums


def waf(sums: Floats) -> Floats:
    """F1 weighted by the support of each class, (..., 2, 3) to (...)."""
    support, named = sums.sum(-1), sums[..., :2].sum(-2)
    right = np.stack([sums[..., 0, 0], sums[..., 1, 1]], -1)
    f1 = ratio(2 * right, support + named, 0.0)
    return ratio((f1 * support).sum(-1), support.sum(-1), np.nan)


def accuracy(sums: Floats) -> Floats:
    """Share of right answers, (..., 2, 3) to (...)."""
    return ratio(sums[..., 0, 0] + sums[..., 1, 1], sums.sum((-2, -1)), np.nan)


def released_text(row: Row) -> str:
    """The text that a released scorer would be given: what was written, or the tagged answer."""
    raw = row.get("raw")
    text = raw if isinstance(raw, str) else ""
    return answer_text(text) if has_answer_tag(text) or "<" in text else text


def are_lists(texts: Sequence[str]) -> bool:
    """Whether at least half of the texts are lists in brackets, as in ``*-openset.npz``."""
    lists = sum(text.lstrip().startswith("[") for text in texts)
    return 2 * lists >= sum(bool(text.strip()) for text in texts)


def are_sentiments(texts: Sequence[str]) -> bool:
    """Whether at least half of the texts are sentiments, as in ``*-openset-sentiment.npz``."""
    stated = sum(stated_sentiment(text) is not None for text in texts)
    return 2 * stated >= sum(bool(text.strip()) for text in texts)


def official_words(rows: Sequence[Row], wheels: Wheels | None) -> Words:
    """The words of each answer as the release has them: lists are split to the letter, and free
    texts are searched."""
    texts = [released_text(row) for row in rows]
    if are_lists(texts):
        return [split_official(text) for text in texts]
    return corrected_words(rows, wheels)


def corrected_words(rows: Sequence[Row], wheels: Wheels | None) -> Words:
    """The words of each answer in any form."""
    forms = None if wheels is None else wheels.forms
    return [emotion_words(str(row.get("raw") or ""), forms) for row in rows]


def sentiments(rows: Sequence[Row], wheels: Wheels | None, mode: Mode) -> list[str]:
    """The sentiment of each answer: what it states, or else what its words express. Where at least
    half of the answers state a sentiment, ``official`` takes each as it is written."""
    texts = [released_text(row) for row in rows]
    if mode == "official" and are_sentiments(texts):
        return texts
    stated = [stated_sentiment(text) for text in texts]
    listed = corrected_words(rows, wheels)
    return [one or sentiment_of(found, wheels) for one, found in zip(stated, listed, strict=True)]


def gold_words(truth: Any, mode: Mode) -> list[str]:
    """The true words of a row: a label, words in brackets, or a list."""
    if mode == "official" or isinstance(truth, list | tuple):
        return split_official(truth)
    return split_words(str(truth), mode)


def label_names(truths: Sequence[Any], mode: Mode) -> list[str]:
    """The labels of a data set. The released scorer maps them as they are written, so that one in
    upper case is unknown to it."""
    if mode == "official":
        whole = {truth for truth in truths if isinstance(truth, str)}
        return sorted(one for one in whole if one == one.lower().strip())
    return sorted({word for truth in truths for word in gold_words(truth, mode)})


def _word_sums(rows: Sequence[Row], wheels: Wheels | None, mode: Mode) -> Floats:
    truths = [row["truth"] for row in rows]
    said = official_words(rows, wheels) if mode == "official" else corrected_words(rows, wheels)
    gold = [gold_words(truth, mode) for truth in truths]
    return word_sums(gold, label_names(truths, mode), said, classes_of(wheels, mode))


def _sentiment_scorer(mode: Mode, wheels: Wheels | None) -> Scorer:
    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        gold = [number_of(row["truth"]) for row in rows]
        sums = sentiment_sums(gold, sentiments(rows, wheels, mode), mode)
        return sums, sums.sum((1, 2)) > 0

    metrics = {
        f"{mode}_waf": Metric(waf, limits=(0, 1)),
        f"{mode}_accuracy": Metric(accuracy, share=True),
    }
    return Scorer(values, metrics)


def number_of(value: Any) -> float:
    """A truth as a number; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _mean_of_wheels(sums: Floats) -> Floats:
    """Mean over the wheels of sums over counts, (..., W, 2) to (...)."""
    return over_groupings(ratio(sums[..., 0], sums[..., 1], np.nan))


def _track2(sums: Floats) -> Floats:
    """Mean of the F on both levels, (..., 2, W, 5) to (...)."""
    return (official_f1(sums[..., 0, :, :3]) + official_f1(sums[..., 1, :, :3])) / 2
