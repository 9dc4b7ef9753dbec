from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mmemo.errors import MediaError
from mmemo.media.probe import file_digest, probe
from tests.media_files import write_clip, write_wav


def test_reads_streams_duration_rate_and_digest(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=1.5, fps=12, size=(96, 64), channels=2)
    info = probe(path)
    assert info.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.size == path.stat().st_size
    assert info.duration == pytest.approx(1.5, abs=1e-3)
    assert info.video is not None
    assert (info.video.width, info.video.height) == (96, 64)
    assert (info.video.frames, info.video.codec) == (18, "h264")
    assert info.video.fps == pytest.approx(12)
    assert info.audio is not None
    assert (info.audio.sample_rate, info.audio.channels, info.audio.codec) == (44100, 2, "aac")


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".m4a", ".flac", ".mkv"])
def test_sound_without_picture(tmp_path: Path, suffix: str) -> None:
    if suffix == ".flac":
        path = tmp_path / "a.flac"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("flac", rate=16000, layout="mono")
            for packet in _sound(stream):
                out.mux(packet)
    else:
        path = write_clip(tmp_path / f"a{suffix}", video=False)
    info = probe(path)
    assert info.video is None
    assert info.audio is not None
    assert info.duration == pytest.approx(2.0, abs=0.06)


def _sound(stream: Any) -> list[Any]:
    frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 32000), dtype=np.int16), format="s16", layout="mono"
    )
    frame.sample_rate = 16000
    return [*stream.encode(frame), *stream.encode(None)]


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    """Music files carry their cover as a one-frame video stream."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        cover = out.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame(32, 32, "rgb24")))
        for packet in _sound(sound):
            out.mux(packet)
    with av.open(str(path)) as opened:
        assert len(opened.streams.video) == 1
    info = probe(path)
    assert info.video is None
    assert info.audio is not None


def test_a_changed_file_has_a_new_digest(tmp_path: Path) -> None:
    """Same size, same time of modification: the digest must still be that of the bytes."""
    path = write_wav(tmp_path / "a.wav")
    status = path.stat()
    before = file_digest(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(path) == hashlib.sha256(bytes(data)).hexdigest() != before


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frame_times=[0, 0.1, 0.3, 0.35, 1.2, 1.9])
    info = probe(path)
    assert info.video is not None
    assert info.video.frames == 6
    assert info.duration == pytest.approx(2.0, abs=0.05)


def test_errors_say_the_name_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^clips/a\.mp4: missing") as caught:
        probe(tmp_path / "none.mp4", "clips/a.mp4")
    assert caught.value.path == "clips/a.mp4"
    with pytest.raises(MediaError) as caught:
        probe(tmp_path, "folder")
    assert caught.value.kind == "missing"
