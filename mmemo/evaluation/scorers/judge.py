"""Ratings of answers by a judge, a language model behind an endpoint.

``use("judge", name="empathy", criterion="How well ...", low=1, high=10)`` is one request for each
answer. The replies come from :mod:`mmemo.evaluation.scorers.judging`, which asks once, keeps every
reply beside the results, and puts it into the rows; here they are only read and counted.

A reply is one JSON object. Of ``form: rating`` it is ``{"score": 7, "reason": "..."}``. Of ``form:
steps`` it is ``{"steps": [{"step": "...", "right": 1}, ...]}``, after MME-Emotion (arXiv
2508.09210): the judge lists the steps of the answer's reasoning and says of each whether it is
right, of the last one whether its conclusion is. This gives a recognition score (the last step), a
reasoning score (the mean of the others, 0 if there are none), and ``cot``, the mean of both.

A reply that cannot be read counts as the lowest rating, and so does an answer without words, which
no judge is asked about. ``NAME_read`` leaves unreadable replies out, as released scorers do, and
``NAME_failed`` is their share. An answer that the judge gave no reply to is unscored.

Shapes: n answers, P parts of a rating (1, or 3 of steps); sums (..., 2 + 2 P) of 1, of replies that
cannot be read, of the ratings, and of the ratings of readable replies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats

Form = Literal["rating", "steps"]
PARTS: Mapping[Form, tuple[str, ...]] = {
    "rating": ("",),
    "steps": ("recognition", "reasoning", "cot"),
}
"""Parts of a rating by form, as they end the metrics' names."""
VERDICTS = "verdicts"
"""Key of a row: name of each judge to its reply, or to None for an answer without words."""

_FENCE = re.compile(r"\A\s*```(?:json)?\s*(.*?)\s*```\s*\Z", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MARKED = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_STEP = re.compile(r":\s*(\d+)\s*/\s*(\d+)")


def judge(
    *,
    criterion: str,
    name: str = "judge",
    low: float = 1,
    high: float = 10,
    form: Form = "rating",
    shown: Literal["answer", "all"] = "answer",
    endpoint: Mapping[str, Any] | None = None,
) -> Scorer:
    """The scorer of one judge's ratings.

    Args:
        criterion: what the judge rates, in whole sentences.
        name: the metric's name; each judge of a task needs its own.
        low, high: the ends of the scale; steps have none.
        form: one rating of the whole answer, or one of each step.
        shown: whether the judge reads the answer alone or the reasoning before it as well.
        endpoint: the judge that is asked unless the evaluation names one, with the fields of
            :class:`~mmemo.rewards.judge.openai_client.EndpointConfig`.

    Raises:
        TypeError: the scale is empty, or there is no such form.
    """
    if form not in PARTS:
        raise TypeError(f"form is '{form}'; use {' or '.join(PARTS)}")
    if form == "steps":
        low, high = 0.0, 1.0
    if not low < high:
        raise TypeError(f"low is {low:g} and high {high:g}; high must be larger")
    parts = PARTS[form]
    lowest = [float(low)] * len(parts)

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), 2 + 2 * len(parts)))
        scored = np.zeros(len(rows), dtype=np.bool_)
        for place, row in enumerate(rows):
            verdicts = row.get(VERDICTS) or {}
            if name not in verdicts:
                continue
            scored[place] = True
            reply = verdicts[name]
            rating = lowest if reply is None else read_reply(reply, form, low, high)
            readable = rating is not None
            strict = lowest if rating is None else rating
            counted = rating if rating is not None else [0.0] * len(parts)
            found[place] = [1.0, float(not readable), *strict, *counted]
        return found, scored

    limits = (float(low), float(high))
    metrics: dict[str, Metric] = {}
    for place, part in enumerate(parts):
        metric = "_".join(filter(None, (name, part)))
        metrics[metric] = Metric(_mean(2 + place), limits=limits)
    for place, part in enumerate(parts):
        metric = "_".join(filter(None, (name, part, "read")))
        metrics[metric] = Metric(_mean_read(2 + len(parts) + place), limits=limits)
    metrics[f"{name}_failed"] = Metric(_mean(1), share=True, lower_is_better=True)
    return Scorer(values, metrics)


def read_reply(reply: str, form: Form, low: float, high: float) -> list[float] | None:
    """The parts of the rating in a judge's reply, (P,); None if it is not exactly the JSON object
    that was asked for."""
    fenced = _FENCE.match(reply)
    try:
        # Python's parser takes NaN, which is no rating, and a key that is given twice.
        value: Any = json.loads(
            fenced.group(1) if fenced else reply,
            parse_constant=_refuse,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if form == "rating":
        score: Any = value.get("score")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        return [float(score)] if _is_number(score) and low <= score <= high else None
    steps: Any = value.get("steps")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if not isinstance(steps, list) or not steps:
        return None
    right: list[float] = []
    for step in steps:  # pyright: ignore[reportUnknownVariableType]
        one: Any = step.get("right") if isinstance(step, dict) else step  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if not (isinstance(one, bool) or _is_number(one)) or one not in (0, 1):
            return None
        right.append(float(one))
    return of_steps(right)


def read_loosely(reply: str, form: Form) -> list[float] | None:
    """The parts of the rating as released scorers find them in a text. Of a rating this is the
    number in ``[[n]]`` (SD-Eval), or else the first one anywhere (EMER), on whatever scale. Of
    steps it is ``<score>Step 1: 1/1, Step 2: 0/1</score>`` (MME-Emotion), where it is not JSON."""
    if form == "rating":
        marked = _MARKED.search(reply)
        found = marked.group(1) if marked else next(iter(_NUMBER.findall(reply)), None)
        # Digits without end would be infinite, which no JSON holds.
        return None if found is None or not math.isfinite(float(found)) else [float(found)]
    strict = read_reply(reply, form, 0, 1)
    if strict is not None:
        return strict
    inside = re.search(r"<score>(.*?)</score>", reply)
    if inside is None:
        return None
    pairs = [(int(one[:300]), int(of[:300])) for one, of in _STEP.findall(inside.group(1))]
    return of_steps([one / of if of else 0.0 for one, of in pairs]) if pairs else None


def of_steps(right: Sequence[float]) -> list[float]:
    """Recognition, reasoning and their mean from the ratings of one or more steps, the last of
    which is the conclusion."""
    reasoning = sum(right[:-1]) / len(right[:-1]) if len(right) > 1 else 0.0
    return [right[-1], reasoning, (right[-1] + reasoning) / 2]


def left_out(
    name: str = "judge", form: Form = "rating"
) -> Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float]]:
    """An official reading: the means over the replies that :func:`read_loosely` reads, and how many
    answers it leaves out. It is empty where no judge was asked."""

    def official(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        replies = [row[VERDICTS][name] for row in rows if name in (row.get(VERDICTS) or {})]
        if not replies:
            return {}
        read = [read_loosely(reply, form) for reply in replies if reply is not None]
        kept = [one for one in read if one is not None]
        found: dict[str, float] = {}
        for place, part in enumerate(PARTS[form]):
            values = [one[place] for one in kept]
            if values:
                found["_".join(filter(None, (name, part)))] = sum(values) / len(values)
        return {**found, f"{name}_dropped": float(len(rows) - len(kept))}

    return official


def _mean(place: int) -> Callable[[Floats], Floats]:
    return lambda sums: ratio(sums[..., place], sums[..., 0], np.nan)


def _mean_read(place: int) -> Callable[[Floats], Floats]:
    return lambda sums: ratio(sums[..., place], sums[..., 0] - sums[..., 1], np.nan)


def _is_number(value: object) -> bool:
    # True is an int to Python, and would pass for a rating of 1; 1e999 is infinite.
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no rating")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
