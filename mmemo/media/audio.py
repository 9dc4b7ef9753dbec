"""Read the mono waveform of a span.

Shapes: n samples in the file, S samples at the requested rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from mmemo.errors import MediaError
from mmemo.media.downmix import CANCELLED, CLIPPED, SILENT, Downmix, is_silent
from mmemo.media.scan import Scan, reason

Wave = NDArray[np.float32]

_PREROLL = 0.25  # seconds decoded before the span, so that codec and resampler have settled
_GAP = 0.05  # seconds by which a time stamp may deviate before it counts as a gap
# Formats with only estimated positions, or with wrong time stamps, after a seek; and such codecs.
_NO_SEEK = frozenset({"mp3", "aac", "amr", "ogg", "mpeg"})
_NO_SEEK_CODECS = frozenset({"g722", "g726", "g726le"})


@dataclass(slots=True)
class _Run:
    """Audio without gaps at ``rate`` Hz. Its first frame has the time stamp ``first`` (seconds)."""

    first: float
    rate: int
    count: int = 0
    strays: list[float] = field(default_factory=list[float])
    parts: list[Wave] = field(default_factory=list[Wave])

    @property
    def start(self) -> float:
        """Start in seconds: the mean over all time stamps, because each may be rounded to ms."""
        return self.first + sum(self.strays) / len(self.strays)


def read_waveform(
    container: Any, stream: Any, scan: Scan, start: float, end: float, rate: int, name: str
) -> tuple[Wave, tuple[str, ...]]:
    """Read (S,) float32 in [-1, 1] from ``start`` to ``end``, or to the end of the audio.

    Channels are mixed (:mod:`mmemo.media.downmix`); where the mix cancels itself, the loudest
    channel is read alone. Gaps, and the time before a stream that starts late, are filled with
    zeros, so that sample s is at start + s / rate seconds.

    Returns:
        The waveform, and notes on it: ``opposite phase``, ``silent``, ``clipped``.

    Raises:
        MediaError: ``no_audio`` (nothing in the span), ``truncated``, ``decode``.
    """
    track = scan.audio
    if track is None or track.end <= start or track.start >= end:
        raise MediaError(name, "no_audio", f"has no sound between {start:g} s and {end:g} s")
    until = min(end, track.end)
    size = round((until - start) * rate)

    def read(downmix: Downmix) -> tuple[Wave, int]:
        wave: Wave = np.zeros(size, dtype=np.float32)
        heard = 0
        for run in _runs(container, stream, scan, start, end, downmix):
            at = round((run.start - start) * rate)
            heard = max(heard, _place(wave, _resample(run, rate), at))
        return wave, heard

    downmix = Downmix()
    try:
        wave, heard = read(downmix)
        # Only such a clip is read twice, so no other has to keep its channels in memory.
        if downmix.loudest is not None:
            wave, heard = read(Downmix(downmix.loudest))
    except (av.error.InvalidDataError, LookupError) as error:
        raise MediaError(name, "decode", f"the audio is damaged ({reason(error)})") from error
    # A gap is silence, and no fault; only sound that is missing at the end is.
    if heard < len(wave) - _PREROLL * rate:
        detail = f"{heard / rate:.2f} s of {len(wave) / rate:.2f} s of sound could be decoded"
        raise MediaError(name, "truncated", f"only {detail}; fetch the file again")
    if not np.isfinite(wave).all():
        raise MediaError(name, "decode", "the audio contains NaN or infinity; re-encode it")
    found = {
        CANCELLED: downmix.loudest is not None,
        SILENT: is_silent(wave),
        CLIPPED: downmix.clipped,
    }
    # Lossy codecs and the resampler overshoot full scale.
    wave = np.clip(wave, -1.0, 1.0, out=wave)
    return wave, tuple(note for note, holds in found.items() if holds)


def _runs(
    container: Any, stream: Any, scan: Scan, start: float, end: float, downmix: Downmix
) -> Iterator[_Run]:
    # Options count only before the codec opens, and the container may be read more than once.
    if not stream.codec_context.is_open:
        # Raise on damaged packets, which FFmpeg would otherwise conceal.
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_count = 1
    track = scan.audio
    assert track is not None
    base = float(stream.time_base)
    at = 0
    formats = set(container.format.name.split(","))
    if not _NO_SEEK & formats and stream.codec_context.name not in _NO_SEEK_CODECS:
        # Spans count from the file's start, packets on the file's own clock.
        before = (start - _PREROLL + scan.origin) / base
        at = max(0, int(np.searchsorted(track.keys, before, "right")) - 1)
    container.seek(int(track.seeks[at]), stream=stream)
    run: _Run | None = None
    late = int(track.keys[at]) + round(_PREROLL / base)
    for frame in _frames(container, stream, late):
        here = run.first + run.count / run.rate if run else 0.0
        # A frame without a time stamp continues the one before it.
        time = here if frame.pts is None else frame.pts * base - scan.origin
        if time >= end:
            break
        # Each run is resampled alone: the zeros of a gap must not be smeared into the sound.
        if run is None or run.rate != frame.sample_rate or abs(time - here) > _GAP:
            if run is not None:
                yield run
            run, here = _Run(time, frame.sample_rate), time
        run.strays.append(time - here)
        run.parts.append(
            downmix.mono(frame, count=time + frame.samples / frame.sample_rate > start)
        )
        run.count += frame.samples
    if run is not None:
        yield run


def _frames(container: Any, stream: Any, late: int) -> Iterator[Any]:
    """Decoded frames, from a packet on that begins before ``late``, in units of the time base.

    Raises:
        LookupError: the seek ended behind it, so that sound would be lost.
    """
    first = True
    for packet in container.demux(stream):
        if first and packet.pts is not None and packet.size:
            if packet.pts > late:
                raise LookupError("its beginning is not found by a seek")
            first = False
        yield from packet.decode()


def _resample(run: _Run, rate: int) -> Wave:
    wave: Wave = np.concatenate(run.parts)
    if run.rate == rate:
        return wave
    # One long frame, because PyAV has a cost per frame.
    frame = av.AudioFrame.from_ndarray(wave[None, :], format="flt", layout="mono")
    frame.sample_rate = run.rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    # None flushes the samples that the filter holds back.
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def _place(wave: Wave, samples: Wave, at: int) -> int:
    """Write ``samples`` at index ``at``, clipped to ``wave``; returns the index where they end."""
    left, right = max(0, at), min(len(wave), at + len(samples))
    if left < right:
        wave[left:right] = samples[left - at : right - at]
    return right
