"""Real media files for tests, written with PyAV.

A frame shows its own number: ``drawn(i, size)`` is what frame ``i`` looked like before encoding,
and ``frame_number`` reads the number back from a decoded frame. The sound is one sine wave.
"""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

_BITS = 8
_TIME_BASE = Fraction(1, 12800)


def drawn(number: int, size: tuple[int, int] = (96, 96)) -> NDArray[np.uint8]:
    """Frame ``number`` at ``size`` = (width, height): colour ramps over a bar of 8 bits.

    Returns (H, W, 3) uint8 RGB. The top quarter holds the number in binary, black or white.
    """
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    red = 255 * ((x + number / 24) % 1)
    frame = np.stack([red, 255 * y, 128 + 0 * x], axis=-1)
    for bit in range(_BITS):
        columns = slice(bit * width // _BITS, (bit + 1) * width // _BITS)
        frame[: height // 4, columns] = 255 * (number >> bit & 1)
    return frame.astype(np.uint8)


def frame_number(frame: NDArray[np.uint8]) -> int:
    """The number that a decoded (H, W, 3) frame shows."""
    height, width = frame.shape[:2]
    bar = frame[: height // 4].mean(axis=(0, 2))
    return sum(
        1 << bit
        for bit in range(_BITS)
        if bar[bit * width // _BITS + 2 : (bit + 1) * width // _BITS - 2].mean() > 128
    )


def sine(seconds: float, rate: int, tone: float, amplitude: float = 0.5) -> NDArray[np.float32]:
    """(S,) float32 sine of ``tone`` Hz."""
    at = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * tone * at)).astype(np.float32)


def write_clip(
    path: Path,
    seconds: float = 2.0,
    fps: int = 12,
    size: tuple[int, int] = (96, 96),
    audio: bool = True,
    video: bool = True,
    tone: float = 220.0,
    *,
    draw: Callable[[int, tuple[int, int]], NDArray[np.uint8]] = drawn,
    codec: str = "libx264",
    rotation: int = 0,
    frame_times: Sequence[float] | None = None,
    sample_rate: int = 44100,
    channels: int = 1,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
) -> Path:
    """Write one clip; the suffix of ``path`` chooses the container (mp4, mkv, m4a, ...).

    ``size`` is (width, height); odd sizes are stored as yuv444p. ``rotation`` in degrees is
    written as display metadata. ``frame_times`` in seconds makes the frame rate variable.
    ``options`` are added to the video encoder's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        picture = sound = None
        if video:
            picture = container.add_stream(codec, rate=fps)
            picture.width, picture.height = size
            odd = size[0] % 2 or size[1] % 2
            picture.pix_fmt = "yuv444p" if odd else "yuv420p"
            picture.options = {"crf": "10", "preset": "ultrafast", "bf": str(b_frames)}
            picture.options |= {"x265-params": "log-level=none"} if codec == "libx265" else {}
            picture.options |= options or {}
            # AVI counts frames and knows no finer clock.
            base = Fraction(1, fps) if path.suffix == ".avi" else _TIME_BASE
            picture.time_base = picture.codec_context.time_base = base
            picture.codec_context.max_b_frames = b_frames
            picture.codec_context.gop_size = 8
        if audio:
            layout = "mono" if channels == 1 else "stereo"
            name = {".mp3": "libmp3lame", ".wav": "pcm_s16le"}.get(path.suffix, "aac")
            sound = container.add_stream(name, rate=sample_rate, layout=layout)
        if picture is not None:
            count = round(seconds * fps)
            times = [i / fps for i in range(count)] if frame_times is None else frame_times
            for number, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(draw(number, size), format="rgb24")
                frame.pts, frame.time_base = round(time / base), base
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        if sound is not None:
            wave_ = sine(seconds, sample_rate, tone)
            samples = np.ascontiguousarray((np.stack([wave_] * channels, 1) * 32767).astype("<i2"))
            frame = av.AudioFrame.from_ndarray(
                samples.reshape(1, -1), format="s16", layout=sound.layout.name
            )
            frame.sample_rate, frame.pts = sample_rate, 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    if rotation:
        _rotate(path, rotation)
    return path


def _rotate(path: Path, degrees: int) -> None:
    """Write the display matrix of an mp4's first track: a clockwise turn by 0/90/180/270."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees % 360]
    data = bytearray(path.read_bytes())
    box = data.index(b"tkhd")
    matrix = box + 4 + 4 + 36  # after the name, version and flags: version 0 fields
    one = 1 << 16
    struct.pack_into(">9i", data, matrix, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))


def write_wav(path: Path, seconds: float = 2.0, rate: int = 16000, tone: float = 220.0) -> Path:
    """A mono 16-bit WAV file, written by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((sine(seconds, rate, tone) * 32767).astype("<i2").tobytes())
    return path
