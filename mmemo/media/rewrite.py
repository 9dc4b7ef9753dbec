"""Write a stream of a file to a file of its own, made worse or as it is, beside copied streams.

A target of :class:`mmemo.media.decode_pool.DecodePool`, because what is read may hang a decoder.
``job.want`` says which streams are written; ``job.options`` are those of :class:`Rewriting`. The
picture is written upright with square pixels, as the models see it, and the sound mono.

Equal input gives equal bytes: one thread, no macroblock tree (as in :mod:`mmemo.world.render`), no
names of programs in the header.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.audio import read_waveform
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.decode import read_pyav
from mmemo.media.perturb import Perturbation, perturb_frames, perturb_sound
from mmemo.media.probe import need_span, need_streams, open_media, steady
from mmemo.media.scan import Scan, reason, scan_packets
from mmemo.media.tracks import audio_stream, need_tracks, video_stream

VERSION = 1
"""Raised when equal jobs give other bytes than before."""

_CRF = 8  # noise survives
_MP4 = frozenset({".mp4", ".m4v", ".m4a", ".mov"})
_CLOCK = Fraction(1, 90000)
_PICTURES = frozenset({"video", "face"})


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What is written, as plain values in ``DecodeJob.options``."""

    out: str
    """The file to write; its suffix chooses the container, see :func:`suffix`."""
    change: Mapping[str, Any] | None
    """A :class:`Perturbation`; None writes the streams as they are."""
    base: str | None = None
    """File whose other streams are copied."""


def suffix(want: Container[Modality], sources: Sequence[Path], *, encoded: bool) -> str:
    """The suffix of the file to write.

    Args:
        sources: the files that streams are taken from: the job's own and the base.
        encoded: whether the job's streams are encoded, and not copied.
    """
    if encoded and "audio" in want:
        return ".mkv" if len(sources) > 1 or "video" in want else ".wav"
    # Only an mp4 keeps the edit lists that say what of another mp4's sound is padding.
    return ".mp4" if all(one.suffix.lower() in _MP4 for one in sources) else ".mkv"


def rewrite(job: DecodeJob) -> DecodedClip:
    """Write ``options.out`` in one step. Returns the SHA-256 of its bytes as ``digest``.

    Streams that are not changed are copied packet by packet, unless ``job`` has a span.

    Raises:
        MediaError: the file cannot be used, or the change would change nothing.
    """
    options = Rewriting(**job.options)
    out = Path(options.out)
    part = out.with_name(f".{out.stem}.part{os.getpid()}{out.suffix}")
    with steady(job.path, job.name), open_media(job.path, job.name) as container:
        try:
            _write(container, job, options, part)
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
            part.replace(out)
        except (MemoryError, av.error.MemoryError) as error:
            detail = "rewriting needs more memory than decode.memory_mb allows; raise it"
            raise MediaError(job.name, "out_of_memory", detail) from error
        except av.FFmpegError as error:
            detail = f"cannot be rewritten ({reason(error)})"
            raise MediaError(job.name, "decode", detail) from error
        finally:
            with suppress(OSError):
                part.unlink()
    return DecodedClip(name=job.name, digest=digest, duration=0.0)


def _write(container: Any, job: DecodeJob, options: Rewriting, part: Path) -> None:
    need_tracks(container, job.name, job.want, job.sampling)
    picture = video_stream(container, job.sampling.video_track)
    sound = audio_stream(container, job.sampling.audio_track)
    need_streams(job.name, job.want, video=picture is not None, audio=sound is not None)
    scan = scan_packets(container, job.name, job.sampling)
    start, end = need_span(job.name, job.start, job.end, scan.duration, job.limits.max_seconds)
    wanted = [
        *([picture] if job.want & _PICTURES else []),
        *([sound] if "audio" in job.want else []),
    ]
    whole = options.change is None and job.start is None and job.end is None
    change = None if options.change is None else _perturbation(options.change)
    with ExitStack() as exits:
        # Without it, FFmpeg writes its version and random ids.
        flags = {"fflags": "+bitexact"}
        output: Any = exits.enter_context(av.open(str(part), "w", options=flags))
        writer = _Writer(output)
        if whole:
            writer.copy(container, wanted, scan.origin)
        elif job.want & _PICTURES:
            writer.picture(container, picture, scan, start, end, change, job.name)
        if not whole and "audio" in job.want:
            writer.sound(container, sound, scan, start, end, change, job.name)
        if options.base is not None:
            base = Path(options.base)
            exits.enter_context(steady(base, job.name))
            other: Any = exits.enter_context(open_media(base, job.name))
            kept = [
                None if job.want & _PICTURES else video_stream(other, job.sampling.video_track),
                None if "audio" in job.want else audio_stream(other, job.sampling.audio_track),
            ]
            origin = (other.start_time or 0) / av.time_base
            writer.copy(other, [one for one in kept if one is not None], origin)
        writer.close()


class _Writer:
    """Collects the packets of all streams, and writes them in order of time."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self._packets: list[tuple[float, int, Any]] = []

    def copy(self, container: Any, streams: list[Any], origin: float) -> None:
        """Copy streams packet by packet, from the file's start at ``origin`` seconds."""
        made = {one.index: self._output.add_stream_from_template(one) for one in streams}
        container.seek(0)
        for packet in container.demux(streams):
            if packet.dts is None:  # the end
                continue
            shift = round(origin / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            time = float(packet.dts * packet.time_base)
            packet.stream = made[packet.stream.index]
            self._add(time, packet)

    def picture(
        self,
        container: Any,
        stream: Any,
        scan: Scan,
        start: float,
        end: float,
        change: Perturbation | None,
        name: str,
    ) -> None:
        """Write the frames that are shown from ``start`` to ``end``, at their own times."""
        track = scan.video
        if track is None or track.end <= start or track.start >= end:
            raise MediaError(name, "no_frames", f"shows nothing between {start:g} s and {end:g} s")
        shown = track.pts * float(stream.time_base) - scan.origin
        first = max(0, int(np.searchsorted(shown, start + 1e-6, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(shown, end - 1e-6, side="left")))
        places = np.arange(first, last)
        frames = read_pyav(container, stream, track, places, name, None)
        if change is not None:
            frames = perturb_frames(frames, change, name)
        height, width = frames[0].shape[:2]
        options = {"preset": "veryfast", "crf": str(_CRF), "threads": "1", "bf": "0"}
        options["x264-params"] = "mbtree=0"
        made: Any = self._output.add_stream("libx264", rate=_rate(stream), options=options)
        made.width, made.height = width, height
        made.pix_fmt = "yuv444p"  # the colours of noise differ from pixel to pixel
        made.time_base = made.codec_context.time_base = _CLOCK
        begins = [round(max(0.0, float(shown[at]) - start) / _CLOCK) for at in places]
        until = round((min(track.end, end) - start) / _CLOCK)
        packets: list[Any] = []
        for frame, pts in zip(frames, begins, strict=True):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            image.pts, image.time_base = pts, _CLOCK
            packets += made.encode(image)
        packets += made.encode()
        # Frames are sampled from the whole time of a picture, so the last one's end matters too.
        # Without B-frames, packets come in the order of frames.
        for packet, pts, after in zip(packets, begins, [*begins[1:], until], strict=True):
            packet.duration = max(1, after - pts)
        self._encoded(packets)

    def sound(
        self,
        container: Any,
        stream: Any,
        scan: Scan,
        start: float,
        end: float,
        change: Perturbation | None,
        name: str,
    ) -> None:
        """Write the sound from ``start`` to ``end`` as 16-bit samples, mono, at its own rate."""
        rate = int(stream.rate)
        wave, _ = read_waveform(container, stream, scan, start, end, rate, name)
        if change is not None:
            wave = perturb_sound(wave, rate, change, name)
        made: Any = self._output.add_stream("pcm_s16le", rate=rate, layout="mono")
        samples: NDArray[np.int16] = np.rint(wave * 32767).astype(np.int16)
        step = max(1, rate // 10)  # packets of a tenth of a second, as players expect
        for at in range(0, len(samples), step):
            block = np.ascontiguousarray(samples[None, at : at + step])
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), at
            self._encoded(made.encode(frame))
        self._encoded(made.encode())

    def close(self) -> None:
        """Write the packets; a player expects those of one time beside each other."""
        for _, _, packet in sorted(self._packets, key=lambda one: one[:2]):
            self._output.mux(packet)

    def _encoded(self, packets: list[Any]) -> None:
        for packet in packets:
            self._add(float((packet.dts or 0) * packet.time_base), packet)

    def _add(self, time: float, packet: Any) -> None:
        self._packets.append((time, len(self._packets), packet))


def _rate(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else Fraction(25)


def _perturbation(values: Mapping[str, Any]) -> Perturbation:
    low, high = values["crop_scale"]
    whole: dict[str, Any] = {**values, "crop_scale": (low, high)}
    return Perturbation(**whole)
