"""Whose label answers on conflict clips name: that of the voice, of the face, or neither.

Shapes: C conflict subsets in the order of :data:`CONFLICTING`. Counts are (..., C, 2, 3): the
answers on each subset, right and wrong ones, by side in the order of :data:`SIDES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmemo.evaluation import metrics
from mmemo.evaluation.metrics import Counts, Values
from mmemo.evaluation.predictions import Row
from mmemo.statistics import Clusters, ClusterSums

CONFLICTING: tuple[str, ...] = ("video_aligned", "audio_aligned")
DECIDES: Mapping[str, str] = {"video_aligned": "video", "audio_aligned": "audio"}
"""Subset to the modality whose label is that of the clip."""

SIDES: tuple[str, ...] = ("voice", "face", "neither")


def reliance_block(rows: Sequence[Row], clusters: Clusters) -> dict[str, Any]:
    """Shares of the answers by the side whose label they name, and ``signed``, the share of the
    voice minus that of the face: +1 is always the voice, -1 always the face, and 0 is balanced.
    Each has its interval and n.

    ``video_aligned`` and ``audio_aligned`` are shares of all answers on that subset, and ``all`` is
    over both. A model that is always right has +1 on audio-aligned clips, -1 on video-aligned
    clips, and 0 over both. ``errors`` are shares of the wrong answers, where both subsets are
    present: on a video-aligned clip, a wrong answer names the label of the voice or of neither; on
    an audio-aligned clip, that of the face or of neither. ``all`` and ``errors`` weight the two
    subsets equally whatever their sizes, so that the sign does not depend on how many clips of each
    kind a benchmark has.

    ``left_out`` counts conflict rows that do not give the labels of voice and face, or that
    contradict themselves: a clip is video-aligned if its label is that of the face and not that of
    the voice.

    Returns:
        An empty dict if no row of the task can be counted.
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
    drawn = clusters.sums(counts)
    # A subset that the benchmark lacks would make every mean NaN.
    present = np.flatnonzero(drawn.total.sum((-2, -1))).tolist()
    block: dict[str, Any] = {"all": _shares(drawn.part(present), _of_all)}
    for place in present:
        block[CONFLICTING[place]] = _shares(drawn.part([place]), _of_all)
    if len(present) == len(CONFLICTING):
        block["errors"] = _shares(drawn, _of_errors, int(drawn.total[:, 1].sum()))
    return {**block, "left_out": left_out}


def _sides(row: Row) -> tuple[str, str] | None:
    """The labels of voice and face; None if they are missing or contradict the row's subset."""
    known = row.get("modality_labels", {})
    if not {"audio", "video"} <= set(known):
        return None
    fits = known["audio"] != known["video"] and row["truth"] == known[DECIDES[row["conflict"]]]
    return (known["audio"], known["video"]) if fits else None


def _shares(
    counts: ClusterSums, shares: Callable[[Counts], Values], n: int | None = None
) -> dict[str, Any]:
    n = int(counts.total.sum()) if n is None else n
    block: dict[str, Any] = {
        side: counts.interval(lambda c, i=i: shares(c)[..., i], n, share=True).row()
        for i, side in enumerate(SIDES)
    }
    signed = counts.interval(lambda c: metrics.reliance(shares(c)), n, limits=(-1, 1))
    block["signed"] = signed.row()
    return block


def _of_all(counts: Counts) -> Values:
    """Shares of all answers, (..., C, 2, 3) to (..., 3); NaN where a subset was not drawn."""
    return metrics.shares(counts.sum(-2)).mean(-2)


def _of_errors(counts: Counts) -> Values:
    """Shares of the wrong answers, (..., C, 2, 3) to (..., 3); NaN where a subset was not drawn or
    no answer is wrong."""
    asked = counts.sum((-2, -1))[..., None]
    # Rates and not counts are added, so that the larger subset does not decide.
    rates = np.full(counts.shape[:-2] + counts.shape[-1:], np.nan)
    np.divide(counts[..., 1, :], asked, out=rates, where=asked > 0)
    return metrics.shares(rates.sum(-2))
