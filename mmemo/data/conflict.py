"""CA-MER's conflict subsets, for data with separate labels of voice, picture and whole clip.

Given the labels q^a of the voice alone, q^v of the picture alone and q^av of both together, the
rule (MoSEAR, arXiv 2508.01181, as stated by VISTA, arXiv 2609.37324) is

- video-aligned: q^v ≡ q^av ≠ q^a, so the picture decides;
- audio-aligned: q^a ≡ q^av ≠ q^v, so the voice decides;
- consistent: all three labels are the same.

A clip with three different labels belongs to no subset. Nor does a clip whose voice and picture
agree but differ from the whole clip: the papers do not mention this case, and no definition covers
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmemo.data.sample import CONFLICTS, Conflict, Sample

Outside = Literal["all_different", "joint_differs"]
"""Why a clip is in no subset: its three labels differ, or voice and picture agree with each other
but not with the whole clip."""


def slice_of(audio: str, video: str, joint: str) -> Conflict | Outside:
    """The conflict subset of a clip, or why it is in none.

    Args:
        audio, video, joint: q^a, q^v and q^av in the same spelling; they are compared as text.
    """
    if video == joint:
        return "consistent" if audio == joint else "video_aligned"
    if audio == joint:
        return "audio_aligned"
    return "joint_differs" if audio == video else "all_different"


def subset_named(name: str) -> Conflict | None:
    """The subset that a file or folder is named after (``Video-aligned``, ``audio_aligned``)."""
    wanted = name.strip().casefold().replace("-", "_").replace(" ", "_")
    return next((conflict for conflict in CONFLICTS if conflict == wanted), None)


def majority(votes: Sequence[str]) -> str | None:
    """The label with the most votes, or None if there is a tie or no vote."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def first_of_slices(clips: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` clips, in order, sampled evenly across the subsets as far as possible."""
    counts: Counter[Conflict | None] = Counter()
    ranked: list[tuple[int, int]] = []
    for place, clip in enumerate(clips):
        ranked.append((counts[clip.truth.conflict], place))
        counts[clip.truth.conflict] += 1
    # Rank first, then place: every subset gives its n-th clip before any gives its next one.
    return [clips[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


def first_existing(root: Path, names: Sequence[str]) -> str:
    """The first of ``names`` (paths under ``root``) that exists.

    If none exists, the first name is returned, so that the clip is reported as missing under its
    expected name.
    """
    return next((name for name in names if (root / name).is_file()), names[0])
