"""Sound files with given channels, and files of several tracks, written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from mmemo.data.sample import Modality
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from tests.media_files import drawn, sine


def job(path: Path, *want: Modality, backend: str = "pyav", **sampling: Any) -> DecodeJob:
    """A job for the whole of a file."""
    limits = DecodeConfig.model_validate({"backend": backend})
    return DecodeJob(path, path.name, frozenset(want), SamplingConfig(**sampling), limits)


def write_channels(
    path: Path, channels: Sequence[NDArray[Any]], layout: str, rate: int = 16000
) -> Path:
    """Float channels as 16-bit PCM with a channel layout; sound is lossless in wav and mkv."""
    samples = (np.stack(channels, 1) * 32768).round().clip(-32768, 32767).astype("<i2")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout=layout
        )
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@dataclass
class AudioTrack:
    """A track that holds one tone, which tells it from the others."""

    tone: float
    language: str = ""
    title: str = ""
    marks: Disposition = field(default_factory=lambda: Disposition(0))


def write_tracks(path: Path, tracks: Sequence[AudioTrack], seconds: float = 1.0) -> Path:
    """A file of several audio tracks at 16 kHz."""
    with av.open(str(path), "w") as container:
        codec = "aac" if path.suffix in (".mp4", ".ts") else "pcm_s16le"
        streams: list[Any] = []
        for track in tracks:
            stream: Any = container.add_stream(codec, rate=16000, layout="mono")
            stream.disposition = track.marks
            values = {"language": track.language, "title": track.title}
            stream.metadata.update({key: value for key, value in values.items() if value})
            streams.append(stream)
        for stream, track in zip(streams, tracks, strict=True):
            samples = (sine(seconds, 16000, track.tone) * 32767).astype("<i2")
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def write_videos(path: Path, firsts: Sequence[int], marks: Sequence[Disposition]) -> Path:
    """A file of several video tracks of 12 frames; track i shows numbers from ``firsts[i]`` on. An
    attached picture has one frame."""
    with av.open(str(path), "w") as container:
        streams: list[Any] = []
        for mark in marks:
            cover = bool(mark & Disposition.attached_pic)
            stream: Any = container.add_stream("mjpeg" if cover else "libx264", rate=12)
            stream.width = stream.height = 96
            stream.pix_fmt = "yuvj420p" if cover else "yuv420p"
            stream.disposition = mark
            streams.append(stream)
        for number in range(12):
            for stream, first in zip(streams, firsts, strict=True):
                if number and stream.disposition & Disposition.attached_pic:
                    continue
                # The last frames are equal, as in two cameras that fade to black together.
                shown = 0 if number == 11 else first + number
                frame = av.VideoFrame.from_ndarray(drawn(shown), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def tone_of(wave: NDArray[np.float32], rate: int = 16000) -> int:
    """The loudest frequency of a waveform, in Hz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return round(float(np.argmax(spectrum)) * rate / len(wave))
