"""What rows ask of a file, before anything of it is decoded."""

from __future__ import annotations

from collections.abc import Container, Mapping

from mmemo.data.sample import Modality
from mmemo.errors import MediaError

CULPRITS: Mapping[str, frozenset[Modality]] = {
    "no_audio": frozenset({"audio"}),
    "no_video": frozenset({"video", "face"}),
    "no_frames": frozenset({"video", "face"}),
}
"""The streams that an error of this kind is about; others of the clip may be good."""
_SLACK = 0.25  # seconds by which a manifest's end may pass the file's, after rounding


def need_streams(name: str, want: Container[Modality], *, video: bool, audio: bool) -> None:
    """Raises:
    MediaError: ``no_video`` or ``no_audio`` when a wanted stream is not there.
    """
    if ("video" in want or "face" in want) and not video:
        raise MediaError(name, "no_video", "has no video stream; drop video from this row")
    if "audio" in want and not audio:
        raise MediaError(name, "no_audio", "has no audio stream; drop audio from this row")


def need_span(
    name: str, start: float | None, end: float | None, duration: float, max_seconds: float
) -> tuple[float, float]:
    """Start and end in seconds from the file's start; None is the file's own.

    Raises:
        MediaError: ``bad_span`` when they are not inside the file, ``too_long``.
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
    """Raises:
    MediaError: ``too_long``.
    """
    if seconds > max_seconds:
        detail = f"{seconds:.0f} s is over max_seconds={max_seconds:g}"
        raise MediaError(name, "too_long", f"{detail}; give start and end, or raise the limit")
