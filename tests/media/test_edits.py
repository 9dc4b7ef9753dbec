"""Small edits of sounds and pictures, by hand-computed values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmemo.config import parse
from mmemo.errors import ConfigError, MediaError
from mmemo.features.keys import Digests, Identifier, MemoryMap, Span
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode
from mmemo.media.decode_pool import DecodePool
from mmemo.media.edits import EDITS, concerns, edit_frames, edit_sound
from tests.media_files import write_clip

RATE = 16000


def sound(edit: str, wave: np.ndarray, rate: int = RATE, digest: str = "d") -> np.ndarray:
    found = edit_sound(wave, rate, edit, digest, "a.wav")
    assert found.dtype == np.float32
    return found


def noise(seconds: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.1 * rng.standard_normal(int(RATE * seconds))).astype(np.float32).clip(-1, 1)


def power(wave: np.ndarray) -> float:
    return float(np.mean(wave.astype(np.float64) ** 2))


@pytest.mark.parametrize("snr", [40, 45, 50])
def test_the_tone_has_its_ratio_and_frequency(snr: int) -> None:
    wave = noise()
    added = sound(f"tone_{snr}", wave).astype(np.float64) - wave
    assert 10 * np.log10(power(wave) / power(added)) == pytest.approx(snr, abs=0.05)
    peak = int(np.abs(np.fft.rfft(added)).argmax())  # one second: a bin is 1 Hz
    assert 5000 <= peak <= 7000
    assert np.array_equal(sound(f"tone_{snr}", wave), sound(f"tone_{snr}", wave))
    other = sound(f"tone_{snr}", wave, digest="e")
    assert not np.array_equal(other, sound(f"tone_{snr}", wave))
    assert np.array_equal(sound(f"tone_{snr}", np.zeros(100, np.float32)), np.zeros(100))
    with pytest.raises(MediaError, match="no tone"):
        sound(f"tone_{snr}", wave, rate=8000)


@pytest.mark.parametrize("count", [100, 500, 1000])
def test_zeros_and_crops(count: int) -> None:
    wave = noise()
    longer = sound(f"zeros_{count}", wave)
    assert len(longer) == len(wave) + count
    assert np.array_equal(longer[: len(wave)], wave)
    assert not longer[len(wave) :].any()
    assert np.array_equal(sound(f"crop_start_{count}", wave), wave[count:])
    assert np.array_equal(sound(f"crop_end_{count}", wave), wave[:-count])
    for end in ("start", "end"):
        assert len(sound(f"crop_{end}_{count}", wave[: count + 1])) == 1
        with pytest.raises(MediaError, match=f"too few to crop {count}"):
            sound(f"crop_{end}_{count}", wave[:count])


@pytest.mark.parametrize(("edit", "count"), [("clip_0.1", 16), ("clip_0.2", 32), ("clip_0.3", 48)])
def test_so_many_samples_are_clipped(edit: str, count: int) -> None:
    wave = noise()
    found = sound(edit, wave)
    assert int((found != wave).sum()) == count
    level = np.abs(found).max()
    assert int((np.abs(wave) > level).sum()) == count
    assert np.array_equal(np.sign(found), np.sign(wave))
    assert np.array_equal(sound(edit, wave[:3]), wave[:3])  # of so few samples none is clipped


@pytest.mark.parametrize(("edit", "factor"), [("gain_-2", 0.794328), ("gain_-1", 0.891251)])
def test_quieter(edit: str, factor: float) -> None:
    wave = noise()
    assert np.allclose(sound(edit, wave), wave * factor, atol=1e-6)


def test_louder_stays_in_range() -> None:
    wave = np.array([0.5, -0.5, 0.95, -0.95], np.float32)
    assert sound("gain_1", wave) == pytest.approx([0.561009, -0.561009, 1, -1])
    assert sound("gain_2", wave) == pytest.approx([0.629463, -0.629463, 1, -1])


@pytest.mark.parametrize("cut_off", [50, 100, 150])
def test_the_filter_has_3_db_at_its_cut_off_and_6_db_below(cut_off: int) -> None:
    def level(frequency: float) -> float:
        time = np.arange(4 * RATE) / RATE
        wave = (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)
        return 10 * np.log10(power(sound(f"highpass_{cut_off}", wave)[RATE:]) / power(wave))

    assert level(cut_off) == pytest.approx(-3.01, abs=0.02)
    # |H| = f / sqrt(f² + fc²): -6.99 dB at half of the cut-off, -0.04 dB at ten times of it.
    assert level(cut_off / 2) == pytest.approx(-6.99, abs=0.05)
    assert level(10 * cut_off) == pytest.approx(-0.04, abs=0.02)


def test_brightness_and_resize_by_hand() -> None:
    frames = np.array([[[[100, 200, 250]] * 2] * 2], np.uint8)
    assert edit_frames(frames, "brightness_1.1")[0, 0, 0].tolist() == [110, 220, 255]
    assert edit_frames(frames, "brightness_0.9")[0, 0, 0].tolist() == [90, 180, 225]
    columns = np.zeros((1, 8, 8, 3), np.uint8)
    columns[:, :, ::2] = 200  # every second column: half the size is their mean everywhere
    assert (edit_frames(columns, "resize_0.5") == 100).all()


def test_blur_is_a_gaussian_of_its_width() -> None:
    frame = np.zeros((1, 41, 41, 3), np.uint8)
    frame[:, :, 20] = 255
    for sigma in (1, 2):
        line = edit_frames(frame, f"blur_{sigma}")[0, 20, :, 0].astype(float)
        assert line[20] == pytest.approx(255 / (sigma * np.sqrt(2 * np.pi)), abs=3)
        assert (line * (np.arange(41) - 20) ** 2).sum() / line.sum() == pytest.approx(
            sigma**2, rel=0.1
        )


def test_jpeg_keeps_colours_and_loses_more_at_lower_quality() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    losses = [
        np.abs(edit_frames(frames, f"jpeg_{q}").astype(int) - frames).mean() for q in (90, 70, 50)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]
    red = np.full((1, 16, 16, 3), (200, 30, 30), np.uint8)
    assert np.abs(edit_frames(red, "jpeg_90").astype(int) - red).max() <= 6


@pytest.mark.parametrize("edit", list(EDITS))
def test_every_edit_changes_its_own_stream_only(edit: str) -> None:
    wave, frames = noise(), np.random.default_rng(1).integers(0, 256, (2, 24, 30, 3), np.uint8)
    kept = wave.copy(), frames.copy()
    changed = edit_frames(frames, edit)
    assert changed.shape == frames.shape
    assert changed.dtype == np.uint8
    assert np.array_equal(changed, frames) == concerns(edit, "audio")
    heard = sound(edit, wave)
    assert np.array_equal(heard, wave) == concerns(edit, "video") == concerns(edit, "face")
    assert np.array_equal(wave, kept[0])
    assert np.array_equal(frames, kept[1])


def test_clips_are_decoded_with_the_edit(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", seconds=1.0, fps=4)

    def job(edit: str | None) -> DecodeJob:
        want = frozenset({"video", "audio"})
        limits = DecodeConfig(workers=1, edit=edit)
        return DecodeJob(clip, "a.mp4", want, SamplingConfig(frames=2), limits)  # pyright: ignore

    plain, louder, blurred = (decode(job(edit)) for edit in (None, "gain_-2", "blur_2"))
    assert np.allclose(louder.waveform, plain.waveform * 0.794328, atol=1e-6)
    assert np.array_equal(louder.frames, plain.frames)
    assert np.array_equal(blurred.waveform, plain.waveform)
    assert np.array_equal(blurred.frames, edit_frames(plain.frames, "blur_2"))
    with DecodePool(DecodeConfig(workers=1, edit="gain_-2")) as pool:
        (found,) = pool.map([job("gain_-2")])
    assert np.array_equal(found.waveform, louder.waveform)


class Reader:
    """What keys need of a backbone."""

    sampling = SamplingConfig.model_validate({"face": {"detector": "none"}})
    modalities = ("video", "audio", "face")

    def feature_fingerprint(self, modality: str) -> str:
        return modality


def test_features_of_an_edit_have_keys_of_their_own(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", seconds=1.0, fps=4)

    def keys(edit: str | None) -> list[tuple[str, str]]:
        limits = DecodeConfig(edit=edit)
        found = Identifier(Reader(), tmp_path, limits, Digests(MemoryMap()))  # pyright: ignore
        streams = [found.stream(m, Span("a.mp4")) for m in Reader.modalities]  # pyright: ignore
        return [(one.key, one.crops) for one in streams]

    plain, sound_, picture = keys(None), keys("gain_-2"), keys("blur_2")
    assert [a == b for a, b in zip(plain, sound_, strict=True)] == [True, False, True]
    assert [a == b for a, b in zip(plain, picture, strict=True)] == [False, True, False]
    assert len({keys(edit)[1] for edit in EDITS if concerns(edit, "audio")}) == sum(
        concerns(edit, "audio") for edit in EDITS
    )


def test_the_config_knows_the_edits() -> None:
    with pytest.raises(ConfigError, match="no edit 'gian_-2'; did you mean 'gain_-2'"):
        parse(DecodeConfig, {"edit": "gian_-2"})
    # A dump without an edit is that of earlier versions, and so are the keys made from it.
    assert "edit" not in DecodeConfig().model_dump()
    assert DecodeConfig(edit="gain_1").model_dump()["edit"] == "gain_1"
