"""CA-MER's rule: every triple of labels is in one slice, or in none for one reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.conflict import (
    first_existing,
    first_of_slices,
    majority,
    slice_of,
    subset_named,
)
from mmemo.data.sample import CONFLICTS, Conflict, Sample, Truth

EMOTIONS = st.sampled_from(["happy", "sad", "angry", "neutral"])


@settings(deadline=None)
@given(EMOTIONS, EMOTIONS, EMOTIONS)
def test_a_triple_is_in_the_one_slice_whose_definition_it_meets(a: str, v: str, av: str) -> None:
    """The definitions as printed; nothing else may be in a slice."""
    meets = {
        "video_aligned": v == av and av != a,
        "audio_aligned": a == av and av != v,
        "consistent": a == v == av,
        "all_different": len({a, v, av}) == 3,
        "joint_differs": a == v and av != a,
    }
    assert [name for name, met in meets.items() if met] == [slice_of(a, v, av)]


@settings(deadline=None)
@given(EMOTIONS, EMOTIONS, EMOTIONS)
def test_swapping_the_channels_swaps_their_slices(a: str, v: str, av: str) -> None:
    swapped = {"video_aligned": "audio_aligned", "audio_aligned": "video_aligned"}
    found = slice_of(a, v, av)
    assert slice_of(v, a, av) == swapped.get(found, found)


@settings(deadline=None)
@given(EMOTIONS, EMOTIONS, EMOTIONS)
def test_only_equality_of_labels_counts(a: str, v: str, av: str) -> None:
    names = {"happy": "1", "sad": "2", "angry": "3", "neutral": "4"}
    assert slice_of(names[a], names[v], names[av]) == slice_of(a, v, av)


def test_subsets_are_known_by_their_names() -> None:
    assert [subset_named(name) for name in ("video-aligned", "Audio_Aligned", "consistent")] == [
        *CONFLICTS
    ]
    assert subset_named("meta") is None


@settings(deadline=None)
@given(st.lists(EMOTIONS, max_size=7))
def test_the_majority_beats_every_other_label(votes: list[str]) -> None:
    found = majority(votes)
    counts = {vote: votes.count(vote) for vote in votes}
    best = [vote for vote, count in counts.items() if count == max(counts.values())]
    assert found == (best[0] if len(best) == 1 else None)


def test_a_missing_clip_keeps_the_name_that_it_should_have(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "folder.avi").mkdir()
    assert first_existing(tmp_path, ["folder.avi", "a.mp4"]) == "a.mp4"
    assert first_existing(tmp_path, ["b.avi", "b.mp4"]) == "b.avi"
    with pytest.raises(IndexError):
        first_existing(tmp_path, [])


def test_a_limit_takes_of_every_slice() -> None:
    """In whole files of one slice each, the first rows would all be of the first."""
    kinds: list[Conflict] = ["video_aligned"] * 5 + ["audio_aligned"] * 2 + ["consistent"] * 5
    clips = [Sample(f"{n}", (), {}, truth=Truth(conflict=kind)) for n, kind in enumerate(kinds)]

    def taken(limit: int | None) -> list[str]:
        return [clip.sample_id for clip in first_of_slices(clips, limit)]

    assert taken(3) == ["0", "5", "7"]
    assert taken(8) == ["0", "1", "2", "5", "6", "7", "8", "9"]
    assert taken(None) == taken(99) == [clip.sample_id for clip in clips]
