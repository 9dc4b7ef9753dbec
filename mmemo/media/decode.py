"""One span of one file becomes arrays. F frames, H x W pixels, S audio samples.

Both video backends are told which frames to take, by their presentation times, so they return
the same arrays for a good file. :func:`decode` stays with PyAV; decord is known to hang on some
files, so :func:`decode_guarded`, which asks it first, is meant for a process that can be killed.
"""

from __future__ import annotations

from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from mmemo.errors import MediaError
from mmemo.media.clip import DecodedClip, DecodeJob, FaceTrack
from mmemo.media.frames import place_frames, read_decord, read_pyav, shrink
from mmemo.media.probe import (
    Scan,
    Track,
    audio_stream,
    open_media,
    reason,
    scan_packets,
    steady,
    video_stream,
)
from mmemo.media.sound import read_waveform

_SLACK = 0.25  # seconds by which a manifest's end may pass the file's, after rounding
_PICTURES = frozenset({"video", "face"})


def decode(job: DecodeJob) -> DecodedClip:
    """Decode ``job`` in this process, through PyAV unless the limits name decord.

    ``duration`` of the result is the whole file's. ``frames`` are None when only the face is
    wanted; boxes and crops are taken before ``max_side`` scales the frames.

    Raises:
        MediaError: with the kind that says why the clip cannot be used.
    """
    return _decode(job, use_decord=job.limits.backend == "decord")


def decode_guarded(job: DecodeJob) -> DecodedClip:
    """As :func:`decode`, with decord first when the backend is ``auto``."""
    return _decode(job, use_decord=job.limits.backend != "pyav")


def _decode(job: DecodeJob, *, use_decord: bool) -> DecodedClip:
    with steady(job.path, job.name) as digest:
        try:
            return _read_clip(job, digest, use_decord)
        except (MemoryError, av.error.MemoryError) as error:
            detail = "decoding needs more memory than memory_mb allows; raise it or set max_side"
            raise MediaError(job.name, "out_of_memory", detail) from error
        except av.FFmpegError as error:
            raise MediaError(job.name, "decode", f"cannot be decoded ({reason(error)})") from error


def _read_clip(job: DecodeJob, digest: str, use_decord: bool) -> DecodedClip:
    frames = times = faces = waveform = None
    with open_media(job.path, job.name) as container:
        _check_header(container, job)
        scan = scan_packets(container, job.name)
        start, end = _span(job, scan)
        if job.want & _PICTURES:
            frames, times, faces = _pictures(container, scan, start, end, job, use_decord)
        if "audio" in job.want:
            stream, rate = audio_stream(container), job.sampling.sample_rate
            waveform = read_waveform(container, stream, scan, start, end, rate, job.name)
    return DecodedClip(
        name=job.name,
        digest=digest,
        duration=scan.duration,
        frames=frames,
        times=times,
        waveform=waveform,
        sample_rate=job.sampling.sample_rate,
        faces=faces,
    )


def _check_header(container: Any, job: DecodeJob) -> None:
    """What can be refused before the whole file is read."""
    if job.want & _PICTURES and video_stream(container) is None:
        raise MediaError(job.name, "no_video", "has no video stream; drop video from this row")
    if "audio" in job.want and audio_stream(container) is None:
        raise MediaError(job.name, "no_audio", "has no audio stream; drop audio from this row")
    if job.end is None:
        _check_length(job, (container.duration or 0) / av.time_base - (job.start or 0.0))


def _check_length(job: DecodeJob, seconds: float) -> None:
    if seconds > job.limits.max_seconds:
        detail = f"{seconds:.0f} s is over max_seconds={job.limits.max_seconds:g}"
        raise MediaError(job.name, "too_long", f"{detail}; give start and end, or raise the limit")


def _span(job: DecodeJob, scan: Scan) -> tuple[float, float]:
    """Start and end in seconds from the file's start."""
    start = 0.0 if job.start is None else job.start
    end = scan.duration if job.end is None else job.end
    if not 0 <= start < end or start >= scan.duration or end > scan.duration + _SLACK:
        detail = f"{start:g} s to {end:g} s is not inside the file's {scan.duration:.2f} s"
        raise MediaError(job.name, "bad_span", f"{detail}; correct start and end")
    end = min(end, scan.duration)
    _check_length(job, end - start)
    return start, end


def _pictures(
    container: Any, scan: Scan, start: float, end: float, job: DecodeJob, use_decord: bool
) -> tuple[NDArray[np.uint8] | None, NDArray[np.float64], FaceTrack | None]:
    """Frames (F, H, W, 3) unless only faces are wanted, their times (F,), and the faces."""
    track, stream, sampling = scan.video, video_stream(container), job.sampling
    if stream is None or track is None or track.end <= start or track.start >= end:
        raise MediaError(job.name, "no_frames", f"shows nothing between {start:g} s and {end:g} s")
    base = float(stream.time_base)
    picked, times = place_frames(track, base, scan.origin, start, end, sampling.frames)
    places, order = np.unique(picked, return_inverse=True)
    face = "face" in job.want
    side = None if face else sampling.max_side
    unique = _read(container, stream, track, places, side, job, use_decord)
    frames = np.stack([unique[int(place)] for place in order])
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
