"""Read every packet of a file: when its pictures and sound begin and end, and whether it is whole.

Packets decide. What a header says about lengths only refuses files, and only where a finished
writer declared it; it cuts no more than the padding of the last packets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from mmemo.data.sample import MODALITIES
from mmemo.errors import MediaError
from mmemo.media.config import SamplingConfig
from mmemo.media.containers import is_streamed
from mmemo.media.tracks import audio_stream, need_tracks, video_stream

# Formats whose header declares the duration, so that a shorter file must be damaged. Others have it
# guessed from the bit rate or the last time stamps, and AVI counts the gap before a segment.
_DECLARES = frozenset({"mov", "matroska", "flv", "asf", "wav", "w64", "aiff", "caf", "au", "flac"})
# Formats that declare the exact length of each stream, without the padding of its last packet.
_EXACT = frozenset({"mov", "wav", "w64", "aiff", "caf", "au", "flac", "ogg"})
# Formats that mark the padding of the last packet instead (by a Xing header).
_PADS = frozenset({"mp3"})
_PADDED = 2  # packets that may be padding at the end of a stream
_MAX_PADDING = 0.5  # seconds of it at most
_REORDERS = frozenset({"h264", "hevc"})  # codecs that say so only where they do it
_DELAY = 3  # frames by which an encoder is late
_BROADCAST = frozenset({"mpegts", "mpeg"})
_BACK, _AHEAD = 0.5, 10.0  # seconds by which a clock leaps that is another one
_PROGRESSIVE = 1  # FFmpeg's AVFieldOrder; 0 is unknown
_LEAD = 0.5  # seconds that a picture must be held to count as the lead of a segment


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
    stamps: NDArray[np.int64] | None = None

    @property
    def marks(self) -> NDArray[np.int64]:
        """(N,) time stamps as stored, which decoded frames carry."""
        return self.pts if self.stamps is None else self.stamps


class _Packet(NamedTuple):
    """Times are in the stream's time base."""

    pts: int
    end: int
    dts: int
    is_key: bool
    is_shown: bool
    is_timed: bool  # decoded frames carry this pts

    def on_decoding_clock(self, delay: int) -> _Packet:
        """Shown ``delay`` after it is decoded."""
        shown = self.dts + delay
        return self._replace(pts=shown, end=shown + self.end - self.pts)


@dataclass(frozen=True, slots=True)
class Scan:
    """A file whose every packet has been read. ``origin``: the file's start on its own clock, s."""

    video: Track | None
    audio: Track | None
    origin: float
    duration: float


DEFAULT_SAMPLING = SamplingConfig()


def scan_packets(container: Any, name: str, sampling: SamplingConfig = DEFAULT_SAMPLING) -> Scan:
    """Visit every packet without decoding it. ``sampling`` says which tracks are read.

    Raises:
        MediaError: ``truncated`` if the file holds less than its header declares, ``decode`` if
            packets cannot be read, ``no_frames`` if there are none.
    """
    formats = set(container.format.name.split(","))
    open_end = is_streamed(Path(container.name))
    rows, bases = _packets(container, name, formats, open_end)
    if not rows:
        raise MediaError(name, "no_frames", "its streams are empty; fetch it again")
    origin = (container.start_time or 0) / av.time_base
    declares = bool(_DECLARES & formats) and not open_end
    tracks: list[Track | None] = []
    picture = video_stream(container, sampling.video_track)
    chosen = (picture, audio_stream(container, sampling.audio_track))
    read = [(rows[s.index], bases[s.index]) for s in chosen if s is not None and s.index in rows]
    _need_one_clock(read, name, bool(_BROADCAST & formats))
    for stream in chosen:
        packets = rows.get(stream.index) if stream is not None else None
        tracks.append(_track(stream, packets, origin, name, formats, declares) if packets else None)
    video, audio = tracks
    if picture is not None and video is not None and "avi" in formats:
        video = _without_lead(video, audio, float(picture.time_base))
    ends = [track.end for track in (video, audio) if track is not None]
    if not ends or max(ends) <= 0:
        need_tracks(container, name, MODALITIES, sampling)
        raise MediaError(name, "no_frames", "it has neither picture nor sound; fetch it again")
    if declares:
        # The header's duration is that of the longest stream, which need not be one that is read.
        last = max(max(row.end for row in rows[index]) * base for index, base in bases.items())
        _compare(name, last, origin, (container.duration or 0) / av.time_base)
    return Scan(video, audio, origin, max(ends))


def _packets(
    container: Any, name: str, formats: set[str], open_end: bool
) -> tuple[dict[int, list[_Packet]], dict[int, float]]:
    """The packets of each stream in the file's order, and the streams' time bases in seconds."""
    rows: dict[int, list[_Packet]] = {}
    bases: dict[int, float] = {}  # damage may make streams appear on the way
    pads = bool(_PADS & formats)
    # A broadcast recording may start mid-packet, and a stream of samples ends with a short one.
    strict = "mpegts" not in formats and not open_end
    try:
        for packet in container.demux():
            # AVI stores only the order of decoding, from which FFmpeg derives odd times of display.
            pts = packet.pts if packet.pts is not None and "avi" not in formats else packet.dts
            if pts is None and packet.size:
                pts = _continued(packet, rows.get(packet.stream_index))
            # demux() ends with empty packets.
            if pts is None or not packet.size:
                continue
            if packet.stream_index not in bases:
                bases[packet.stream_index] = float(packet.time_base)
            if packet.is_corrupt and strict:
                raise MediaError(name, "truncated", "a packet is cut short; fetch the file again")
            row = _Packet(
                pts,
                pts + (packet.duration or 0) - (_padding(packet) if pads else 0),
                pts if packet.dts is None else packet.dts,
                packet.is_keyframe,
                not packet.is_discard,
                pts == packet.pts,
            )
            rows.setdefault(packet.stream_index, []).append(row)
    except (av.FFmpegError, IndexError) as error:
        raise MediaError(name, "decode", f"packets cannot be read ({reason(error)})") from error
    return rows, bases


def _need_one_clock(tracks: list[tuple[list[_Packet], float]], name: str, broadcast: bool) -> None:
    """Refuse files that were glued together and whose clocks do not continue.

    Args:
        tracks: the packets of each track in the file's order, with its time base.
        broadcast: the format has no other sign of it than a leap ahead, which the ffmpeg program
            takes out as well.
    """
    leaps: list[float] = []
    for packets, base in tracks:
        pts = np.array([row.pts for row in packets], dtype=np.int64)
        # All that comes before a key packet in the file is shown before it.
        keys = np.array([row.is_key for row in packets])[1:]
        back = (np.maximum.accumulate(pts)[:-1] - pts[1:])[keys] * base
        if back.max(initial=0.0) > _BACK:
            at = float(pts[1:][keys][back.argmax()]) * base
            raise _glued(name, f"starts again at {at:.1f} s, {back.max():.1f} s back")
        leaps.append(float(np.diff(pts).max(initial=0)) * base)
    if broadcast and leaps and min(leaps) > _AHEAD:
        raise _glued(name, f"leaps ahead by {min(leaps):.1f} s")


def _glued(name: str, detail: str) -> MediaError:
    remedy = "as in files that were glued together; encode the file again, or use its parts"
    return MediaError(name, "decode", f"its clock {detail}, {remedy}")


def _continued(packet: Any, before: list[_Packet] | None) -> int | None:
    """The decoding time of a picture without time stamps, if it follows the one before it.

    In program and transport streams only the first of the frames in one PES packet has any. The
    second field of an interlaced frame has none either, and is no picture of its own.
    """
    if not before or packet.stream.type != "video" or not packet.duration:
        return None
    whole = int(packet.stream.codec_context.field_order) <= _PROGRESSIVE
    return before[-1].dts + int(packet.duration) if whole else None


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
    if stream.type == "video":
        if not all(row.is_timed for row in packets):
            # One clock for all: times of display and of decoding do not mix.
            first = next((row for row in packets if row.is_key), packets[0])
            packets = [row.on_decoding_clock(first.pts - first.dts) for row in packets]
        packets = _from_key(packets)
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
        begin = stream.start_time or 0
        declared = (begin + stream.duration) * base - origin
        if declares and "mov" in formats:
            # Of fragments that are a part of a longer film, FFmpeg gives the time of the end.
            is_end = 0 < begin < stream.duration
            least = stream.duration * base if is_end else declared + origin
            _compare(name, end + origin, origin, least)
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


def _from_key(packets: list[_Packet]) -> list[_Packet]:
    """Without what the decoder cannot show: packets before the first key packet, and those that
    follow it and are shown before it, as where a recording begins or was cut anywhere."""
    first = next((at for at, row in enumerate(packets) if row.is_key), 0)
    key = packets[first]
    return [row for row in packets[first:] if row.pts >= key.pts] if key.is_key else packets


def _is_counted(stream: Any, shown: list[_Packet]) -> bool:
    """Whether the packets' time stamps are not those of the frames in order of display."""
    if stream.type != "video":
        return False
    if not all(row.is_timed for row in shown):
        return True
    # Frames are reordered for display, but their time stamps are in file order.
    reorders = stream.codec_context.name in _REORDERS and stream.codec_context.has_b_frames
    return reorders and len(shown) > 2 and all(a.pts < b.pts for a, b in pairwise(shown))


def _without_lead(video: Track, audio: Track | None, base: float) -> Track:
    """An AVI's pictures without the wait behind the first one that a muxer leaves there.

    Empty frames fill the encoder's delay, and in a segment of an AVI as many as stood before it in
    the whole. Where they are many and the sound lasts as long, the picture is really held.
    """
    gap = int(video.pts[1] - video.pts[0]) - 1 if len(video.pts) > 1 else 0
    lead = gap * base
    held = audio is not None and audio.end > video.end - lead / 2
    if gap <= 0 or (gap > _DELAY and (lead < _LEAD or held)):
        return video
    pts = video.pts.copy()
    pts[1:] -= gap
    return replace(video, pts=pts, stamps=video.pts, end=video.end - lead)


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
    if there < declared - max(0.25, 0.02 * (declared - origin)):
        detail = f"its header declares {declared:.1f} s and {there:.1f} s are there"
        raise MediaError(name, "truncated", f"{detail}; fetch it again")


def least_seconds(container: Any) -> float:
    """Seconds that a file lasts at least by its header; 0 where the header only guesses."""
    formats = set(container.format.name.split(","))
    if not _DECLARES & formats or is_streamed(Path(container.name)):
        return 0.0
    # Where the duration is in truth the time of the end, the clock's start is no part of it.
    return ((container.duration or 0) - max(0, container.start_time or 0)) / av.time_base


def reason(error: Exception) -> str:
    """FFmpeg's text of an error, without file names and numbers."""
    if isinstance(error, IndexError):  # PyAV finds no place for a packet of a new stream
        return "a stream begins midway"
    return str(getattr(error, "strerror", None) or error)
