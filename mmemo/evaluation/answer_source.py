"""Whose label the answers on conflict clips are: the voice's, the face's, or neither's.

C conflict subsets in the order of :data:`CONFLICTING`. Counts are (..., C, 2, 3): answers of each
subset, right and wrong ones, by side in the order of :data:`SIDES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.evaluation import metrics
from mmemo.evaluation.metrics import Counts, Values
from mmemo.evaluation.predictions import Row
from mmemo.statistics import Bootstrap, Resampled

CONFLICTING: tuple[str, ...] = ("video_aligned", "audio_aligned")
DECIDES: Mapping[str, str] = {"video_aligned": "video", "audio_aligned": "audio"}
"""Subset to the modality whose label is the clip's."""

SIDES: tuple[str, ...] = ("voice", "face", "neither")


def reliance_block(rows: Sequence[Row], bootstrap: Bootstrap) -> dict[str, Any]:
    """Shares of the answers by whose label they are, and ``signed``: voice minus face, so that +1
    is always the voice, -1 always the face, and 0 is balance. Each with interval and n.

    ``video_aligned`` and ``audio_aligned`` are of all answers on the subset, and ``all`` of both:
    a model that is always right has +1 on audio-aligned clips, -1 on video-aligned ones, and 0.
    ``errors`` is of wrong answers alone, where there are both subsets: on a video-aligned clip they
    are the voice's label or neither's, on an audio-aligned one the face's or neither's. In ``all``
    and ``errors`` a subset weighs as much whatever its size, so that the sign says nothing of how
    many clips of either kind a benchmark has.

    ``left_out`` counts conflict rows that do not say what voice and face show, or that contradict
    themselves: a clip is video-aligned where its label is the face's and not the voice's.

    Returns:
        Nothing where no row of the task can be counted.
    """
    counts = np.zeros((len(rows), len(CONFLICTING), 2, len(SIDES)))
    left_out = 0
    for index, row in enumerate(rows):
        if row.get("conflict") not in CONFLICTING:
            continue
        sides = _sides(row)
        if sides is None:
            left_out += 1
            continue
        side = sides.index(row["answer"]) if row["answer"] in sides else SIDES.index("neither")
        wrong = int(row["answer"] != row["truth"])
        counts[index, CONFLICTING.index(row["conflict"]), wrong, side] = 1
    if not counts.any():
        return {}
    drawn = bootstrap.resample(counts)
    present = np.flatnonzero(drawn.total.sum((-2, -1))).tolist()
    block: dict[str, Any] = {"all": _shares(drawn.part(present), _of_all)}
    for place in present:
        block[CONFLICTING[place]] = _shares(drawn.part([place]), _of_all)
    if len(present) == len(CONFLICTING):
        block["errors"] = _shares(drawn, _of_errors, int(drawn.total[:, 1].sum()))
    return {**block, "left_out": left_out}


def _sides(row: Row) -> tuple[str, str] | None:
    """The labels of the voice and of the face, where the row says what its subset promises."""
    known = row.get("modality_labels", {})
    if not {"audio", "video"} <= set(known):
        return None
    fits = known["audio"] != known["video"] and row["truth"] == known[DECIDES[row["conflict"]]]
    return (known["audio"], known["video"]) if fits else None


def _shares(
    counts: Resampled, shares: Callable[[Counts], Values], n: int | None = None
) -> dict[str, Any]:
    n = int(counts.total.sum()) if n is None else n
    block: dict[str, Any] = {
        side: counts.interval(lambda c, i=i: shares(c)[..., i], n).row()
        for i, side in enumerate(SIDES)
    }
    block["signed"] = counts.interval(lambda c: metrics.reliance(shares(c)), n).row()
    return block


def _of_all(counts: Counts) -> Values:
    """(..., C, 2, 3) to (..., 3); NaN where a subset was not drawn."""
    return metrics.shares(counts.sum(-2)).mean(-2)


def _of_errors(counts: Counts) -> Values:
    """(..., C, 2, 3) to (..., 3); NaN where a subset was not drawn, or nothing is wrong."""
    asked = counts.sum((-2, -1))[..., None]
    rates = np.full(counts.shape[:-2] + counts.shape[-1:], np.nan)
    np.divide(counts[..., 1, :], asked, out=rates, where=asked > 0)
    return metrics.shares(rates.sum(-2))
