from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmemo.data.negatives import corrupt, negative_sample
from mmemo.data.preference import (
    FEATURE_KINDS,
    KIND_STREAMS,
    QUERIES,
    Negative,
    Preference,
    Query,
    queried,
    unqueried,
)
from mmemo.data.sample import MODALITIES, MediaRef, Modality, Sample, Turn
from mmemo.errors import DataError

Clip = dict[Modality, dict[str, Tensor]]


def clip(frames: int = 8, layers: int = 0, dtype: torch.dtype = torch.float32) -> Clip:
    """Features of all streams; video has 2 tokens a frame, face a flag beside ``x``."""
    made = torch.Generator().manual_seed(frames)
    head = (layers,) if layers else ()

    def x(steps: int) -> Tensor:
        return torch.randn((*head, steps, 6), generator=made).to(dtype)

    return {
        "video": {"x": x(2 * frames), "grid": torch.tensor([frames, 2, 4])},
        "audio": {"x": x(3 * frames), "mel_frames": torch.tensor(40)},
        "face": {"x": x(frames), "found": torch.tensor([0.75])},
    }


def negative(
    kind: str, modalities: tuple[Modality, ...], seed: int = 0, snr_db: float = 0.0
) -> Negative:
    return Negative(kind, True, {}, modalities, seed, snr_db)


def copied(features: Mapping[Modality, Mapping[str, Tensor]]) -> Clip:
    return {
        name: {key: value.clone() for key, value in stream.items()}
        for name, stream in features.items()
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, whatever the type."""
    whole = (one.shape, one.dtype) == (other.shape, other.dtype)
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return whole and torch.equal(*flat)


@given(
    kind=st.sampled_from(FEATURE_KINDS),
    query=st.sampled_from(QUERIES),
    side=st.sampled_from(["negative", "irrelevant"]),
    seed=st.integers(0, 2**40),
    frames=st.integers(2, 9),
    layers=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_only_the_named_streams_change(
    kind: str, query: Query, side: str, seed: int, frames: int, layers: int, dtype: torch.dtype
) -> None:
    asked = (queried if side == "negative" else unqueried)(query, MODALITIES)
    streams: tuple[Modality, ...] = tuple(name for name in asked if name in KIND_STREAMS[kind])
    features = clip(frames, layers, dtype)
    before = copied(features)
    found = corrupt(features, negative(kind, streams, seed))
    again = corrupt(copied(features), negative(kind, streams, seed))
    assert set(found) == set(features)
    for name, stream in found.items():
        # What came in is as it was, and the same seed gives the same negative.
        assert all(same(features[name][key], before[name][key]) for key in stream)
        assert all(same(stream[key], again[name][key]) for key in stream)
        if name in streams:
            assert (stream["x"].shape, stream["x"].dtype) == (before[name]["x"].shape, dtype)
            assert not torch.equal(stream["x"], before[name]["x"])
            assert stream["x"].isfinite().all()
        else:
            assert all(stream[key] is features[name][key] for key in stream)


def test_frames_move_whole() -> None:
    """A frame's patches stay together, by the grid or by what the caller says."""
    by_grid = clip()
    video = by_grid["video"]["x"]
    plain: Clip = {"video": {"x": video}}
    shuffled = negative("shuffled_frames", ("video",), 3)
    found = corrupt(by_grid, shuffled)["video"]["x"]
    assert torch.equal(corrupt(plain, shuffled, frame_tokens={"video": 2})["video"]["x"], found)
    pairs = {tuple(frame.flatten().tolist()) for frame in video.unflatten(0, (8, 2))}
    assert {tuple(frame.flatten().tolist()) for frame in found.unflatten(0, (8, 2))} == pairs


def test_picture_and_face_of_one_clip_are_shuffled_alike() -> None:
    order = torch.arange(8.0)
    features: Clip = {"video": {"x": order[:, None]}, "face": {"x": order[:, None] + 100}}
    found = corrupt(features, negative("shuffled_frames", ("video", "face"), 5))
    assert torch.equal(found["video"]["x"] + 100, found["face"]["x"])
    noisy = corrupt(features, negative("noise", ("video", "face"), 5))
    assert not torch.allclose(noisy["video"]["x"] + 100, noisy["face"]["x"])


def test_what_each_kind_makes() -> None:
    features = clip()
    video, audio = features["video"]["x"], features["audio"]["x"]
    frozen = corrupt(features, negative("frozen_frame", ("video",)))["video"]["x"]
    frames = frozen.unflatten(0, (8, 2))
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    assert any(torch.equal(frames[0], frame) for frame in video.unflatten(0, (8, 2)))
    back = corrupt(features, negative("reversed", ("audio",)))["audio"]["x"]
    assert torch.equal(back, audio.flip(0))
    assert not corrupt(features, negative("muted", ("audio",)))["audio"]["x"].any()
    blank = corrupt(features, negative("blank_face", ("video", "face")))
    assert not blank["face"]["x"].any()
    assert not blank["face"]["found"].any()
    assert torch.equal(blank["video"]["grid"], features["video"]["grid"])


@pytest.mark.parametrize("snr_db", [-6.0, 0.0, 12.0])
def test_noise_has_the_power_that_is_asked_for(snr_db: float) -> None:
    x = torch.randn(2, 400, 50, generator=torch.Generator().manual_seed(1))
    x = x * torch.tensor([1.0, 7.0])[:, None, None] + 30
    found = corrupt({"audio": {"x": x}}, negative("noise", ("audio",), 2, snr_db))["audio"]["x"]
    for layer in range(2):
        power = x[layer].var() / (found - x)[layer].var()
        assert 10 * torch.log10(power).item() == pytest.approx(snr_db, abs=0.2)


def test_other_seeds_give_other_negatives() -> None:
    features = clip()
    for kind in ("shuffled_frames", "noise"):
        made = [
            corrupt(features, negative(kind, ("audio",), seed))["audio"]["x"] for seed in (1, 2)
        ]
        assert not torch.equal(*made)


def test_what_cannot_be_made_is_an_error() -> None:
    one: Clip = {"face": {"x": torch.ones(1, 4)}}
    with pytest.raises(DataError, match=r"changes nothing in face of 1 frame .* use noise"):
        corrupt(one, negative("reversed", ("face",)))
    with pytest.raises(DataError, match="no audio to make 'muted' of"):
        corrupt(one, negative("muted", ("audio",)))
    other = Negative("other_speaker", False, {"face": MediaRef("b.mp4")}, ("face",), 0)
    with pytest.raises(DataError, match="takes streams of another clip"):
        corrupt(one, other)


def test_the_sample_of_a_negative_has_the_other_clips_streams() -> None:
    own: dict[Modality, MediaRef] = {name: MediaRef("a.mp4") for name in MODALITIES}
    sample = Sample("one", (Turn("user", "<video><audio><face>?"),), own, source=("rows.jsonl", 4))
    taken = Negative("different_label", False, {"audio": MediaRef("b.mp4", 1, 2)}, ("audio",), 0)
    pair = Preference(sample, "audio", {"chosen": "a", "spurious": "b"}, taken, None)
    found = negative_sample(pair)
    assert found.media == {**own, "audio": MediaRef("b.mp4", 1, 2)}
    assert found.turns == sample.turns
    with pytest.raises(DataError, match=r"rows\.jsonl:4: row 'one' has no irrelevant clip"):
        negative_sample(pair, "irrelevant")


def test_uniform_noise_has_the_features_mean_and_spread_and_nothing_else_of_them() -> None:
    x = torch.randn(2, 400, 50, generator=torch.Generator().manual_seed(1))
    x = x * torch.tensor([1.0, 7.0])[:, None, None] + torch.tensor([30.0, -4.0])[:, None, None]
    found = corrupt({"audio": {"x": x}}, negative("uniform_noise", ("audio",), 2))["audio"]["x"]
    for layer in range(2):
        assert float(found[layer].mean()) == pytest.approx(float(x[layer].mean()), abs=0.2)
        assert float(found[layer].std()) == pytest.approx(float(x[layer].std()), rel=0.02)
        assert abs(float(torch.corrcoef(torch.stack([x, found])[:, layer].flatten(1))[0, 1])) < 0.02
        half_width = 3**0.5 * float(x[layer].std())
        assert float((found[layer] - x[layer].mean()).abs().max()) <= half_width * 1.001
    back = corrupt({"audio": {"x": x.flip(1)}}, negative("uniform_noise", ("audio",), 2))
    torch.testing.assert_close(back["audio"]["x"], found)  # whatever the order of the steps
