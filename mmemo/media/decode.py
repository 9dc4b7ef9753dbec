"""Decode one span of one file into arrays. F frames, H x W pixels, S audio samples.

Both video backends are given the presentation times of the frames to take, so that they return the
same arrays for a good file. :func:`decode` uses PyAV. decord is faster and hangs on some files, so
:func:`decode_guarded`, which tries it first, must run in a process that can be killed
(:mod:`mmemo.media.decode_pool`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from mmemo.errors import MediaError
from mmemo.media.audio import read_waveform
from mmemo.media.clip import DecodedClip, DecodeJob, FaceTrack
from mmemo.media.config import SamplingConfig, TrackChoice
from mmemo.media.display import Display, deinterlace, display_of, pixel_aspect
from mmemo.media.edits import edit_frames, edit_sound
from mmemo.media.probe import need_length, need_span, need_streams, open_media, steady
from mmemo.media.scan import Scan, Track, least_seconds, reason, scan_packets
from mmemo.media.tracks import audio_stream, need_tracks, video_stream

Frame = NDArray[np.uint8]
T = TypeVar("T")
INDEXED = frozenset({"mov", "matroska"})
"""Containers with an index of their packets, in which decord seeks correctly."""
_ROUNDED = 0.1  # seconds by which the lengths of streams differ that belong together
_SETTLE = 0.5  # seconds to decode first in a program stream, where a seek ends mid-packet
_LATE = 0.25  # share of a span for which a picture may be held before it begins
_BATCH = 16  # frames per decord call
_PICTURES = frozenset({"video", "face"})
_Key = tuple[str, TrackChoice, TrackChoice]  # digest, and the tracks that are asked for
_scans: deque[tuple[_Key, Scan]] = deque(maxlen=8)  # of the last files


def decode(job: DecodeJob) -> DecodedClip:
    """Decode ``job`` in this process, with PyAV unless the limits name decord.

    The result's ``duration`` is that of the whole file. ``frames`` are None when only the face is
    wanted. Faces are cropped before ``max_side`` scales the frames down.

    Raises:
        MediaError: the clip cannot be used; ``kind`` says why.
    """
    return _decode(job, use_decord=job.limits.backend == "decord")


def decode_guarded(job: DecodeJob) -> DecodedClip:
    """Like :func:`decode`, but tries decord first when the backend is ``auto``."""
    return _decode(job, use_decord=job.limits.backend != "pyav")


def _decode(job: DecodeJob, *, use_decord: bool) -> DecodedClip:
    with steady(job.path, job.name) as digest:
        try:
            clip, scan = _read_clip(job, digest, use_decord)
        except (MemoryError, av.error.MemoryError) as error:
            detail = "decoding needs more memory than memory_mb allows; raise it or set max_side"
            raise MediaError(job.name, "out_of_memory", detail) from error
        except av.FFmpegError as error:
            raise MediaError(job.name, "decode", f"cannot be decoded ({reason(error)})") from error
    key = _key(digest, job.sampling)
    if key not in [known for known, _ in list(_scans)]:  # the scan is this file's
        _scans.append((key, scan))
    return clip


def _read_clip(job: DecodeJob, digest: str, use_decord: bool) -> tuple[DecodedClip, Scan]:
    frames = times = faces = waveform = None
    notes: tuple[str, ...] = ()
    with open_media(job.path, job.name) as container:
        _check_header(container, job)
        scan = _scan(container, job.name, digest, job.sampling)
        most = job.limits.max_seconds
        start, end = need_span(job.name, job.start, job.end, scan.duration, most)
        if job.want & _PICTURES:
            frames, times, faces = _pictures(container, scan, start, end, job, use_decord)
        if "audio" in job.want:
            stream = audio_stream(container, job.sampling.audio_track)
            rate = job.sampling.sample_rate
            waveform, notes = read_waveform(container, stream, scan, start, end, rate, job.name)
            if job.limits.edit is not None:
                waveform = edit_sound(waveform, rate, job.limits.edit, digest, job.name)
    clip = DecodedClip(
        name=job.name,
        digest=digest,
        duration=scan.duration,
        frames=frames,
        times=times,
        waveform=waveform,
        sample_rate=job.sampling.sample_rate,
        faces=faces,
        notes=notes,
    )
    return clip, scan


def _key(digest: str, sampling: SamplingConfig) -> _Key:
    return digest, sampling.video_track, sampling.audio_track


def _scan(container: Any, name: str, digest: str, sampling: SamplingConfig) -> Scan:
    """The packets of the file, cached for the last few files because a file may have many spans.

    Only containers with an index are cached: PyAV finds the streams of others by reading them."""
    if INDEXED & set(container.format.name.split(",")):
        for known, scan in list(_scans):
            if known == _key(digest, sampling):
                return scan
    return scan_packets(container, name, sampling)


def _check_header(container: Any, job: DecodeJob) -> None:
    """Refuse what the header alone shows to be unusable, before the whole file is read."""
    need_tracks(container, job.name, job.want, job.sampling)
    video, audio = video_stream(container) is not None, audio_stream(container) is not None
    need_streams(job.name, job.want, video=video, audio=audio)
    if job.end is None:
        seconds = least_seconds(container) - (job.start or 0.0)
        need_length(job.name, seconds, job.limits.max_seconds)


def _pictures(
    container: Any, scan: Scan, start: float, end: float, job: DecodeJob, use_decord: bool
) -> tuple[NDArray[np.uint8] | None, NDArray[np.float64], FaceTrack | None]:
    """Frames (F, H, W, 3) unless only faces are wanted, their times (F,), and the faces."""
    track, sampling = scan.video, job.sampling
    stream = video_stream(container, sampling.video_track)
    if stream is None or track is None or track.end <= start or track.start >= end:
        raise MediaError(job.name, "no_frames", f"shows nothing between {start:g} s and {end:g} s")
    base = float(stream.time_base)
    start, end = picture_span(track, start, end)
    picked, times = place_frames(track, base, scan.origin, start, end, sampling.frames)
    # A short clip takes a frame several times, which is decoded only once.
    places, order = np.unique(picked, return_inverse=True)
    face = "face" in job.want
    # The face is cropped at full size, so the frames are shrunk only after that.
    side = None if face else sampling.max_side
    unique = _read(container, stream, track, places, side, job, use_decord)
    frames = np.stack([unique[int(place)] for place in order])
    if job.limits.edit is not None:
        frames = edit_frames(frames, job.limits.edit)
    faces: FaceTrack | None = None
    if face:
        from mmemo.media.face import crop_faces

        faces = crop_faces(frames, times, sampling.face, job.face_boxes)
        if "video" not in job.want:
            return None, times, faces
        frames = np.stack([shrink(frame, sampling.max_side) for frame in frames])
    return frames, times, faces


def _read(
    container: Any,
    stream: Any,
    track: Track,
    places: NDArray[np.intp],
    side: int | None,
    job: DecodeJob,
    use_decord: bool,
) -> list[NDArray[np.uint8]]:
    if use_decord:
        frames = read_decord(container, stream, track, places, job.name, side)
        if frames is not None:
            return frames
        if job.limits.backend == "decord":
            detail = "decord does not find the frames that the file lists; use backend auto"
            raise MediaError(job.name, "decode", detail)
    return read_pyav(container, stream, track, places, job.name, side)


def picture_span(track: Track, start: float, end: float) -> tuple[float, float]:
    """The part of [start, end] over which frames are taken: the picture's own time.

    A picture that begins a little late is held at its first frame until then, which keeps frames
    and sound at equal shares of the span. One that begins later than that counts from its start.
    """
    # The last packet of sound is padded, which is no reason to sample at other times.
    if end > track.end + _ROUNDED:
        end = track.end
    late = track.start - start
    return (track.start if late > _LATE * (end - start) else start), end


def place_frames(
    track: Track, time_base: float, origin: float, start: float, end: float, count: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Find the frames on screen at the centres of ``count`` equal parts of [start, end].

    Returns:
        Indices into ``track.pts``, (F,), and the times at which these frames begin, (F,) seconds
        from the file's start. A short clip repeats frames.
    """
    shown = track.pts * time_base - origin
    centres = start + (np.arange(count) + 0.5) * (end - start) / count
    # The tolerance keeps a frame whose rounded time stamp lies just after its own centre.
    picked = np.clip(np.searchsorted(shown, centres + 1e-6, side="right") - 1, 0, None)
    return picked, shown[picked].astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A decoded PyAV frame without fields, and how to show it."""

    frame: Any
    display: Display
    interlaced: bool

    def rgb(self, side: int | None) -> Frame:
        shown = self.display.orient(self.frame.to_ndarray(format="rgb24", threads=1))
        return shrink(self.display.stretch(shown), side)


class _NoNeighbour(LookupError):
    """The frame before an interlaced one was not decoded."""


def read_pyav(
    container: Any, stream: Any, track: Track, places: NDArray[np.intp], name: str, side: int | None
) -> list[Frame]:
    """Read the frames at ``places``, each (H, W, 3) RGB as displayed.

    Args:
        container, stream, track: an open file, its video stream and the scan of it.
        places: (N,) indices into ``track.pts``, sorted and unique.
        name: name of the file in errors.
        side: longer side to shrink to, in pixels, or None.

    Raises:
        MediaError: ``decode``: a frame that has to be decoded is damaged.
    """
    frames = _attempt(
        lambda seek, margin: [
            picture.rgb(side) for picture in _walk(container, stream, track, places, seek, margin)
        ],
        name,
    )
    # Transport streams may be glued together from different cameras.
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError(name, "decode", "the picture changes its size; encode the file again")
    return frames


def _attempt(read: Callable[[bool, int], T], name: str) -> T:
    """``read(seek, margin)`` from key packets, or from the file's start where that fails.

    Raises:
        MediaError: ``decode``.
    """
    detail, alone = "", False
    for seek, margin in ((True, 0), (True, 1), (False, 1)):
        if margin and seek and not alone:
            continue
        try:
            return read(seek, margin)
        except (av.error.InvalidDataError, LookupError) as error:
            # The error itself is not kept: it holds the frames of the call stack, and they it, so
            # that the pictures that were read would stay in memory.
            detail, alone = reason(error), isinstance(error, _NoNeighbour)
    raise MediaError(name, "decode", f"the video is damaged ({detail})")


def read_decord(
    container: Any, stream: Any, track: Track, places: NDArray[np.intp], name: str, side: int | None
) -> list[Frame] | None:
    """Like :func:`read_pyav`, with decord; None if decord cannot be relied on for this file.

    decord conceals damage, so PyAV decodes the same frames first. On some files decord silently
    returns other frames than those requested: with open groups of pictures it counts from the wrong
    one, and without an index (MPEG-TS) it repeats frames. It knows neither fields nor mirrors.
    Such files are not given to it, and its last frame must equal PyAV's. decord may hang or crash:
    call this in a process that can be killed.

    Raises:
        MediaError: ``decode``, as in :func:`read_pyav`.
    """
    if track.open or track.counted or not INDEXED & set(container.format.name.split(",")):
        return None
    if len(container.streams.video) > 1:  # it chooses among several by a rule of its own
        return None

    def check(seek: bool, margin: int) -> tuple[_Picture, bool]:
        last, plain = None, True
        for last in _walk(container, stream, track, places, seek, margin):
            plain = plain and not last.interlaced and not last.display.mirrored
        assert last is not None
        return last, plain

    # Only the last frame is kept, and converted to RGB.
    picture, plain = _attempt(check, name)
    if not plain:
        return None
    try:
        import decord
    except ImportError:  # not built for this platform
        return None
    decord.logging.set_level(decord.logging.QUIET)
    # Frame 0 is asked for too, because decord's clock may start elsewhere than the file's.
    asked = [0, *(int(place) for place in places)]
    frames: list[Frame] = []
    try:
        reader = decord.VideoReader(str(container.name), num_threads=1)
        # decord takes frames by index, which needs a list of frames as long as the scan's.
        if len(reader) != len(track.pts):
            return None
        stamps = np.asarray(reader.get_frame_timestamp(asked))[:, 0]
        expected = (track.pts[asked] - track.pts[0]) * float(stream.time_base)
        if np.abs(stamps - stamps[0] - expected).max() > 2e-3:
            return None
        for at in range(1, len(asked), _BATCH):
            batch = reader.get_batch(asked[at : at + _BATCH]).asnumpy()
            frames += [shrink(picture.display.stretch(frame), side) for frame in batch]
    except (decord.DECORDError, RuntimeError):
        return None
    return frames if np.array_equal(frames[-1], picture.rgb(side)) else None


def shrink(frame: Frame, side: int | None) -> Frame:
    """Scale (H, W, 3) down so that its longer side has ``side`` pixels; never up."""
    height, width = frame.shape[:2]
    if side is None or max(height, width) <= side:
        return frame
    import cv2

    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _walk(
    container: Any, stream: Any, track: Track, places: NDArray[np.intp], seek: bool, margin: int
) -> Iterator[_Picture]:
    """Yield the wanted frames in order, deinterlaced.

    Decoding begins at the key packet before each wanted frame, or before the ``margin``-th frame
    before it; without ``seek``, at the file's first.

    Raises:
        LookupError: a frame is corrupt, or is listed but not decoded.
        _NoNeighbour: an interlaced frame's neighbour comes before the key packet.
    """
    if not stream.codec_context.is_open:
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_count = 1
    aspect = pixel_aspect(stream)
    marks = track.marks
    first = marks[np.clip(places - margin, 0, None)]
    if "mpeg" in container.format.name.split(","):
        # The first frame behind such a seek may bear the time stamp of a later one.
        first = first - round(_SETTLE / float(stream.time_base))
    entry = np.clip(np.searchsorted(track.keys, first, "right") - 1, 0, None)
    if not seek or track.counted:
        entry = np.zeros_like(entry)
    # One seek per key packet skips the groups without a wanted frame and decodes none twice.
    for at in np.unique(entry):
        chosen = places[entry == at]
        left = {int(mark) for mark in (chosen if track.counted else marks[chosen])}
        container.seek(int(track.seeks[at]), stream=stream)
        before: Any = None
        waiting: tuple[Any, Any] | None = None  # an interlaced frame that needs the next one
        for number, frame in enumerate(container.decode(stream)):
            if waiting is not None:
                yield _whole(*waiting, frame, aspect)
                waiting = None
            mark = number if track.counted else frame.pts
            if before is not None and before.interlaced_frame and not track.counted:
                # Some packets hold one field each; the decoder gives both the first one's time.
                for late in sorted(other for other in left if before.pts < other < mark):
                    left.remove(late)
                    yield _whole(None, before, frame, aspect)
            if mark in left:
                if frame.is_corrupt:
                    raise LookupError(f"the frame at {frame.time:.2f} s is marked as corrupt")
                left.remove(mark)
                if not frame.interlaced_frame:
                    yield _Picture(frame, display_of(frame, aspect), False)
                elif before is None and not margin and frame.pts != marks[0]:
                    raise _NoNeighbour
                else:
                    waiting = (before, frame)
            if not left and waiting is None:
                break
            before = frame
        if waiting is not None:
            yield _whole(*waiting, None, aspect)
        if left:
            time = (marks[min(left)] if track.counted else min(left)) * float(stream.time_base)
            raise LookupError(f"the frame at {time:.2f} s is listed but does not come")


def _whole(before: Any, frame: Any, after: Any, aspect: float) -> _Picture:
    return _Picture(deinterlace(before, frame, after), display_of(frame, aspect), True)
