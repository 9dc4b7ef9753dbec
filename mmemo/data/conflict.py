"""CA-MER's slices of any data whose voice, picture and whole clip were labelled apart.

With the labels q^a of the voice alone, q^v of the picture alone and q^av of both together, the rule
(MoSEAR, arXiv 2508.01181, as VISTA, arXiv 2609.37324, states it) is

- video-aligned: q^v ≡ q^av ≠ q^a, the picture decides;
- audio-aligned: q^a ≡ q^av ≠ q^v, the voice decides;
- consistent: all three are one.

A clip with three different labels is in no slice. Neither is one whose voice and picture agree on
what the whole clip is not: the papers do not name this case, and no slice's definition holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmemo.data.sample import CONFLICTS, Conflict, Sample

Outside = Literal["all_different", "joint_differs"]
"""Why a labelled clip is in no slice: three labels, or voice and picture agree against the clip."""


def slice_of(audio: str, video: str, joint: str) -> Conflict | Outside:
    """The slice of a clip, or why it is in none.

    Args:
        audio, video, joint: q^a, q^v and q^av, brought to one spelling: equal is equal text.
    """
    if video == joint:
        return "consistent" if audio == joint else "video_aligned"
    if audio == joint:
        return "audio_aligned"
    return "joint_differs" if audio == video else "all_different"


def subset_named(name: str) -> Conflict | None:
    """The slice that a file or folder is named after (``Video-aligned``, ``audio_aligned``)."""
    wanted = name.strip().casefold().replace("-", "_").replace(" ", "_")
    return next((conflict for conflict in CONFLICTS if conflict == wanted), None)


def majority(votes: Sequence[str]) -> str | None:
    """What more annotators said than anything else; None in a tie, or without votes."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def first_of_slices(clips: Sequence[Sample], limit: int | None) -> list[Sample]:
    """Up to ``limit`` clips in their order, equally many of each slice as far as it goes."""
    seen: Counter[Conflict | None] = Counter()
    ranked: list[tuple[int, int]] = []
    for place, clip in enumerate(clips):
        ranked.append((seen[clip.truth.conflict], place))
        seen[clip.truth.conflict] += 1
    return [clips[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


def first_existing(root: Path, names: Sequence[str]) -> str:
    """The first of ``names``, paths under ``root``, that is there; else the first, so that the clip
    is reported as missing under the name that it should have."""
    return next((name for name in names if (root / name).is_file()), names[0])
