"""Sides: which of two contradicting channels the answers follow, such as voice and words.

A row's ``modality_labels`` say which answer each channel implies; where it implies several, commas
separate them. ``voice_share`` and ``words_share`` are the shares of all answers, refused and
unreadable ones included, that name such an answer, and ``signed`` is the first minus the second: +1
is always the voice, -1 always the words. Rows without both, and those where both imply the same,
are not scored.

Shapes: n answers; sums (..., 3) of 1, of answers that follow the first and of those that follow the
second channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats

SPOKEN: Mapping[str, str] = {"audio": "voice", "video": "face", "text": "words"}


def sides(*, first: str = "audio", second: str = "text") -> Scorer:
    """The scorer of sides.

    Args:
        first, second: two keys of ``modality_labels``: audio, video or text.

    Raises:
        TypeError: a channel is none of these, or both are the same.
    """
    if first == second or not {first, second} <= SPOKEN.keys():
        raise TypeError(f"first and second must be two of {', '.join(SPOKEN)}")

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), 3))
        for row, one in zip(rows, found, strict=True):
            implied = row.get("modality_labels") or {}
            ours, theirs = (set(_labels(implied.get(side))) for side in (first, second))
            if ours and theirs and not ours & theirs:
                one[:] = (1.0, row["answer"] in ours, row["answer"] in theirs)
        return found, found[:, 0] > 0

    def share(sums: Floats, place: int) -> Floats:
        return ratio(sums[..., place], sums[..., 0], np.nan)

    one, other = SPOKEN[first], SPOKEN[second]
    return Scorer(
        values,
        {
            "signed": Metric(lambda sums: share(sums, 1) - share(sums, 2), limits=(-1, 1)),
            f"{one}_share": Metric(lambda sums: share(sums, 1), share=True),
            f"{other}_share": Metric(lambda sums: share(sums, 2), share=True),
        },
    )


def _labels(implied: str | None) -> list[str]:
    return [label.strip() for label in (implied or "").split(",") if label.strip()]
