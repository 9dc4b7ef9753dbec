"""Numbers that are measured on a question's clips, such as the likeness of two voices.

``Task.measure`` names a function that is called with each question before it is answered. What it
returns is kept in the row, under ``measured``, and ``use("measured", names=[...])`` gives means. A
number that could not be measured is None: it is in no mean, and is counted.

:func:`voice_similarity` is such a function, for generated speech: the cosine of two embeddings,
each the mean over time of what the model's frozen audio encoder says of a file. The EmoVoice paper
(arXiv 2504.12867) takes emotion2vec's embeddings, so that its numbers are others. Cosines of any
two voices are high in most encoders; so the cosine to a file of another emotion stands beside it.

Shapes: n answers, N names; sums (..., N, 2) of 1 and the number. T steps of D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmemo.data.sample import MediaRef, Sample
from mmemo.errors import EvaluationError, MediaError
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats, Statistic

MEASURED = "measured"
"""Key of a row: name of each measured number to its value, or to None."""

Encode = Callable[[Sample], Mapping[Any, Mapping[str, Any]]]
"""A sample to the features of each of its modalities: ``x`` is (T, D), or (layers, T, D)."""


def measured(*, names: Sequence[str], low: float = -1, high: float = 1) -> Scorer:
    """The scorer of measured numbers, whose metrics have their names.

    Args:
        names: the numbers; the first one is the headline.
        low, high: the ends of their scale.

    Raises:
        TypeError: there are no names, or one occurs twice.
    """
    if not names or len(set(names)) < len(names):
        raise TypeError("names must list different names")

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), len(names), 2))
        for place, row in enumerate(rows):
            own = row.get(MEASURED) or {}
            for column, name in enumerate(names):
                if own.get(name) is not None:
                    found[place, column] = 1.0, own[name]
        return found, found[:, 0, 0] > 0

    metrics = {name: Metric(_mean(i), limits=(low, high)) for i, name in enumerate(names)}
    return Scorer(values, metrics)


def voice_similarity(encode: Encode, sample: Sample) -> dict[str, float | None]:
    """The cosines of a sample's voice and those of the files in its columns ``target`` and
    ``other``: ``similarity`` and ``similarity_to_other``. None where a file is not named, or cannot
    be read.

    Raises:
        EvaluationError: the sample has no sound.
    """
    if "audio" not in sample.media:
        raise EvaluationError(f"{sample.sample_id} has no audio to compare")
    own = _embedding(encode, sample, sample.media["audio"])
    found: dict[str, float | None] = {}
    for name, column in (("similarity", "target"), ("similarity_to_other", "other")):
        path = sample.columns.get(column)
        other = _embedding(encode, sample, MediaRef(str(path))) if path else None
        found[name] = None if own is None or other is None else _cosine(own, other)
    return found


def _embedding(encode: Encode, sample: Sample, ref: MediaRef) -> Floats | None:
    """(D,) mean over time; None if the file cannot be read."""
    try:
        features = encode(replace(sample, media={"audio": ref}))["audio"]["x"]
    except (MediaError, OSError):
        return None
    x = np.asarray(features.detach().float().cpu().numpy(), dtype=np.float64)
    return x.reshape(-1, *x.shape[-2:])[-1].mean(0)  # of the last layer, where there are several


def _cosine(a: Floats, b: Floats) -> float | None:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return None if norm == 0 else round(float(a @ b) / norm, 9)


def _mean(column: int) -> Statistic:
    return lambda sums: ratio(sums[..., column, 1], sums[..., column, 0], np.nan)
