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
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from mmemo.content import sha256
from mmemo.data.sample import MODALITIES, Modality
from mmemo.errors import MediaError
from mmemo.media.config import SamplingConfig
from mmemo.media.tracks import (
    audio_stream,
    audio_tracks,
    describe,
    need_tracks,
    video_stream,
    video_tracks,
)

av.logging.set_level(av.logging.PANIC)  # damage is reported as MediaError, not on the terminal
logging.getLogger("libav").setLevel(logging.CRITICAL)

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,ogg,wav,w64,mp3,aac,flac,aiff,"
    "caf,au,amr,rm,mxf,nut"
)
# Formats whose header declares the duration, so that a shorter file must be damaged.
_DECLARES = frozenset({"mov", "matroska", "avi", "flv", "asf", "wav", "w64", "aiff", "caf", "au"})
_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx"}
)
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


@dataclass(frozen=True, slots=True)
class Track:
    """The packets of one stream, in order of presentation. N shown packets, K key packets.

    ``pts``: (N,) int64 in units of the stream's time base. ``keys``: (K,) int64, same unit; key
    packets that an edit list hides are among them, as decoding may have to begin there.
    ``seeks``: (K,) int64, their decoding times, which is what demuxers seek by. ``start``,
    ``end``: seconds from the file's start. ``open``: frames that follow a key packet in the file
    are shown before it (open groups of pictures).
    """

    pts: NDArray[np.int64]
    keys: NDArray[np.int64]
    seeks: NDArray[np.int64]
    start: float
    end: float
    open: bool = False


class _Packet(NamedTuple):
    """Times are in the stream's time base."""

    pts: int
    end: int
    dts: int
    is_key: bool
    is_shown: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """A file whose every packet has been read. ``origin``: the file's start on its own clock, s."""

    video: Track | None
    audio: Track | None
    origin: float
    duration: float


DEFAULT_SAMPLING = SamplingConfig()


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
        video = video_stream(container, sampling.video_track)
        audio = audio_stream(container, sampling.audio_track)
        picture = sound = None
        if video is not None and scan.video is not None:
            context = video.codec_context
            rate = video.average_rate or video.guessed_rate
            count = len(scan.video.pts)
            span = scan.video.end - scan.video.start
            fps = float(rate) if rate else count / max(span, 1e-9)
            tracks = _describe(video_tracks(container))
            picture = VideoStream(
                context.width,
                context.height,
                fps,
                count,
                context.name,
                start=scan.video.start,
                seconds=scan.video.end - scan.video.start,
                tracks=tracks,
            )
        if audio is not None and scan.audio is not None:
            context = audio.codec_context
            sound = AudioStream(
                context.sample_rate,
                context.channels,
                context.name,
                start=scan.audio.start,
                seconds=scan.audio.end - scan.audio.start,
                tracks=_describe(audio_tracks(container)),
            )
        return MediaInfo(digest, int(container.size), scan.duration, picture, sound)


def _describe(streams: list[Any]) -> tuple[str, ...]:
    return tuple(describe(stream, number) for number, stream in enumerate(streams))


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
        raise failure


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
        _check_boxes(path, name)
    except OSError as error:
        detail = f"cannot be read ({error.strerror}); check the path"
        raise MediaError(name, "missing", detail) from error
    # FFmpeg would also open playlists and addresses. It takes an absolute path for no protocol.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
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


def scan_packets(container: Any, name: str, sampling: SamplingConfig = DEFAULT_SAMPLING) -> Scan:
    """Visit every packet without decoding it. ``sampling`` says which tracks are read.

    Raises:
        MediaError: ``truncated`` if the file holds less than its header declares, ``decode`` if
            packets cannot be read, ``no_frames`` if there are none.
    """
    rows: dict[int, list[_Packet]] = {}
    bases: dict[int, float] = {}  # damage may make streams appear on the way
    strict = "mpegts" not in container.format.name  # a broadcast recording may start mid-packet
    try:
        for packet in container.demux():
            # Some containers, such as AVI, store only decoding times. demux() ends with
            # empty packets.
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None or not packet.size:
                continue
            bases.setdefault(packet.stream_index, float(packet.time_base))
            if packet.is_corrupt and strict:
                raise MediaError(name, "truncated", "a packet is cut short; fetch the file again")
            row = _Packet(
                pts,
                pts + (packet.duration or 0),
                pts if packet.dts is None else packet.dts,
                packet.is_keyframe,
                not packet.is_discard,
            )
            rows.setdefault(packet.stream_index, []).append(row)
    except (av.FFmpegError, IndexError) as error:
        raise MediaError(name, "decode", f"packets cannot be read ({reason(error)})") from error
    if not rows:
        raise MediaError(name, "no_frames", "its streams are empty; fetch it again")
    origin = (container.start_time or 0) / av.time_base
    tracks: list[Track | None] = []
    for stream in (
        video_stream(container, sampling.video_track),
        audio_stream(container, sampling.audio_track),
    ):
        packets = rows.get(stream.index) if stream is not None else None
        tracks.append(_track(stream, packets, origin, container, name) if packets else None)
    video, audio = tracks
    ends = [track.end for track in tracks if track is not None]
    if not ends or max(ends) <= 0:
        need_tracks(container, name, MODALITIES, sampling)
        raise MediaError(name, "no_frames", "it has neither picture nor sound; fetch it again")
    # The header's duration is that of the longest stream, which need not be one that is read.
    last = max(max(row.end for row in rows[index]) * base for index, base in bases.items())
    declared = (container.duration or 0) / av.time_base
    _compare(name, last - origin, declared, container)
    return Scan(video, audio, origin, max(ends))


def _track(
    stream: Any, packets: list[_Packet], origin: float, container: Any, name: str
) -> Track | None:
    base = float(stream.time_base)
    pts = np.unique(np.array([row.pts for row in packets if row.is_shown], dtype=np.int64))
    # Without any key packet, decoding can only begin at the first one.
    entries = [row for row in packets if row.is_key] or packets[:1]
    keys, order = np.unique(
        np.array([row.pts for row in entries], dtype=np.int64), return_index=True
    )
    seeks = np.array([row.dts for row in entries], dtype=np.int64)[order]
    if not len(pts):
        return None
    start = float(pts[0]) * base - origin
    end = max(row.end for row in packets if row.is_shown) * base - origin
    if stream.duration:
        declared = ((stream.start_time or 0) + stream.duration) * base - origin
        _compare(name, end, declared, container)
        # The last packet of a codec with fixed packets is padded; the header knows the length.
        end = min(end, declared)
    if end <= start:  # containers without packet durations
        end = start + 1 / float(stream.average_rate or 25) if stream.type == "video" else start
    return Track(pts, keys, seeks, start, end, _has_open_groups(packets))


def _has_open_groups(packets: list[_Packet]) -> bool:
    key: int | None = None
    for packet in packets:
        if packet.is_key:
            key = packet.pts
        elif key is not None and packet.pts < key:
            return True
    return False


def _compare(name: str, end: float, declared: float, container: Any) -> None:
    if not _DECLARES & set(container.format.name.split(",")):
        return
    if end < declared - max(0.25, 0.02 * declared):
        detail = f"its header declares {declared:.1f} s and {end:.1f} s are there"
        raise MediaError(name, "truncated", f"{detail}; fetch it again")


def _check_boxes(path: Path, name: str) -> None:
    """Walk the top-level boxes of an MP4; a box that runs over the end shows that it was cut."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        at = 0
        while at + 8 <= size:
            handle.seek(at)
            head = handle.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if at == 0 and kind not in _BOXES:
                return  # another container
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            elif length == 0:  # up to the end of the file
                return
            # Shorter than the box's own header: the walk would not advance.
            if length < 8:
                return
            at += length
    if at > size:
        detail = f"{at - size} of its bytes are missing at the end; fetch it again"
        raise MediaError(name, "truncated", detail)


def _unopened(head: bytes) -> tuple[str, str]:
    """The error kind and detail for a file that no demuxer accepts, from its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"<")):
        return "not_media", "holds text or HTML, as a failed download does; fetch it again"
    if head[4:8] in _BOXES or head[:4] in (b"RIFF", b"\x1aE\xdf\xa3"):
        return "truncated", "begins like a media file, but its index is missing; fetch it again"
    return "not_media", "is in no media format that mmemo reads; convert it to mp4"


def reason(error: Exception) -> str:
    """FFmpeg's text of an error, without file names and numbers."""
    if isinstance(error, IndexError):  # PyAV finds no place for a packet of a new stream
        return "a stream begins midway"
    return str(getattr(error, "strerror", None) or error)
