"""The gallery of the report: which clips it shows, small enough to be part of the page."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
from av.audio.resampler import AudioResampler
from av.error import FFmpegError

from mmemo.data.sample import CONFLICTS
from mmemo.evaluation.predictions import Row

MAX_SIDE, MAX_SECONDS, MAX_BYTES = 320, 8.0, 300_000
"""A clip that exceeds one of these limits (pixels, seconds, bytes) is encoded again."""


@dataclass(frozen=True, slots=True)
class Card:
    """One clip of the gallery. ``others`` maps the other runs' names to their answers."""

    row: Row
    video: str | None
    """The clip as a data URI; None where the file cannot be read."""
    poster: str | None
    right: bool
    others: Mapping[str, Row]


def choose(rows: Sequence[Row], count: int) -> list[Row]:
    """Up to ``count`` answers: right and wrong ones of each subset in turn, preferring speakers
    that are not shown yet. A hash of the sample id orders them, so nobody picks the examples."""
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row["sample_id"].encode()).digest())
    kinds: dict[tuple[str, bool], list[Row]] = {}
    for subset in [*CONFLICTS, "none"]:
        for right in (True, False):
            kinds[subset, right] = [
                row
                for row in shuffled
                if (row.get("conflict") or "none") == subset
                and (row["answer"] == row["truth"]) == right
                and row.get("media")
            ]
    chosen: list[Row] = []
    speakers: set[str] = set()
    while len(chosen) < count and any(kinds.values()):
        for left in kinds.values():
            if left and len(chosen) < count:
                fresh = [r for r in left if r.get("group", {}).get("speaker") not in speakers]
                row = (fresh or left)[0]
                left.remove(row)
                chosen.append(row)
                speakers.add(str(row.get("group", {}).get("speaker")))
    order = {subset: index for index, subset in enumerate([*CONFLICTS, "none"])}
    return sorted(chosen, key=lambda row: order[row.get("conflict") or "none"])


def make_cards(
    rows: Sequence[Row],
    others: Mapping[str, Mapping[str, Row]],
    media_root: Path,
    count: int,
) -> list[Card]:
    """Cards of the chosen answers. ``others`` maps the name of another run to its rows by sample
    id."""
    cards: list[Card] = []
    for row in choose(rows, count):
        video, still = clip_uris(media_path(row, media_root), row.get("start"), row.get("end"))
        card = Card(
            row=row,
            video=video,
            poster=still,
            right=row["status"] == "ok" and row["answer"] == row["truth"],
            others={
                name: by_id[row["sample_id"]]
                for name, by_id in others.items()
                if row["sample_id"] in by_id
            },
        )
        cards.append(card)
    return cards


def media_path(row: Row, media_root: Path) -> Path:
    """The file that the card plays."""
    media: Mapping[str, str] = row["media"]
    name = next(media[kind] for kind in ("video", "face", "audio") if kind in media)
    return media_root / name


def clip_uris(
    path: Path, start: float | None = None, end: float | None = None
) -> tuple[str | None, str | None]:
    """The clip and its poster as ``data:`` URIs; None where it cannot be read."""
    data = embed(path, start, end)
    return (None, None) if data is None else (_uri("video/mp4", data), poster(data))


def embed(path: Path, start: float | None = None, end: float | None = None) -> bytes | None:
    """The clip as an mp4 that browsers play; None when it cannot be read."""
    try:
        if start is None and end is None and _fits(path):
            return path.read_bytes()
        return shrink(path, start or 0.0, end)
    except (OSError, FFmpegError, ValueError):
        return None  # the page says so: a run whose clips were moved can still be reported


def poster(data: bytes) -> str | None:
    """The middle frame of an mp4 as a ``data:`` URI of a JPEG; None without a video stream."""
    with av.open(io.BytesIO(data), "r") as container:
        if not container.streams.video:
            return None
        frames = list(container.decode(video=0))
    if not frames:
        return None
    middle = frames[len(frames) // 2].to_ndarray(format="bgr24")
    _, jpeg = cv2.imencode(".jpg", middle, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return _uri("image/jpeg", jpeg.tobytes())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")


def _fits(path: Path) -> bool:
    if path.stat().st_size > MAX_BYTES or path.suffix.lower() != ".mp4":
        return False
    with av.open(str(path)) as container:
        codecs = {stream.codec_context.name for stream in container.streams}
        small = all(max(s.width, s.height) <= MAX_SIDE for s in container.streams.video)
        # PyAV gives the duration in microseconds.
        seconds = (container.duration or 0) / 1_000_000
    return codecs <= {"h264", "aac"} and small and 0 < seconds <= MAX_SECONDS


def shrink(path: Path, start: float = 0.0, end: float | None = None) -> bytes:
    """Encode at most ``MAX_SECONDS`` from ``start`` as a small H.264 and AAC mp4."""
    end = min(end if end is not None else start + MAX_SECONDS, start + MAX_SECONDS)
    buffer = io.BytesIO()
    with (
        av.open(str(path)) as source,
        av.open(buffer, "w", format="mp4") as target,
    ):
        video = source.streams.video[0] if source.streams.video else None
        audio = source.streams.audio[0] if source.streams.audio else None
        if video is None and audio is None:
            raise ValueError(f"{path} has neither a video nor an audio stream")
        picture: Any = _picture(target, video) if video is not None else None
        sound: Any = target.add_stream("aac", rate=44100, layout="mono") if audio else None
        resampler = AudioResampler(format="fltp", layout="mono", rate=44100)
        for frame in source.decode(*[s for s in (video, audio) if s is not None]):
            if not isinstance(frame, av.VideoFrame | av.AudioFrame):
                continue
            at = frame.time
            if at is None or at < start or at >= end:
                continue
            if isinstance(frame, av.VideoFrame):
                small: Any = frame.reformat(picture.width, picture.height, "yuv420p")
                small.pts, small.time_base = round((at - start) * 90000), Fraction(1, 90000)
                # Otherwise the encoder would be forced to use the frame types of the source.
                small.pict_type = 0
                target.mux(picture.encode(small))
            else:
                frame.pts = None
                for part in resampler.resample(frame):
                    target.mux(sound.encode(part))
        # The encoders hold frames back until they are flushed.
        for stream in (picture, sound):
            if stream is not None:
                target.mux(stream.encode())
    return buffer.getvalue()


def _picture(target: Any, video: Any) -> Any:
    scale = min(1.0, MAX_SIDE / max(video.width, video.height))
    rate = min(video.average_rate or Fraction(15), Fraction(30))
    stream = target.add_stream("libx264", rate=rate, options={"crf": "28", "preset": "veryfast"})
    # yuv420p halves the resolution of the colours, so both sides must be even.
    stream.width = max(2, round(video.width * scale) // 2 * 2)
    stream.height = max(2, round(video.height * scale) // 2 * 2)
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, 90000)
    return stream
