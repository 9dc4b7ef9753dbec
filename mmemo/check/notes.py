"""What is odd about clips that can be used: the notes of ``mmemo check``.

A note is no fault. It says what mmemo makes of a clip that a reader of its rows would not expect,
so that somebody can look at it before a model is trained on it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmemo.data.sample import Modality
from mmemo.features.keys import Span
from mmemo.media.downmix import CANCELLED, CLIPPED, SILENT
from mmemo.media.probe import AudioStream, MediaInfo, VideoStream

TRACKS = "several tracks"
ASPECT = "pixel shape"
INTERLACED = "interlaced"
MIRRORED = "mirrored"
APART = "streams apart"
LENGTH = "length"

MEANINGS: Mapping[str, str] = {
    TRACKS: "one is read; sampling.audio_track and video_track choose another",
    ASPECT: "pixels are not square; frames are scaled to the shape that players show",
    INTERLACED: "frames are deinterlaced",
    MIRRORED: "frames are mirrored as players show them",
    APART: "picture and sound cover different times; frames are spread over the picture's own",
    SILENT: "no sample of the sound exceeds -60 dB of full scale",
    CANCELLED: "the channels cancel each other; the loudest one is heard alone",
    CLIPPED: "the recording has flat tops at full scale, which nothing repairs",
    LENGTH: "far from the length of the other clips; its row may name the wrong span",
}
"""Each kind of note, and what is done about it."""
FILE_KINDS = frozenset({TRACKS, ASPECT, INTERLACED, MIRRORED})
"""Notes that hold for every clip of a file."""

_SOUND = {
    SILENT: "its sound is below -60 dB of full scale from end to end",
    CANCELLED: "its channels are of opposite phase and cancel each other",
    CLIPPED: "its sound has flat tops at full scale",
}
_APART = 0.5  # seconds between the ends of picture and sound that encoders do not explain
_ENOUGH = 10  # clips, for a median that means something
_DEVIATIONS, _LEAST_RATIO = 4.0, 3.0
_SPREAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal


@dataclass(frozen=True, slots=True)
class MediaNote:
    """One note on one clip. ``start``, ``end``: its span in seconds, None for the file's ends."""

    kind: str
    path: str
    detail: str
    start: float | None = None
    end: float | None = None
    sample_ids: tuple[str, ...] = ()

    def row(self) -> Mapping[str, object]:
        """The note as a row of a JSON Lines file."""
        return {
            "kind": self.kind,
            "path": self.path,
            "start": self.start,
            "end": self.end,
            "detail": self.detail,
            "sample_ids": list(self.sample_ids),
        }


def stream_notes(
    info: MediaInfo, window: tuple[float, float], wanted: Collection[Modality]
) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each note that a clip's packets allow.

    Args:
        info: the clip's file.
        window: the clip's span, in seconds from the file's start.
        wanted: what rows read of the clip.
    """
    video = info.video if {"video", "face"} & set(wanted) else None
    audio = info.audio if "audio" in wanted else None
    for name, stream in (("video", video), ("audio", audio)):
        if stream is not None and len(stream.tracks) > 1:
            yield TRACKS, f"{len(stream.tracks)} {name} tracks: {'; '.join(stream.tracks)}"
    if video is not None:
        yield from _picture_notes(video)
    if info.video is not None and info.audio is not None:
        yield from _apart(info.video, info.audio, window)


def _picture_notes(video: VideoStream) -> Iterator[tuple[str, str]]:
    if not math.isclose(video.sample_aspect, 1.0, rel_tol=1e-3):
        detail = f"a pixel is {video.sample_aspect:.3f} times as wide as high"
        if video.display_width:
            detail += f"; {video.width}x{video.height} is shown as "
            detail += f"{video.display_width}x{video.display_height}"
        yield ASPECT, detail
    if video.interlaced:
        yield INTERLACED, f"its frames are two fields each (field order {video.field_order})"
    if video.mirrored:
        turned = f", then turned by {video.rotation} degrees" if video.rotation else ""
        yield MIRRORED, f"left and right are swapped for display{turned}"


def _apart(
    video: VideoStream, audio: AudioStream, window: tuple[float, float]
) -> Iterator[tuple[str, str]]:
    # Only what of them lies in the clip counts: others of the same file may be whole.
    parts: list[tuple[float, float]] = []
    for stream in (video, audio):
        start, end = stream.start, stream.start + stream.seconds
        parts.append((max(start, window[0]), max(min(end, window[1]), window[0])))
    (first, last), (begin, finish) = parts
    if max(abs(first - begin), abs(last - finish)) > _APART:
        detail = f"picture from {first:.2f} s to {last:.2f} s"
        yield APART, f"{detail}, sound from {begin:.2f} s to {finish:.2f} s"


def sound_notes(notes: Collection[str]) -> Iterator[tuple[str, str]]:
    """(kind, detail) of the notes that decoding the sound made."""
    for kind in notes:
        yield kind, _SOUND[kind]


def length_notes(seconds: Mapping[Span, float]) -> dict[Span, str]:
    """The clips whose length is far from that of the others, with the detail of the note.

    Far is four robust standard deviations of the log length (from the median absolute deviation)
    and at least three times longer or shorter than the median. Under ten clips tell nothing.
    """
    logs = {span: math.log(length) for span, length in seconds.items() if length > 0}
    if len(logs) < _ENOUGH:
        return {}
    middle = statistics.median(logs.values())
    spread = _SPREAD * statistics.median(abs(log - middle) for log in logs.values())
    most = max(_DEVIATIONS * spread, math.log(_LEAST_RATIO))
    usual = f"half of the clips are under {math.exp(middle):.1f} s"
    return {
        span: f"{seconds[span]:.1f} s long, and {usual}"
        for span, log in logs.items()
        if abs(log - middle) > most
    }


def by_kind(notes: Sequence[MediaNote]) -> dict[str, list[MediaNote]]:
    """Notes by kind, in the order of :data:`MEANINGS`."""
    found = {kind: [note for note in notes if note.kind == kind] for kind in MEANINGS}
    return {kind: some for kind, some in found.items() if some}
