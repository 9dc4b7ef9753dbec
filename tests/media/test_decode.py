from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmemo.data.sample import FaceBox, Modality
from mmemo.errors import MediaError
from mmemo.media import decode as decode_module
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, FaceConfig, SamplingConfig
from mmemo.media.decode import decode, decode_guarded, place_frames
from mmemo.media.scan import Track
from tests.media_files import drawn, frame_number, sine, write_clip, write_wav


def job(
    path: Path,
    *want: Modality,
    backend: Any = "pyav",
    start: float | None = None,
    end: float | None = None,
    boxes: tuple[FaceBox, ...] = (),
    limits: dict[str, Any] | None = None,
    **sampling: Any,
) -> DecodeJob:
    return DecodeJob(
        path=path,
        name=path.name,
        want=frozenset(want or ("video", "audio")),
        sampling=SamplingConfig(**sampling),
        limits=DecodeConfig(backend=backend, **(limits or {})),
        start=start,
        end=end,
        face_boxes=boxes,
    )


def numbers(clip: DecodedClip) -> list[int]:
    assert clip.frames is not None
    return [frame_number(frame) for frame in clip.frames]


def test_frames_stand_at_the_centres_of_equal_parts(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=2, fps=12)
    clip = decode(job(path, "video", frames=8))
    # Centres 0.125, 0.375, ... lie in the middle of frames 1, 4, 7, ...
    assert numbers(clip) == [1, 4, 7, 10, 13, 16, 19, 22]
    assert clip.times is not None
    np.testing.assert_allclose(clip.times, np.array(numbers(clip)) / 12, atol=1e-3)
    assert clip.frames is not None
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (8, 96, 96, 3)
    # RGB, not BGR: the drawing is red to the right, green to the bottom.
    assert np.abs(clip.frames[0].astype(int) - drawn(1)).mean() < 6
    assert clip.waveform is None
    assert clip.faces is None


def test_a_span_is_taken_out_of_the_middle(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=4, fps=12)
    clip = decode(job(path, start=1.0, end=2.0, frames=4))
    assert numbers(clip) == [13, 16, 19, 22]
    assert clip.waveform is not None
    assert clip.waveform.shape == (16000,)
    assert clip.duration == pytest.approx(4.0, abs=1e-3)
    one = decode(job(path, "video", start=2.0, end=2.05, frames=1))
    assert numbers(one) == [24]


def test_a_short_clip_repeats_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=0.25, fps=12, audio=False)
    clip = decode(job(path, "video", frames=9))
    assert numbers(clip) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 40),
    st.floats(0, 0.9),
    st.floats(0.01, 1),
)
def test_the_frame_on_screen_is_picked(
    steps: list[int], count: int, low: float, share: float
) -> None:
    """Against a direct search, for any frame times and span."""
    pts = np.cumsum([0, *steps[:-1]]).astype(np.int64)
    total = sum(steps) / 100
    start, end = low * total, (low + (1 - low) * share) * total
    track = Track(pts, pts[:1], pts[:1], 0.0, total)
    places, times = place_frames(track, 0.01, 0.0, start, end, count)
    assert len(places) == len(times) == count
    for i, place in enumerate(places):
        centre = start + (i + 0.5) * (end - start) / count
        shown = max(k for k, p in enumerate(pts) if k == 0 or p * 0.01 <= centre + 1e-6)
        assert place == shown
        assert times[i] == pytest.approx(pts[place] * 0.01)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "long groups": {"seconds": 6.0, "fps": 25, "b_frames": 3},
    "no b frames": {"b_frames": 0},
    "odd size": {"size": (97, 95)},
    "variable rate": {"frame_times": [0, 0.1, 0.3, 0.35, 1.2, 1.9]},
    "late start": {"frame_times": [0.5 + i / 12 for i in range(18)]},
    "turned 90": {"rotation": 90, "size": (96, 64)},
    "turned 180": {"rotation": 180},
    "turned 270": {"rotation": 270, "size": (96, 64)},
    "mpeg4": {"codec": "mpeg4"},
    "hevc": {"codec": "libx265"},
    "open groups": {"seconds": 5.0, "options": {"x264-params": "open-gop=1:keyint=8:bframes=3"}},
    "silent": {"audio": False},
    "one frame": {"seconds": 1 / 12, "audio": False},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("span", [(None, None), (0.6, 1.3)])
def test_both_backends_return_the_same_frames(
    tmp_path: Path, name: str, span: tuple[float | None, float | None]
) -> None:
    path = write_clip(tmp_path / "a.mp4", **VARIANTS[name])
    if name == "one frame" and span[0] is not None:
        span = (0.01, 0.05)
    settings_ = {"start": span[0], "end": span[1], "frames": 7}
    ours = decode(job(path, "video", **settings_))
    others = [decode_guarded(job(path, "video", backend="auto", **settings_))]
    if name not in ("mpeg4", "hevc", "open groups"):  # decord returns wrong frames for these
        others.append(decode(job(path, "video", backend="decord", **settings_)))
    start, end = span[0] or 0.0, span[1] or ours.duration
    if not name.startswith(("turned", "odd", "variable", "late", "one")):
        rate = VARIANTS[name].get("fps", 12)
        centres = start + (np.arange(7) + 0.5) * (end - start) / 7
        assert numbers(ours) == list(np.floor(centres * rate + 1e-4).astype(int))
    for other in others:
        np.testing.assert_array_equal(ours.frames, other.frames)
        np.testing.assert_array_equal(ours.times, other.times)


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mov", ".ts", ".flv"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_other_containers(tmp_path: Path, suffix: str, b_frames: int) -> None:
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    # decord repeats frames of a transport stream with B frames, with a message and no error.
    path = write_clip(tmp_path / f"a{suffix}", b_frames=b_frames, codec=codec)
    clip = decode_guarded(job(path, backend="auto"))
    expected = np.array([1, 4, 7, 10, 13, 16, 19, 22])
    # AVI has no time stamps, only an order: the delay of the encoder shows.
    assert np.abs(np.array(numbers(clip)) - expected).max() <= (1 if suffix == ".avi" else 0)
    assert clip.waveform is not None
    assert len(clip.waveform) == pytest.approx(32000, abs=1600)


def test_pyav_takes_over_where_decord_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import decord

    path = write_clip(tmp_path / "a.mp4")
    expected = decode(job(path))

    def broken(*_: Any, **__: Any) -> None:
        raise decord.DECORDError("cannot")

    monkeypatch.setattr(decord, "VideoReader", broken)
    clip = decode_guarded(job(path, backend="auto"))
    np.testing.assert_array_equal(clip.frames, expected.frames)
    with pytest.raises(MediaError, match="use backend auto") as caught:
        decode(job(path, backend="decord"))
    assert caught.value.kind == "decode"
    monkeypatch.setitem(sys.modules, "decord", None)  # not installed
    clip = decode_guarded(job(path, backend="auto"))
    np.testing.assert_array_equal(clip.frames, expected.frames)


def test_decord_is_left_when_it_shows_other_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong count, wrong times, wrong picture: each alone is noticed."""
    import decord

    path = write_clip(tmp_path / "a.mp4", seconds=1, audio=False)
    expected = decode(job(path, "video", frames=4)).frames
    whole = decord.VideoReader

    class Fewer(whole):
        def __len__(self) -> int:
            return 11

    class Shifted(whole):
        def get_frame_timestamp(self, places: Any) -> Any:
            return super().get_frame_timestamp(places) * 1.1

    class Later(whole):
        def get_batch(self, places: Any) -> Any:
            return super().get_batch([place + 1 for place in places])

    for reader in (Fewer, Shifted, Later):
        monkeypatch.setattr(decord, "VideoReader", reader)
        frames = decode_guarded(job(path, "video", backend="auto", frames=4)).frames
        np.testing.assert_array_equal(frames, expected)
        with pytest.raises(MediaError, match="use backend auto"):
            decode(job(path, "video", backend="decord", frames=4))


def test_decode_in_this_process_leaves_decord_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    assert decode(job(write_clip(tmp_path / "a.mp4"), backend="auto")).frames is not None


def test_display_rotation_is_applied(tmp_path: Path) -> None:
    upright = decode(job(write_clip(tmp_path / "a.mp4", size=(96, 64)), "video")).frames
    for degrees, turns in ((90, -1), (180, 2), (270, 1)):
        path = write_clip(tmp_path / f"{degrees}.mp4", size=(96, 64), rotation=degrees)
        turned = decode(job(path, "video")).frames
        assert upright is not None
        np.testing.assert_array_equal(turned, np.rot90(upright, turns, axes=(1, 2)))


def test_max_side_scales_down_and_never_up(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", size=(160, 96))
    small = decode(job(path, "video", max_side=80)).frames
    assert small is not None
    assert small.shape == (8, 48, 80, 3)
    full = decode(job(path, "video", max_side=400)).frames
    assert full is not None
    assert full.shape == (8, 96, 160, 3)
    halved = full.reshape(8, 48, 2, 80, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).max() <= 1
    guarded = decode_guarded(job(path, "video", backend="auto", max_side=80)).frames
    np.testing.assert_array_equal(small, guarded)


def test_faces_are_cut_from_full_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", size=(128, 128), audio=False)
    boxes = tuple(FaceBox(time=i / 12, box=(16.0, 32.0, 112.0, 128.0)) for i in range(24))
    face = FaceConfig(detector="boxes", size=48, margin=0.0)
    whole = decode(job(path, "video", "face", boxes=boxes, face=face))
    small = decode(job(path, "video", "face", boxes=boxes, face=face, max_side=32))
    only = decode(job(path, "face", boxes=boxes, face=face, max_side=32))
    assert whole.faces is not None
    assert small.faces is not None
    assert only.faces is not None
    assert whole.faces.found.all()
    np.testing.assert_array_equal(whole.faces.crops, small.faces.crops)
    np.testing.assert_array_equal(whole.faces.crops, only.faces.crops)
    assert small.frames is not None
    assert small.frames.shape == (8, 32, 32, 3)
    assert only.frames is None
    assert only.times is not None


# ------------------------------------------------------------------ sound


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_the_waveform_is_the_sound(tmp_path: Path, rate: int) -> None:
    path = write_wav(tmp_path / "a.wav", rate=44100, tone=330)
    wave = decode(job(path, "audio", sample_rate=rate)).waveform
    assert wave is not None
    assert wave.dtype == np.float32
    assert len(wave) == 2 * rate
    inner = slice(rate // 100, -rate // 100)  # the resampler rings at the ends
    np.testing.assert_allclose(wave[inner], sine(2, rate, 330)[inner], atol=5e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".m4a", ".mkv", ".mp3", ".wav"])
def test_containers_keep_the_sound_in_place(tmp_path: Path, suffix: str) -> None:
    """Codec delay must not shift the wave: compared with the sine that went in."""
    path = write_clip(tmp_path / f"a{suffix}", video=False, tone=220)
    wave = decode(job(path, "audio")).waveform
    assert wave is not None
    assert len(wave) == pytest.approx(32000, abs=500)
    np.testing.assert_allclose(wave[2000:30000], sine(2, 16000, 220)[2000:30000], atol=0.04)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.floats(0, 3.5), st.floats(0.05, 3))
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".wav", ".mp3"])
def test_a_span_is_a_slice_of_the_whole(
    tmp_path: Path, suffix: str, start: float, length: float
) -> None:
    path = tmp_path / f"a{suffix}"
    if not path.exists():
        write_clip(path, seconds=4, video=suffix in (".mp4", ".mkv"), tone=220)
    whole = decode(job(path, "audio")).waveform
    part = decode(job(path, "audio", start=start, end=min(4.0, start + length))).waveform
    assert whole is not None
    assert part is not None
    first = round(start * 16000)
    expected = whole[first : first + len(part)]
    assert abs(len(part) - round((min(4.0, start + length) - start) * 16000)) <= 400
    # Both are rounded to the nearest sample, so they may stand half a sample apart.
    edge = 200
    if len(part) > 4 * edge:
        np.testing.assert_allclose(
            part[edge : len(expected) - edge], expected[edge:-edge], atol=0.06
        )


def test_picture_does_not_change_the_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    both, alone = decode(job(path)).waveform, decode(job(path, "audio")).waveform
    np.testing.assert_array_equal(both, alone)


def test_channels_are_averaged_within_full_scale(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    left, right = sine(1, 16000, 200, 0.9), sine(1, 16000, 200, 0.5)
    samples = (np.stack([left, right], 1) * 32767).astype("<i2").reshape(1, -1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = 16000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    wave = decode(job(path, "audio")).waveform
    assert wave is not None
    np.testing.assert_allclose(wave, (left + right) / 2, atol=1e-3)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_every_sample_format(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sine(1, 16000, 200)[None], format="flt", layout="mono")
        frame.sample_rate = 16000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    wave = decode(job(path, "audio")).waveform
    assert wave is not None
    np.testing.assert_allclose(wave, sine(1, 16000, 200), atol=0.01)


def test_sound_that_begins_late_is_padded_and_a_gap_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        picture = out.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(drawn(number, (32, 32)), format="rgb24")
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))
        for begin in (0.5, 2.0):  # half a second of sound each
            tone = (sine(0.5, 16000, 220) * 32767).astype(np.int16)[None]
            sound = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            sound.sample_rate, sound.pts = 16000, round(begin * 16000)
            out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    wave = decode(job(path)).waveform
    assert wave is not None
    assert len(wave) == 40000  # the sound ends at 2.5 s, the picture at 3 s
    expected = np.zeros(40000, dtype=np.float32)
    expected[8000:16000] = expected[32000:] = sine(0.5, 16000, 220)
    np.testing.assert_allclose(wave, expected, atol=1e-3)


def test_one_decode_serves_all_modalities(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    boxes = (FaceBox(time=0.0, box=(8.0, 8.0, 88.0, 88.0)),)
    clip = decode(
        job(path, "video", "audio", "face", boxes=boxes, face=FaceConfig(detector="boxes"))
    )
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.faces is not None
    assert len(clip.digest) == 64
    assert clip.name == "a.mp4"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.m4a"])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_the_spans_of_a_file_share_one_reading_of_its_packets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    """And are the same as if each had read them."""
    wants: tuple[Modality, ...] = ("audio",) if name == "a.m4a" else ("video", "audio")
    backend = "pyav" if name in ("a.ts", "a.m4a") else backend
    path = write_clip(tmp_path / name, seconds=3, video=name != "a.m4a", tone=330.0)
    scans: list[str] = []
    whole = decode_module.scan_packets

    def scan(container: Any, name: str, *rest: Any) -> Any:
        scans.append(name)
        return whole(container, name, *rest)

    monkeypatch.setattr(decode_module, "scan_packets", scan)
    spans = [(None, None), (0.0, 1.0), (0.7, 2.1), (2.0, 3.0)]
    alone: list[DecodedClip] = []
    for start, end in spans:
        decode_module._scans.clear()
        alone.append(decode(job(path, *wants, backend=backend, start=start, end=end)))
    assert len(scans) == 4
    decode_module._scans.clear()
    scans.clear()
    together = [decode(job(path, *wants, backend=backend, start=s, end=e)) for s, e in spans]
    assert len(scans) == (4 if name == "a.ts" else 1)
    for one, two in zip(alone, together, strict=True):
        assert one.duration == two.duration
        for field in ("frames", "times", "waveform"):
            np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    path.write_bytes(write_clip(tmp_path / f"b{path.suffix}", video=False).read_bytes())
    decode(job(path, "audio"))  # another content is read again
    assert len(scans) == (5 if name == "a.ts" else 2)


def test_no_picture_stays_in_memory_until_cycles_are_collected(tmp_path: Path) -> None:
    """A worker with little memory must have it back before its next clip."""
    path = write_clip(tmp_path / "a.mp4", seconds=1)
    clip = DecodeJob(
        path, "a.mp4", frozenset({"video", "audio"}), SamplingConfig(frames=4), DecodeConfig()
    )
    decode(clip)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        decode(clip)
        gc.collect()
        held = {type(one).__name__ for one in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert "VideoFrame" not in held
