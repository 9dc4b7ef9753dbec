"""What each perturbation does to known pictures and sounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmemo.errors import MediaError
from mmemo.media.perturb import (
    Perturbation,
    crop_box,
    noise_level,
    perturb_frames,
    perturb_sound,
)
from tests.media_files import drawn, frame_number, sine

FRAMES = [drawn(number, (64, 48)) for number in range(1, 7)]
WAVE = sine(1.0, 8000, 200.0, 0.2)


def frames(kind: str, seed: int = 1, **changes: Any) -> list[Any]:
    return perturb_frames(FRAMES, Perturbation(kind, seed, **changes), "a")


def sound(kind: str, seed: int = 1, wave: Any = WAVE, **changes: Any) -> Any:
    return perturb_sound(wave, 8000, Perturbation(kind, seed, **changes), "a")


KINDS = ("noise", "blurred", "cropped", "shuffled_frames", "frozen_frame", "reversed", "blank_face")


@pytest.mark.parametrize("kind", KINDS)
def test_frames_keep_their_number_size_and_type_and_depend_on_the_seed(kind: str) -> None:
    found, again, other = frames(kind), frames(kind), frames(kind, seed=2)
    assert [x.shape for x in found] == [x.shape for x in FRAMES]
    assert all(x.dtype == np.uint8 for x in found)
    assert np.array_equal(found, again)
    assert not np.array_equal(found, FRAMES)
    assert np.array_equal(found, other) == (kind in ("blurred", "reversed", "blank_face"))


def test_the_order_of_frames() -> None:
    assert [frame_number(x) for x in frames("reversed")] == [6, 5, 4, 3, 2, 1]
    shuffled = [frame_number(x) for x in frames("shuffled_frames")]
    assert sorted(shuffled) == [1, 2, 3, 4, 5, 6] != shuffled
    assert len({frame_number(x) for x in frames("frozen_frame")}) == 1
    assert not np.any(frames("blank_face"))


def test_noise_of_a_diffusion_step_has_the_schedules_power() -> None:
    """On grey, which is 0 in [-1, 1], only the noise is left."""
    assert noise_level(500) == pytest.approx(0.75, abs=0.01)
    assert noise_level(1) > noise_level(500) > noise_level(999) > 0
    grey = [np.full((64, 64, 3), 128, dtype=np.uint8)] * 4
    for step in (100, 500):
        found = perturb_frames(grey, Perturbation("noise", 1, noise_step=step), "a")
        spread = np.std(np.asarray(found, dtype=np.float64) / 127.5)
        assert spread == pytest.approx((1 - noise_level(step)) ** 0.5, rel=0.08)
    found = perturb_frames(grey, Perturbation("noise", 1), "a")
    assert not np.array_equal(found[0], found[1])


def test_a_crop_is_one_box_of_the_share_that_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    shares = [high * wide / (480 * 640) for _, _, high, wide in (
        crop_box(480, 640, (0.01, 0.2), rng) for _ in range(300)
    )]  # fmt: skip
    assert 0.009 < min(shares) < 0.03
    assert 0.17 < max(shares) < 0.21
    for top, left, high, wide in (crop_box(9, 7, (1.0, 1.0), rng) for _ in range(50)):
        assert 0 <= top <= top + high <= 9
        assert 0 <= left <= left + wide <= 7
    # Every frame is cropped alike: equal frames stay equal.
    found = perturb_frames([FRAMES[0]] * 3, Perturbation("cropped", 3), "a")
    assert np.array_equal(found[0], found[2])


def test_sounds() -> None:
    assert not np.any(sound("muted"))
    assert np.array_equal(sound("reversed"), WAVE[::-1])
    ramp = np.linspace(-1, 1, 8000, dtype=np.float32)
    shuffled = sound("shuffled_frames", wave=ramp)
    assert np.array_equal(np.sort(shuffled), ramp)
    assert not np.array_equal(shuffled, ramp)
    steps = np.flatnonzero(np.abs(np.diff(shuffled)) > 0.01)
    assert set((steps + 1) % 800) == {0}


@pytest.mark.parametrize("snr_db", [-6.0, 0.0, 12.0])
def test_noise_in_a_sound_has_the_ratio_that_is_asked_for(snr_db: float) -> None:
    noise = sound("noise", snr_db=snr_db) - WAVE
    ratio = 10 * np.log10(np.mean(WAVE**2) / np.mean(noise**2))
    assert ratio == pytest.approx(snr_db, abs=0.25)
    assert np.array_equal(sound("noise", snr_db=snr_db) - WAVE, noise)


def test_what_would_change_nothing_is_refused() -> None:
    silence = np.zeros(8000, dtype=np.float32)
    for kind in ("muted", "noise", "reversed", "shuffled_frames"):
        with pytest.raises(MediaError, match="changes nothing in"):
            # Shuffling equal segments would not end; one segment has no other order.
            sound(kind, wave=silence[:700] if kind == "shuffled_frames" else silence)
    for kind in ("reversed", "shuffled_frames", "frozen_frame"):
        with pytest.raises(MediaError, match="changes nothing in one frame"):
            perturb_frames(FRAMES[:1], Perturbation(kind, 1), "a")
    black = [np.zeros((32, 32, 3), dtype=np.uint8)] * 3
    for kind in ("blank_face", "blurred", "cropped", "reversed", "shuffled_frames"):
        with pytest.raises(MediaError, match="changes nothing in its picture"):
            perturb_frames(black, Perturbation(kind, 1), "a")
