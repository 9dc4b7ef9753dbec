"""Probe a media file: its streams, its duration, whether it is whole, and whether a row fits it.

Containers are opened with PyAV and a list of allowed formats. Playlists and other formats that make
the demuxer open further files or addresses are not on it.
"""

from __future__ import annotations

import functools
import logging
import struct
import time
from collections.abc import Container, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import av.stream
import numpy as np
from numpy.typing import NDArray

from mmemo.content import sha256
from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.containers import BOXES, is_streamed, missing_bytes
from mmemo.media.display import Display, display_of, pixel_aspect

av.logging.set_level(av.logging.PANIC)  # damage is reported as MediaError, not on the terminal
logging.getLogger("libav").setLevel(logging.CRITICAL)

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,ogg,wav,w64,mp3,aac,flac,aiff,"
    "caf,au,amr,rm,mxf,nut"
)
# Formats whose header declares the duration, so that a shorter file must be damaged. Others have it
# guessed from the bit rate or the last time stamps, and AVI counts the gap before a segment.
_DECLARES = frozenset({"mov", "matroska", "flv", "asf", "wav", "w64", "aiff", "caf", "au"})
# Formats that declare the exact length of each stream, without the padding of its last packet.
_EXACT = frozenset({"mov", "wav", "w64", "aiff", "caf", "au", "flac", "ogg"})
# Formats that mark the padding of the last packet instead (by a Xing header).
_PADS = frozenset({"mp3"})
_LOOK = 4  # frames that are decoded to see whether they are interlaced
_FIELD_ORDERS = {1: "progressive", 2: "tt", 3: "bb", 4: "tb", 5: "bt"}
_RACY_NS = 2_000_000_000  # a file may change again within one tick of the clock, unnoticed

CULPRITS: Mapping[str, frozenset[Modality]] = {
    "no_audio": frozenset({"audio"}),
    "no_video": frozenset({"video", "face"}),
    "no_frames": frozenset({"video", "face"}),
}
"""Error kind -> the streams that it concerns; the clip's other streams may be good."""
_PADDED = 2  # packets that may be padding at the end of a stream
_MAX_PADDING = 0.5  # seconds of it at most
_LEAD = 0.5  # seconds that a picture must be held to count as the lead of a segment
_SLACK = 0.25  # seconds that a row's end may exceed the file's, for rounding


@dataclass(frozen=True, slots=True)
class VideoStream:
    """One video stream, as stored and as displayed.

    ``width``, ``height``: pixels as stored. ``display_width``, ``display_height``: pixels of a
    decoded frame, after :mod:`mmemo.media.display`. ``sample_aspect``: width of a stored pixel
    divided by its height. ``rotation``: degrees clockwise by which the stored frame is turned for
    display, after ``mirrored`` has swapped its left and right. ``interlaced``: its frames consist
    of two fields, which decoding merges by deinterlacing; ``field_order`` is FFmpeg's name.
    ``start``: seconds from the file's start. ``seconds``: length on screen.
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


@dataclass(frozen=True, slots=True)
class AudioStream:
    """``sample_rate`` in Hz. ``start``: seconds from the file's start. ``seconds``: length."""

    sample_rate: int
    channels: int
    codec: str
    start: float = 0.0
    seconds: float = 0.0


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
    are shown before it (open groups of pictures). ``counted``: the packets' own time stamps do not
    say in which order the frames are shown, so the n-th frame out of the decoder is at ``pts[n]``.
    """

    pts: NDArray[np.int64]
    keys: NDArray[np.int64]
    seeks: NDArray[np.int64]
    start: float
    end: float
    open: bool = False
    counted: bool = False


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


def probe(path: Path, name: str | None = None) -> MediaInfo:
    """Read the streams, the duration and the digest of one file, visiting every packet.

    Args:
        path: the file.
        name: name of the file in errors; the path by default.

    Raises:
        MediaError: ``missing``, ``empty``, ``not_media``, ``truncated``, ``decode``,
            ``no_frames`` (every stream is empty) or ``changed`` (while it was read).
    """
    name = name or str(path)
    with steady(path, name) as digest, open_media(path, name) as container:
        scan = scan_packets(container, name)
        picture = sound = None
        video, audio = video_stream(container), audio_stream(container)
        if video is not None and scan.video is not None:
            picture = _describe(container, video, scan.video)
        if audio is not None and scan.audio is not None:
            context, track = audio.codec_context, scan.audio
            length = track.end - track.start
            sound = AudioStream(
                context.sample_rate, context.channels, context.name, track.start, length
            )
        return MediaInfo(digest, int(container.size), scan.duration, picture, sound)


def _describe(container: Any, stream: Any, track: Track) -> VideoStream:
    context = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    count, length = len(track.pts), track.end - track.start
    aspect = pixel_aspect(stream)
    display, interlaced = Display(aspect), False
    for frame in _first_frames(container, stream, track):
        display = display_of(frame, aspect)
        interlaced = interlaced or frame.interlaced_frame
    wide, high = display.size(context.width, context.height)
    return VideoStream(
        width=context.width,
        height=context.height,
        fps=float(rate) if rate else count / max(length, 1e-9),
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
    )


def _first_frames(container: Any, stream: Any, track: Track) -> list[Any]:
    """A few decoded frames; fewer where they are damaged, which is for decoding to report."""
    frames: list[Any] = []
    try:
        container.seek(int(track.seeks[0]), stream=stream)
        for frame in container.decode(stream):
            frames.append(frame)
            if len(frames) == _LOOK:
                break
    except av.FFmpegError:
        pass
    return frames


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
        missing = missing_bytes(path)
        if missing:
            detail = f"{missing} of its bytes are missing at the end; fetch it again"
            raise MediaError(name, "truncated", detail)
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


def video_stream(container: Any) -> Any | None:
    """The first video stream that is not a cover picture, or None."""
    picture = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & picture), None)


def audio_stream(container: Any) -> Any | None:
    """The first audio stream, or None."""
    return next(iter(container.streams.audio), None)


def need_streams(name: str, want: Container[Modality], *, video: bool, audio: bool) -> None:
    """Check that the file has the streams that are wanted.

    Raises:
        MediaError: ``no_video`` or ``no_audio``.
    """
    if ("video" in want or "face" in want) and not video:
        raise MediaError(name, "no_video", "has no video stream; drop video from this row")
    if "audio" in want and not audio:
        raise MediaError(name, "no_audio", "has no audio stream; drop audio from this row")


def least_seconds(container: Any) -> float:
    """Seconds that a file lasts at least by its header; 0 where the header only guesses."""
    formats = set(container.format.name.split(","))
    if not _DECLARES & formats or is_streamed(Path(container.name)):
        return 0.0
    # Where the duration is in truth the time of the end, the clock's start is no part of it.
    return ((container.duration or 0) - max(0, container.start_time or 0)) / av.time_base


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


def scan_packets(container: Any, name: str) -> Scan:
    """Visit every packet without decoding it.

    Raises:
        MediaError: ``truncated`` if the file holds less than its header declares, ``decode`` if
            packets cannot be read, ``no_frames`` if there are none.
    """
    rows: dict[int, list[_Packet]] = {}
    bases: dict[int, float] = {}  # damage may make streams appear on the way
    formats = set(container.format.name.split(","))
    pads = bool(_PADS & formats)
    open_end = is_streamed(Path(container.name))
    # A broadcast recording may start mid-packet, and a stream of samples ends with a short one.
    strict = "mpegts" not in formats and not open_end
    try:
        for packet in container.demux():
            # AVI stores only the order of decoding, from which FFmpeg derives odd times of display.
            pts = packet.pts if packet.pts is not None and "avi" not in formats else packet.dts
            # demux() ends with empty packets.
            if pts is None or not packet.size:
                continue
            bases.setdefault(packet.stream_index, float(packet.time_base))
            if packet.is_corrupt and strict:
                raise MediaError(name, "truncated", "a packet is cut short; fetch the file again")
            row = _Packet(
                pts,
                pts + (packet.duration or 0) - (_padding(packet) if pads else 0),
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
    declares = bool(_DECLARES & formats) and not open_end
    tracks: list[Track | None] = []
    for stream in (video_stream(container), audio_stream(container)):
        packets = rows.get(stream.index) if stream is not None else None
        tracks.append(_track(stream, packets, origin, name, formats, declares) if packets else None)
    video, audio = tracks
    if video is not None and "avi" in formats:
        video = _without_lead(video, audio, float(video_stream(container).time_base))
    ends = [track.end for track in (video, audio) if track is not None]
    if not ends or max(ends) <= 0:
        raise MediaError(name, "no_frames", "it has neither picture nor sound; fetch it again")
    if declares:
        # The header's duration is that of the longest stream, which need not be one that is read.
        last = max(max(row.end for row in rows[index]) * base for index, base in bases.items())
        _compare(name, last, origin, (container.duration or 0) / av.time_base)
    return Scan(video, audio, origin, max(ends))


def _padding(packet: Any) -> int:
    """Samples at the packet's end that are not played, in units of its time base."""
    stream = packet.stream
    if stream.type != "audio" or not packet.has_sidedata("skip_samples"):
        return 0
    # Samples to skip at the start, and to discard at the end (AV_PKT_DATA_SKIP_SAMPLES).
    _, discard = struct.unpack_from("<II", bytes(packet.get_sidedata("skip_samples")))
    samples = min(discard / stream.codec_context.sample_rate, _MAX_PADDING)
    return min(round(samples / packet.time_base), packet.duration or 0)


def _track(
    stream: Any,
    packets: list[_Packet],
    origin: float,
    name: str,
    formats: set[str],
    declares: bool,
) -> Track | None:
    base = float(stream.time_base)
    shown = [row for row in packets if row.is_shown]
    pts = np.unique(np.array([row.pts for row in shown], dtype=np.int64))
    # Without any key packet, decoding can only begin at the first one.
    entries = [row for row in packets if row.is_key] or packets[:1]
    keys, order = np.unique(
        np.array([row.pts for row in entries], dtype=np.int64), return_index=True
    )
    seeks = np.array([row.dts for row in entries], dtype=np.int64)[order]
    if not len(pts):
        return None
    start = float(pts[0]) * base - origin
    last = max(row.end for row in shown)
    end = last * base - origin
    if stream.duration:
        declared = ((stream.start_time or 0) + stream.duration) * base - origin
        if declares and "mov" in formats:
            _compare(name, end + origin, origin, declared + origin)
        # The last packets of a codec with fixed packets are padded; the header knows the length.
        # One that differs by more is a guess, made before the whole file was read.
        pad = _PADDED * max(row.end - row.pts for row in shown[-2:]) * base
        if formats & _EXACT and end - pad <= declared:
            end = min(end, declared)
    if stream.type == "video" and last <= pts[-1]:
        # Containers without packet durations: the last frame is shown as long as the others.
        end += 1 / float(stream.average_rate or 25)
    end = max(start, end)
    return Track(
        pts, keys, seeks, start, end, _has_open_groups(packets), _is_counted(stream, shown)
    )


def _is_counted(stream: Any, shown: list[_Packet]) -> bool:
    """Whether frames are reordered for display although their time stamps are in file order."""
    if stream.type != "video" or not stream.codec_context.has_b_frames:
        return False
    stamps = [row.pts for row in shown]
    return len(stamps) > 2 and all(one < two for one, two in pairwise(stamps))


def _without_lead(video: Track, audio: Track | None, base: float) -> Track:
    """An AVI's pictures without the wait that a segmenter leaves behind the first one.

    A segment of an AVI begins with one frame and then as many empty ones as stood before it in the
    whole. Where the sound lasts as long, the picture is really held.
    """
    gap = int(video.pts[1] - video.pts[0]) - 1 if len(video.pts) > 1 else 0
    lead = gap * base
    if lead < _LEAD or (audio is not None and audio.end > video.end - lead / 2):
        return video
    pts = video.pts.copy()
    pts[1:] -= gap
    return replace(video, pts=pts, end=video.end - lead, counted=True)


def _has_open_groups(packets: list[_Packet]) -> bool:
    key: int | None = None
    for packet in packets:
        if packet.is_key:
            key = packet.pts
        elif key is not None and packet.pts < key:
            return True
    return False


def _compare(name: str, last: float, origin: float, declared: float) -> None:
    """Compare the end of the last packet, on the file's own clock, with what the header declares.

    Some writers declare the length and some the time of the end (Matroska), which differ if the
    clock starts elsewhere than at 0. A file that reaches either is whole.
    """
    there = max(last, last - origin)
    if there < declared - max(0.25, 0.02 * declared):
        detail = f"its header declares {declared:.1f} s and {there:.1f} s are there"
        raise MediaError(name, "truncated", f"{detail}; fetch it again")


def _unopened(head: bytes) -> tuple[str, str]:
    """The error kind and detail for a file that no demuxer accepts, from its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"<")):
        return "not_media", "holds text or HTML, as a failed download does; fetch it again"
    if head[4:8] in BOXES or head[:4] in (b"RIFF", b"\x1aE\xdf\xa3"):
        return "truncated", "begins like a media file, but its index is missing; fetch it again"
    return "not_media", "is in no media format that mmemo reads; convert it to mp4"


def reason(error: Exception) -> str:
    """FFmpeg's text of an error, without file names and numbers."""
    if isinstance(error, IndexError):  # PyAV finds no place for a packet of a new stream
        return "a stream begins midway"
    return str(getattr(error, "strerror", None) or error)
