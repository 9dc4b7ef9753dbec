"""Probe a media file: its streams, its duration, whether it is whole, and whether a row fits it.

Containers are opened with PyAV and a list of allowed formats. Playlists and other formats that make
the demuxer open further files or addresses are not on it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Container, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error

from mmemo.content import sha256
from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.config import SamplingConfig
from mmemo.media.containers import BOXES, is_broken_ogg, is_streamed, missing_bytes
from mmemo.media.display import Display, display_of, pixel_aspect
from mmemo.media.scan import DEFAULT_SAMPLING, Track, scan_packets
from mmemo.media.tracks import (
    audio_stream,
    audio_tracks,
    describe,
    video_stream,
    video_tracks,
)

av.logging.set_level(av.logging.PANIC)  # damage is reported as MediaError, not on the terminal
logging.getLogger("libav").setLevel(logging.CRITICAL)

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,ogg,wav,w64,mp3,aac,flac,aiff,"
    "caf,au,amr,rm,mxf,nut,dv,ac3,eac3,dts,wv,tta,ape"
)
_LOOK = 4  # frames that are decoded to see whether they are interlaced
_FIELD_ORDERS = {1: "progressive", 2: "tt", 3: "bb", 4: "tb", 5: "bt"}
_RACY_NS = 2_000_000_000  # a file may change again within one tick of the clock, unnoticed

CULPRITS: Mapping[str, frozenset[Modality]] = {
    "no_audio": frozenset({"audio"}),
    "no_video": frozenset({"video", "face"}),
    "no_frames": frozenset({"video", "face"}),
}
"""Error kind -> the streams that it concerns; the clip's other streams may be good."""
_SLACK = 0.25  # seconds that a row's end may exceed the file's, for rounding


@dataclass(frozen=True, slots=True)
class VideoStream:
    """One video stream, as stored and as displayed.

    ``width``, ``height``: pixels as stored. ``display_width``, ``display_height``: pixels of a
    decoded frame, after :mod:`mmemo.media.display`. ``sample_aspect``: width of a stored pixel
    divided by its height. ``rotation``: degrees clockwise by which the stored frame is turned for
    display, after ``mirrored`` has swapped its left and right. ``interlaced``: its frames consist
    of two fields, which decoding merges by deinterlacing; ``field_order`` is FFmpeg's name.
    ``start``: seconds from the file's start. ``seconds``: length on screen. ``tracks``: all video
    tracks of the file in a few words each.
    """

    width: int
    height: int
    fps: float
    frames: int
    codec: str
    sample_aspect: float = 1.0
    rotation: int = 0
    mirrored: bool = False
    interlaced: bool = False
    field_order: str = "unknown"
    display_width: int = 0
    display_height: int = 0
    start: float = 0.0
    seconds: float = 0.0
    tracks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AudioStream:
    """``sample_rate`` in Hz. ``start``: seconds from the file's start. ``seconds``: length.
    ``tracks``: all audio tracks of the file in a few words each.
    """

    sample_rate: int
    channels: int
    codec: str
    start: float = 0.0
    seconds: float = 0.0
    tracks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """``digest``: SHA-256 of the bytes, hex. ``size`` in bytes. ``duration`` in seconds."""

    digest: str
    size: int
    duration: float
    video: VideoStream | None
    audio: AudioStream | None


def probe(
    path: Path, name: str | None = None, sampling: SamplingConfig = DEFAULT_SAMPLING
) -> MediaInfo:
    """Read the streams, the duration and the digest of one file, visiting every packet.

    Args:
        path: the file.
        name: name of the file in errors; the path by default.
        sampling: says which tracks are read.

    Raises:
        MediaError: ``missing``, ``empty``, ``not_media``, ``truncated``, ``decode``,
            ``no_frames`` (every stream is empty) or ``changed`` (while it was read).
    """
    name = name or str(path)
    with steady(path, name) as digest, open_media(path, name) as container:
        scan = scan_packets(container, name, sampling)
        picture = sound = None
        video = video_stream(container, sampling.video_track)
        audio = audio_stream(container, sampling.audio_track)
        if video is not None and scan.video is not None:
            picture = _picture(container, video, scan.video)
        if audio is not None and scan.audio is not None:
            context, track = audio.codec_context, scan.audio
            sound = AudioStream(
                context.sample_rate,
                context.channels,
                context.name,
                start=track.start,
                seconds=track.end - track.start,
                tracks=_describe(audio_tracks(container), audio),
            )
        return MediaInfo(digest, int(container.size), scan.duration, picture, sound)


def _picture(container: Any, stream: Any, track: Track) -> VideoStream:
    context = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    count, length = len(track.pts), track.end - track.start
    measured = count / max(length, 1e-9)  # DV and others declare their clock as their rate
    aspect = pixel_aspect(stream)
    display, interlaced = Display(aspect), False
    for frame in _first_frames(container, stream, track):
        display = display_of(frame, aspect)
        interlaced = interlaced or frame.interlaced_frame
    wide, high = display.size(context.width, context.height)
    return VideoStream(
        width=context.width,
        height=context.height,
        fps=float(rate) if rate and 0.5 < float(rate) / measured < 2 else measured,
        frames=count,
        codec=context.name,
        sample_aspect=aspect,
        rotation=display.rotation,
        mirrored=display.mirrored,
        interlaced=interlaced,
        field_order=_FIELD_ORDERS.get(int(context.field_order), "unknown"),
        display_width=wide,
        display_height=high,
        start=track.start,
        seconds=length,
        tracks=_describe(video_tracks(container), stream),
    )


def _first_frames(container: Any, stream: Any, track: Track) -> list[Any]:
    """A few decoded frames; fewer where they are damaged, which is for decoding to report."""
    frames: list[Any] = []
    try:
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1  # starting threads takes longer than these frames
        container.seek(int(track.seeks[0]), stream=stream)
        for frame in container.decode(stream):
            frames.append(frame)
            if len(frames) == _LOOK:
                break
    except av.FFmpegError:
        pass
    return frames


def _describe(streams: list[Any], chosen: Any) -> tuple[str, ...]:
    return tuple(
        describe(stream, number) + (" (read)" if stream.index == chosen.index else "")
        for number, stream in enumerate(streams)
    )


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex, cached until the file's size or times change."""
    return _identity(path)[0]


def _identity(path: Path) -> tuple[str, tuple[int, ...]]:
    """The digest, and the file status that changes whenever the file is written to or replaced."""
    status = path.stat()
    state = (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    )
    if time.time_ns() - status.st_ctime_ns < _RACY_NS:
        return sha256(path), state
    return _digest(path, *state), state


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *_signature: int) -> str:
    return sha256(path)


@contextmanager
def steady(path: Path, name: str) -> Generator[str]:
    """Context manager that checks that the file does not change while the block reads it.

    Yields:
        The digest of the bytes that the block reads. A MediaError of the block is raised only if
        the file has not changed.

    Raises:
        MediaError: ``missing``, or ``changed`` if the file is another one at the end.
    """
    before, failure = _status(path, name), None
    try:
        yield before[0]
    except MediaError as error:
        # A file that is replaced while it is read looks damaged; "changed" is then the true reason.
        failure = error
    if _status(path, name) != before:
        detail = "was written to or replaced while it was read; start again when it is whole"
        raise MediaError(name, "changed", detail) from failure
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, and so all that was read.
            del failure


def _status(path: Path, name: str) -> tuple[str, tuple[int, ...]]:
    try:
        return _identity(path)
    except OSError as error:
        detail = f"cannot be read ({error.strerror}); check the path"
        raise MediaError(name, "missing", detail) from error


@contextmanager
def open_media(path: Path, name: str) -> Generator[Any]:
    """Open a file as a PyAV input container.

    Raises:
        MediaError: ``missing``, ``empty``, ``not_media``, ``truncated``, ``out_of_memory``.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(512)
        if not head:
            raise MediaError(name, "empty", "has no bytes; fetch it again")
        # An mp4 with its index in front opens without an error although its end is missing.
        missing = missing_bytes(path)
        if missing:
            detail = f"{missing} of its bytes are missing at the end; fetch it again"
            raise MediaError(name, "truncated", detail)
        if head[:4] == b"OggS" and is_broken_ogg(path):
            raise MediaError(name, "decode", "a page of it is damaged or cut; fetch it again")
    except OSError as error:
        detail = f"cannot be read ({error.strerror}); check the path"
        raise MediaError(name, "missing", detail) from error
    # FFmpeg would also open playlists and addresses. It takes an absolute path for no protocol.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    if head[8:12] == b"WAVE" and is_streamed(path):
        options["ignore_length"] = "1"  # a length of 0 would be taken at its word
    try:
        container = av.open(str(path.absolute()), options=options, metadata_errors="ignore")
    except av.error.MemoryError as error:
        raise MediaError(name, "out_of_memory", "opening it needs too much memory") from error
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(name, *_unopened(head)) from error
    with container:
        yield container


def need_streams(name: str, want: Container[Modality], *, video: bool, audio: bool) -> None:
    """Check that the file has the streams that are wanted.

    Raises:
        MediaError: ``no_video`` or ``no_audio``.
    """
    if ("video" in want or "face" in want) and not video:
        raise MediaError(name, "no_video", "has no video stream; drop video from this row")
    if "audio" in want and not audio:
        raise MediaError(name, "no_audio", "has no audio stream; drop audio from this row")


def need_span(
    name: str, start: float | None, end: float | None, duration: float, max_seconds: float
) -> tuple[float, float]:
    """Check a span and fill in its ends. None means the file's own start or end.

    Returns:
        Start and end in seconds from the file's start.

    Raises:
        MediaError: ``bad_span`` if it is not inside the file, or ``too_long``.
    """
    first = 0.0 if start is None else start
    last = duration if end is None else end
    if not 0 <= first < last or first >= duration or last > duration + _SLACK:
        detail = f"{first:g} s to {last:g} s is not inside the file's {duration:.2f} s"
        raise MediaError(name, "bad_span", f"{detail}; correct start and end")
    last = min(last, duration)
    need_length(name, last - first, max_seconds)
    return first, last


def need_length(name: str, seconds: float, max_seconds: float) -> None:
    """Check a span's length.

    Raises:
        MediaError: ``too_long``.
    """
    if seconds > max_seconds:
        detail = f"{seconds:.0f} s is over max_seconds={max_seconds:g}"
        raise MediaError(name, "too_long", f"{detail}; give start and end, or raise the limit")


def _unopened(head: bytes) -> tuple[str, str]:
    """The error kind and detail for a file that no demuxer accepts, from its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"<")):
        return "not_media", "holds text or HTML, as a failed download does; fetch it again"
    if head[4:8] in BOXES or head[:4] in (b"RIFF", b"\x1aE\xdf\xa3"):
        return "truncated", "begins like a media file, but its index is missing; fetch it again"
    return "not_media", "is in no media format that mmemo reads; convert it to mp4"
