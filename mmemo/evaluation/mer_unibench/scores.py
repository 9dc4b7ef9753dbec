"""MER-UniBench: the official score of each of its nine sets, and the table of all.

The metric is AffectGPT's (ICML 2025, arXiv 2501.16566, as its release computes it), described in
:mod:`mmemo.evaluation.scorers.words`. A paper's figure is the best of several checkpoints on the
test set, chosen for each set on its own, which no single model reaches.

``official_score`` takes labels and answers that belong together by position. The released scorer
looks answers up by name; :func:`aligned` does that, and takes MER2024's, whose published labels and
answers have unlike names, by their position.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmemo.answers.emotion_wheels import Mode, Wheels, load_wheels, split_official
from mmemo.answers.kinds import Text
from mmemo.answers.open_words import SENTIMENTS, stated_sentiment
from mmemo.data.merbench import SETS, UniSet, set_named
from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.words import (
    accuracy,
    are_lists,
    are_sentiments,
    classes_of,
    find_wheels,
    gold_words,
    label_names,
    number_of,
    official_words,
    released_text,
    sentiment_sums,
    sentiments,
    waf,
    word_sums,
)
from mmemo.evaluation.task import Task
from mmemo.statistics import Floats

MODES: tuple[Mode, ...] = ("official", "corrected")
QUESTION = (
    "Which emotions does this person feel? Name every one that applies, as English words "
    "separated by commas, and nothing else."
)
PRIMARY = {"hit": "hitrate", "set": "fscore", "sentiment": "waf"}
"""The metric of a set that enters the mean of all nine."""


def official_score(
    set_name: str,
    gold: Sequence[Any],
    predicted: Sequence[Any],
    wheels: Wheels | Path | str | None = None,
) -> dict[str, float]:
    """The numbers that the released scorer gives the answers to a set, the primary one first.

    Args:
        set_name: the set in any usual spelling; or a metric (``hit``, ``set``, ``sentiment``) for
            the labels of any other set, such as those of MER2025's second track.
        gold: labels; numbers for the sets of sentiment; for OV-MERD+ lists of words, as lists or
            as ``"[happy, moved]"``.
        predicted: the answer to each, in the same order: ``"[happy, moved]"`` as the release's
            ``*-openset.npz`` has it; for the sets of sentiment ``positive``, ``negative`` or
            anything else, as in ``*-openset-sentiment.npz``. Empty or None for none.
        wheels: AffectGPT's ``emotion_wheel`` folder, by default where :func:`find_wheels` looks.

    Returns:
        ``hitrate`` and ``mscore``; or ``fscore``, ``precision`` and ``recall``, the three on the
        second level (``level2_...``), and MER2025's ``track2``; or ``waf`` and ``accuracy``. With
        wheels also the kept items and each number of each wheel (``wheel1_kept``, ...). An F of
        precision and recall 0 is 0, where the released scorer divides by zero.

    Raises:
        EvaluationError: the numbers of labels and answers differ, or the wheels cannot be read.
        ConfigError: there is no such set.
    """
    one = None if set_name in PRIMARY else set_named(set_name)
    metric = set_name if one is None else one.metric
    if len(gold) != len(predicted):
        raise EvaluationError(
            f"{set_name}: there are {len(gold)} labels and {len(predicted)} answers; give one each"
        )
    if metric == "sentiment":
        said = [_released_sentiment(answer) for answer in predicted]
        if any(said) and not any(map(stated_sentiment, said)):
            raise EvaluationError(
                f"{set_name}: no answer is {', '.join(SENTIMENTS)}; give the sentiments that the "
                "release makes of the words (*-openset-sentiment.npz)"
            )
        return _sentiment_numbers([number_of(value) for value in gold], said)
    assets = wheels if isinstance(wheels, Wheels) else _wheels(wheels)
    if one is not None and one.order:
        # The label files of MELD and IEMOCAP have numbers.
        gold = [one.order[int(v)] if isinstance(v, Integral) else v for v in gold]
    return _word_numbers(metric, gold, [split_official(text) for text in predicted], assets)


def official_of_rows(set_name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The official score of some rows of ``predictions.jsonl``, from their ``raw`` and ``truth``.

    A released prediction is a list of words, or a sentiment. Where most answers of a run are not,
    the words and the sentiment are first extracted by rule, since the release lets a model do it,
    and ``by_rule`` is 1.
    """
    one = set_named(set_name)
    own: list[Row] = [dict(row) for row in rows]
    truths, texts = [row["truth"] for row in own], [released_text(row) for row in own]
    if one.metric == "sentiment":
        released = are_sentiments(texts)
        said = sentiments(own, find_wheels(needed=False), "official")
        found = _sentiment_numbers([number_of(value) for value in truths], said)
    else:
        released, assets = are_lists(texts), _wheels(None)
        found = _word_numbers(one.metric, truths, official_words(own, assets), assets)
    return found if released else {**found, "by_rule": 1.0}


def aligned(names: Sequence[str], answers: Mapping[str, Any], set_name: str = "") -> list[Any]:
    """The answer to each name; by position where as many answers have other names altogether.

    Raises:
        EvaluationError: some names have no answer.
    """
    missing = [name for name in names if name not in answers]
    if not missing:
        return [answers[name] for name in names]
    if len(missing) == len(names) == len(answers):
        return list(answers.values())
    raise EvaluationError(
        f"{set_name or 'the set'}: {len(missing)} of {len(names)} clips have no answer, such as "
        f"'{missing[0]}'; predict all, and keep the names of the release"
    )


def tasks() -> dict[str, Task]:
    """One task for each set, scored officially and corrected."""
    return {name: _task(one) for name, one in SETS.items()}


def summary(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The table of the sets, from the tasks of ``results.json``: the primary number of each set in
    both modes, and their mean. The mean of the nine sets is None while one is missing, so that a
    mean over fewer sets is not taken for it; ``mean of N`` is over the sets that are there."""
    sets = [name for name in SETS if name in blocks]
    found: dict[str, dict[str, float | None]] = {}
    for mode in MODES:
        column: dict[str, float | None] = {}
        for name in sets:
            key = f"{mode}_{PRIMARY[SETS[name].metric]}"
            column[name] = blocks[name].get("scored", {}).get(key, {}).get("value")
        values = [value for value in column.values() if value is not None]
        mean = round(sum(values) / len(values), 6) if len(values) == len(sets) > 0 else None
        if 1 < len(sets) < len(SETS):
            column[f"mean of {len(sets)}"] = mean
        column["mean"] = mean if len(sets) == len(SETS) else None
        found[mode] = column
    return found


@dataclass(frozen=True, slots=True)
class Recorded:
    """Predictions of a set together with the score that the released scorer gave them."""

    set_name: str
    names: tuple[str, ...]
    gold: tuple[Any, ...]
    predicted: tuple[Any, ...]
    official: Mapping[str, Any]


def read_recorded(path: Path) -> Recorded:
    """Read a JSON file ``{"dataset", "official", "items": [{"id", "gt", "pred_openset"}]}``; for
    the sets of sentiment, the answer is in ``pred_sentiment``.

    Raises:
        EvaluationError: the file is damaged or has other contents.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        one = set_named(value["dataset"])
        items = cast("list[dict[str, Any]]", value["items"])
        # The sentiment was made from the words, and is what the scorer reads.
        order = ("sentiment", "openset", "") if one.metric == "sentiment" else ("openset", "")
        key = next(k for end in order for k in items[0] if k.startswith("pred") and end in k)
        return Recorded(
            one.name,
            tuple(str(item["id"]) for item in items),
            tuple(item["gt"] for item in items),
            tuple(item[key] for item in items),
            value.get("official", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise EvaluationError(
            f"{path}: holds no predictions with their labels ({error!r})"
        ) from error


def _released_sentiment(answer: Any) -> str:
    """An answer as the release writes it; it also handles them as 1, 0 and -1."""
    if isinstance(answer, int | float) and answer == answer:
        return "positive" if answer > 0 else "negative" if answer < 0 else "neutral"
    return answer if isinstance(answer, str) else ""


def _task(one: UniSet) -> Task:
    return Task(
        answers=Text(),
        scorers=tuple(use("words", metric=one.metric, mode=mode) for mode in MODES),
        official=lambda rows: official_of_rows(one.name, rows),
    )


def _wheels(folder: Path | str | None) -> Wheels:
    found = find_wheels() if folder is None else load_wheels(Path(folder))
    assert found is not None
    return found


def _sentiment_numbers(gold: Sequence[float], said: Sequence[str]) -> dict[str, float]:
    sums = sentiment_sums(gold, said, "official").sum(0)
    numbers = {"waf": float(waf(sums)), "accuracy": float(accuracy(sums)), "kept": sums.sum()}
    return _known(numbers)


def _word_numbers(
    metric: str, truths: Sequence[Any], said: Sequence[Sequence[str]], wheels: Wheels
) -> dict[str, float]:
    gold = [gold_words(truth, "official") for truth in truths]
    labels = label_names(truths, "official")
    sums = word_sums(gold, labels, said, classes_of(wheels, "official")).sum(0)
    levels = [_of_wheels(level) for level in sums]
    names = ("hitrate", "mscore") if metric == "hit" else ("fscore", "precision", "recall")
    found = {name: _mean(levels[0], name) for name in names}
    if metric == "set":
        found |= {f"level2_{name}": _mean(levels[1], name) for name in names}
        found["track2"] = (found["fscore"] + found["level2_fscore"]) / 2
    for number, wheel in enumerate(levels[0], 1):
        found |= {f"wheel{number}_{name}": wheel[name] for name in ("kept", *names)}
    return _known(found)


def _of_wheels(sums: Floats) -> list[dict[str, float]]:
    """The numbers of each wheel, (W, 5); NaN where it keeps no item."""
    found: list[dict[str, float]] = []
    for precision, recall, kept, hits, mscore in sums.tolist():
        p, r = (value / kept if kept else float("nan") for value in (precision, recall))
        found.append(
            {
                "kept": kept,
                "precision": p,
                "recall": r,
                "fscore": 2 * p * r / (p + r) if p + r else 0.0,
                "hitrate": hits / kept if kept else float("nan"),
                "mscore": mscore / kept if kept else float("nan"),
            }
        )
    return found


def _mean(wheels: Sequence[Mapping[str, float]], name: str) -> float:
    """Mean over the wheels that keep an item."""
    values = [wheel[name] for wheel in wheels if wheel["kept"]]
    return sum(values) / len(values) if values else float("nan")


def _known(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers that are defined; NaN is no JSON."""
    return {name: float(value) for name, value in numbers.items() if not np.isnan(value)}
