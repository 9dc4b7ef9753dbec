"""Files that are written from other files: what is new in them, and what is copied."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode, decode_guarded
from mmemo.media.decode_pool import DecodePool
from mmemo.media.perturb import Perturbation, perturb_frames, perturb_sound
from mmemo.media.rewrite import rewrite, suffix
from tests.media_files import frame_number, write_clip, write_wav

LIMITS = DecodeConfig(workers=1)
FPS, SECONDS = 12, 2.0


def job(
    source: Path,
    want: set[Modality],
    out: Path,
    change: Perturbation | None = None,
    base: Path | None = None,
    span: tuple[float | None, float | None] = (None, None),
) -> DecodeJob:
    return DecodeJob(
        source,
        source.name,
        frozenset(want),
        SamplingConfig(),
        LIMITS,
        *span,
        options={
            "out": str(out),
            "change": None if change is None else asdict(change),
            "base": None if base is None else str(base),
        },
    )


def read(path: Path, *want: Modality, frames: int = 8, span: Any = (None, None)) -> DecodedClip:
    sampling = SamplingConfig(frames=frames, sample_rate=44100)
    return decode(DecodeJob(path, path.name, frozenset(want), sampling, LIMITS, *span))


def packets(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        stream = next(one for one in container.streams if one.type == kind)
        return [bytes(one) for one in container.demux(stream) if one.size]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", seconds=SECONDS, fps=FPS)


PICTURE_KINDS = ("noise", "blurred", "cropped", "shuffled_frames", "frozen_frame", "reversed")


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_a_worse_picture_equals_the_same_in_memory_and_the_sound_is_copied(
    clip: Path, tmp_path: Path, kind: str
) -> None:
    change = Perturbation(kind, 3)
    first = rewrite(job(clip, {"video"}, tmp_path / "one.mp4", change, clip))
    second = rewrite(job(clip, {"video"}, tmp_path / "two.mp4", change, clip))
    assert first.digest == second.digest
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert [one.name for one in tmp_path.iterdir() if one.name[0] == "."] == []
    count = round(SECONDS * FPS)
    original = read(clip, "video", "audio", frames=count)
    written = read(tmp_path / "one.mp4", "video", "audio", frames=count)
    assert original.frames is not None
    assert written.frames is not None
    expected = perturb_frames(list(original.frames), change, "a")
    gap = np.abs(written.frames.astype(int) - np.asarray(expected))
    # The codec's loss: a few of 255 levels in noise, less than one elsewhere.
    assert gap.mean() < (5 if kind == "noise" else 1)
    assert written.times == pytest.approx(original.times, abs=1e-3)
    assert packets(tmp_path / "one.mp4", "audio") == packets(clip, "audio")
    assert np.array_equal(written.waveform, original.waveform)
    assert (written.duration, written.notes) == (pytest.approx(original.duration), original.notes)


@pytest.mark.parametrize("kind", ["noise", "muted", "reversed", "shuffled_frames"])
def test_a_worse_sound_equals_the_same_in_memory_and_the_picture_is_copied(
    clip: Path, tmp_path: Path, kind: str
) -> None:
    change = Perturbation(kind, 3, snr_db=6)
    first = rewrite(job(clip, {"audio"}, tmp_path / "one.mkv", change, clip))
    second = rewrite(job(clip, {"audio"}, tmp_path / "two.mkv", change, clip))
    assert first.digest == second.digest
    original, written = (read(x, "video", "audio") for x in (clip, tmp_path / "one.mkv"))
    assert original.waveform is not None
    expected = perturb_sound(original.waveform, 44100, change, "a")
    assert written.waveform == pytest.approx(expected, abs=1e-4)
    assert packets(tmp_path / "one.mkv", "video") == packets(clip, "video")
    assert np.array_equal(written.frames, original.frames)
    assert written.times == pytest.approx(original.times, abs=1e-3)


def test_another_clips_sound_beside_this_clips_picture(clip: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "b.mp4", seconds=1.5, tone=500.0)
    rewrite(job(other, {"audio"}, tmp_path / "one.mp4", base=clip))
    written = read(tmp_path / "one.mp4", "video", "audio")
    assert np.array_equal(written.frames, read(clip, "video").frames)
    assert np.array_equal(written.waveform, read(other, "audio").waveform)
    assert packets(tmp_path / "one.mp4", "audio") == packets(other, "audio")
    assert packets(tmp_path / "one.mp4", "video") == packets(clip, "video")
    rewrite(job(other, {"video"}, tmp_path / "two.mp4", base=clip))
    written = read(tmp_path / "two.mp4", "video", "audio")
    assert np.array_equal(written.frames, read(other, "video").frames)
    assert np.array_equal(written.waveform, read(clip, "audio").waveform)


def test_a_span_is_a_file_of_its_own(clip: Path, tmp_path: Path) -> None:
    change = Perturbation("reversed", 1)
    rewrite(job(clip, {"video"}, tmp_path / "v.mp4", change, span=(0.5, 1.5)))
    found = read(tmp_path / "v.mp4", "video", frames=FPS)
    assert found.frames is not None
    assert [frame_number(x) for x in found.frames] == list(range(17, 5, -1))
    assert found.duration == pytest.approx(1.0, abs=0.01)
    rewrite(job(clip, {"audio"}, tmp_path / "a.wav", change, span=(0.5, 1.5)))
    whole = read(clip, "audio", span=(0.5, 1.5)).waveform
    assert whole is not None
    assert read(tmp_path / "a.wav", "audio").waveform == pytest.approx(whole[::-1], abs=1e-4)


def test_both_streams_turned_pictures_odd_sizes_and_variable_rates(tmp_path: Path) -> None:
    times = [0, 0.1, 0.3, 0.35, 0.7, 0.9]
    source = write_clip(
        tmp_path / "a.mp4", seconds=1.0, size=(98, 66), rotation=90, frame_times=times
    )
    rewrite(job(source, {"video", "audio"}, tmp_path / "one.mkv", Perturbation("noise", 1)))
    original, written = (read(x, "video", "audio") for x in (source, tmp_path / "one.mkv"))
    assert original.frames is not None
    assert written.frames is not None
    assert written.frames.shape == original.frames.shape == (8, 98, 66, 3)
    assert written.times == pytest.approx(original.times, abs=2e-3)
    assert not np.array_equal(written.waveform, original.waveform)
    odd = write_clip(tmp_path / "b.mp4", seconds=1.0, size=(97, 65), audio=False)
    rewrite(job(odd, {"video"}, tmp_path / "two.mp4", Perturbation("blurred", 1)))
    found = decode_guarded(
        DecodeJob(tmp_path / "two.mp4", "two", frozenset({"video"}), SamplingConfig(), LIMITS)
    )
    assert found.frames is not None
    assert found.frames.shape == (8, 65, 97, 3)


def test_what_cannot_be_written_leaves_nothing(clip: Path, tmp_path: Path) -> None:
    source = tmp_path / "short.mp4"
    write_clip(source, seconds=1 / FPS, fps=FPS, audio=False)
    with pytest.raises(MediaError, match="changes nothing in one frame"):
        rewrite(job(source, {"video"}, tmp_path / "x/one.mp4", Perturbation("reversed", 1)))
    with pytest.raises(MediaError, match="no audio stream"):
        rewrite(job(source, {"audio"}, tmp_path / "one.wav", Perturbation("reversed", 1)))
    with pytest.raises(MediaError, match="cannot be rewritten"):
        rewrite(job(clip, {"video"}, tmp_path / "no/one.mp4", Perturbation("blurred", 1)))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["short.mp4"]


def test_a_pool_of_processes_writes_and_names_what_is_damaged(clip: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "b.mp4"
    damaged.write_bytes(clip.read_bytes()[:3000])
    jobs = [
        job(one, {"audio"}, tmp_path / f"{one.stem}.wav", Perturbation("muted", 1))
        for one in (clip, damaged)
    ]
    with DecodePool(LIMITS, target="mmemo.media.rewrite:rewrite") as pool:
        good, bad = pool.map(jobs)
    assert isinstance(good, DecodedClip)
    assert isinstance(bad, BadClip)
    assert bad.kind == "truncated"
    assert not np.any(read(tmp_path / "a.wav", "audio").waveform)


def test_the_container_fits_what_is_in_it(tmp_path: Path) -> None:
    mp4, avi, wav = Path("a.mp4"), Path("a.avi"), Path("a.wav")
    for want, sources, encoded, expected in (
        ({"audio"}, [wav], True, ".wav"),
        ({"audio"}, [mp4, mp4], True, ".mkv"),
        ({"video"}, [mp4, mp4], True, ".mp4"),
        ({"video"}, [avi, avi], True, ".mkv"),
        ({"audio"}, [mp4, mp4], False, ".mp4"),
        ({"audio"}, [wav, mp4], False, ".mkv"),
    ):
        assert suffix(want, sources, encoded=encoded) == expected
    # Such a mixture can be read.
    sound, picture = write_wav(tmp_path / "s.wav", seconds=1.0), tmp_path / "p.avi"
    write_clip(picture, seconds=1.0, audio=False, codec="mpeg4", b_frames=0)
    rewrite(job(sound, {"audio"}, tmp_path / "one.mkv", base=picture))
    written = read(tmp_path / "one.mkv", "video", "audio")
    assert np.array_equal(written.frames, read(picture, "video").frames)
    assert np.array_equal(written.waveform, read(sound, "audio").waveform)
