"""The mix of several channels: whose voice is heard, how loud, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from mmemo.media.decode import decode
from mmemo.media.downmix import channel_weights
from tests.media.sound_files import job, tone_of, write_channels
from tests.media_files import sine

R = 0.5**0.5
ROOMS = {
    "mono": [1],
    "stereo": [R, R],
    "2.1": [R, R, 0],
    "3.0": [R, R, 1],
    "quad": [R, R, 0.5, 0.5],
    "5.0": [R, R, 1, 0.5, 0.5],
    "5.1": [R, R, 1, 0, 0.5, 0.5],
    "5.1(side)": [R, R, 1, 0, 0.5, 0.5],
    "7.1": [R, R, 1, 0, 0.5, 0.5, 0.5, 0.5],
}


def heard(path: Path, **sampling: Any) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    clip = decode(job(path, "audio", **sampling))
    assert clip.waveform is not None
    return clip.waveform, clip.notes


@pytest.mark.parametrize("layout", ROOMS)
def test_each_channel_has_the_weight_of_the_standard(layout: str, tmp_path: Path) -> None:
    """ITU-R BS.775-3, table 2, by its sum: 0.707, 0.707, 1, 0.5 and 0.5 sum to 3.414."""
    values = ROOMS[layout]
    for place, value in enumerate(values):
        channels = [np.zeros(1600)] * len(values)
        channels[place] = np.full(1600, 0.5)
        wave, _ = heard(write_channels(tmp_path / "a.wav", channels, layout))
        np.testing.assert_allclose(wave, 0.5 * value / sum(values), atol=1e-6)


def test_no_layout_exceeds_full_scale(tmp_path: Path) -> None:
    for layout in ("mono", "stereo", "5.1", "7.1", "22.2", "hexagonal", "cube"):
        names = tuple(channel.name for channel in av.AudioLayout(layout).channels)
        assert sum(channel_weights(names)) == pytest.approx(1)
        assert min(channel_weights(names)) >= 0
    wave, notes = heard(write_channels(tmp_path / "a.wav", [np.full(1600, -1.0)] * 6, "5.1"))
    np.testing.assert_allclose(wave, -1.0, atol=1e-6)
    assert notes == ("clipped",)


def test_channels_of_unknown_places() -> None:
    assert channel_weights(("NONE",) * 3) == (1 / 3,) * 3
    assert channel_weights(("LFE",)) == (1.0,)
    # FFmpeg takes six and eight for 5.1 and 7.1.
    surround = channel_weights(("FL", "FR", "FC", "LFE", "BL", "BR"))
    assert channel_weights(("NONE",) * 6) == surround
    assert channel_weights(("FL", "FR", "UNHEARD_OF")) == (1 / 3,) * 3
    assert channel_weights(("AMBI0", "AMBI1", "AMBI2", "AMBI3")) == (1, 0, 0, 0)
    assert channel_weights(("DL", "DR")) == (0.5, 0.5)


def test_six_channels_without_a_layout(tmp_path: Path) -> None:
    channels: list[NDArray[Any]] = [sine(1, 16000, 200.0 + 100 * place, 0.2) for place in range(6)]
    channels[2] = sine(1, 16000, 400, 0.4)
    path = write_channels(tmp_path / "a.wav", channels, "6 channels")
    wave, _ = heard(path)
    assert tone_of(wave) == 400


@pytest.mark.parametrize("kind", ["wav", "m4a"])
def test_the_voice_in_the_centre_is_louder_than_music_around_it(kind: str, tmp_path: Path) -> None:
    voice, music, rumble = sine(1, 48000, 300, 0.3), sine(1, 48000, 900, 0.3), sine(1, 48000, 60)
    channels: list[NDArray[Any]] = [
        np.zeros_like(music),
        np.zeros_like(music),
        voice,
        rumble,
        music,
        -music,
    ]
    path = write_channels(tmp_path / "a.wav", channels, "5.1", rate=48000)
    if kind == "m4a":
        path = to_aac(path, tmp_path / "a.m4a")
    wave, notes = heard(path)
    assert tone_of(wave) == 300
    assert notes == ()
    inner = wave[2000:-2000]
    assert np.abs(inner).max() == pytest.approx(0.3 / (2 * R + 2), abs=0.004)


@pytest.mark.parametrize("codec", ["aac", "libopus"])
def test_eight_planes_are_read(codec: str, tmp_path: Path) -> None:
    """PyAV crashes when it reads the planes of such a frame."""
    channels: list[NDArray[Any]] = [np.zeros(48000)] * 8
    channels[2] = sine(1, 48000, 300, 0.3)
    path = write_channels(tmp_path / "a.wav", channels, "7.1", rate=48000)
    wave, notes = heard(to_aac(path, tmp_path / "a.mka", "7.1", codec))
    assert (tone_of(wave), notes) == (300, ())
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.3 / (2 * R + 3), abs=0.002)


def to_aac(source: Path, target: Path, layout: str = "5.1", codec: str = "aac") -> Path:
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream: Any = write.add_stream(codec, rate=48000, layout=layout, bit_rate=512000)
        for frame in read.decode(audio=0):
            write.mux(stream.encode(frame))
        write.mux(stream.encode(None))
    return target


def test_mono_and_stereo_are_the_mean_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    left, right = rng.uniform(-0.9, 0.9, (2, 16000))
    wave, notes = heard(write_channels(tmp_path / "a.wav", [left, right], "stereo"))
    stored = (np.stack([left, right]) * 32768).round() / 32768
    assert np.array_equal(wave, stored.mean(axis=0).astype(np.float32))
    assert notes == ()
    mono, _ = heard(write_channels(tmp_path / "b.wav", [left], "mono"))
    assert np.array_equal(mono, stored[0].astype(np.float32))


@pytest.mark.parametrize(
    ("gain", "shift", "cancels"),
    [
        (-1, 0, True),
        (-0.9, 0, True),
        (-0.5, 0, False),
        (0, 0, False),
        (1, 0, False),
        (-1, 7, False),
    ],
)
def test_opposite_channels_are_noticed_and_heard(
    gain: float, shift: int, cancels: bool, tmp_path: Path
) -> None:
    left = np.random.default_rng(5).normal(0, 0.1, 16000)
    right = gain * np.roll(left, shift)
    wave, notes = heard(write_channels(tmp_path / "a.wav", [left, right], "stereo"))
    assert notes == (("opposite phase",) if cancels else ())
    expected = left if cancels else (left + right) / 2
    np.testing.assert_allclose(wave, expected, atol=1e-4)


def test_the_louder_of_opposite_channels_is_taken(tmp_path: Path) -> None:
    left = np.random.default_rng(5).normal(0, 0.1, 16000)
    wave, _ = heard(write_channels(tmp_path / "a.wav", [-0.95 * left, left], "stereo"))
    np.testing.assert_allclose(wave, left, atol=1e-4)
    # A centre beside them is heard in the mix, and nothing else is needed.
    centre = sine(1, 16000, 300, 0.2)
    wave, notes = heard(write_channels(tmp_path / "b.wav", [left, -left, centre], "3.0"))
    assert notes == ()
    np.testing.assert_allclose(wave, centre / (1 + 2 * R), atol=1e-4)


def test_opposite_for_half_of_the_time(tmp_path: Path) -> None:
    """What holds for most of the sound decides, whatever its loudness."""
    left = np.random.default_rng(5).normal(0, 0.1, 48000)
    right = -left
    right[:12000] = left[:12000]
    assert heard(write_channels(tmp_path / "a.wav", [left, right], "stereo"))[1] != ()
    right[:36000] = left[:36000]
    assert heard(write_channels(tmp_path / "b.wav", [left, right], "stereo"))[1] == ()


def test_only_the_span_is_judged(tmp_path: Path) -> None:
    left = np.random.default_rng(5).normal(0, 0.1, 64000)
    right = np.concatenate([left[:32000], -left[32000:]])
    whole = job(write_channels(tmp_path / "a.wav", [left, right], "stereo"), "audio")
    assert decode(replace(whole, end=1.8)).notes == ()
    assert decode(replace(whole, start=2.3)).notes == ("opposite phase",)


@pytest.mark.parametrize(
    ("amplitude", "note"), [(0.0, "silent"), (0.0009, "silent"), (0.002, ""), (1.0, "")]
)
def test_silence_is_noticed(amplitude: float, note: str, tmp_path: Path) -> None:
    wave = sine(1, 16000, 220, amplitude)
    assert heard(write_channels(tmp_path / "a.wav", [wave], "mono"))[1] == ((note,) if note else ())


@pytest.mark.parametrize("channels", [1, 2])
def test_flat_tops_are_noticed_and_full_scale_is_not(channels: int, tmp_path: Path) -> None:
    layout = "mono" if channels == 1 else "stereo"
    quiet = [sine(1, 16000, 330, 0.1)] * (channels - 1)
    for gain, notes in ((1.0, ()), (1.5, ("clipped",)), (8.0, ("clipped",))):
        loud = np.clip(sine(1, 16000, 220, gain), -1, 1)
        path = write_channels(tmp_path / "a.wav", [*quiet, loud], layout)
        assert heard(path)[1] == notes
