"""A clip as content parts of an OpenAI chat request: frames as pictures, sound as WAV.

Clips are decoded as everywhere in mmemo: under the media root only, in processes that can be
killed, within limits of time and memory.

F frames, H x W pixels, S audio samples.
"""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmemo.config import Config
from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.paths import resolve
from mmemo.rewards.judge.rubric import ClipMedia, ClipSpan

_KEPT = 64  # clips whose parts are kept: the completions of one prompt share theirs


class JudgeMediaConfig(Config):
    """What a judge sees and hears of a clip."""

    frames: int = Field(default=8, ge=0, le=64)
    """Number of frames, taken at the centres of equal parts of the clip. 0 sends no picture."""
    max_side: int = Field(default=448, ge=16, le=2048)
    """Longer side of the frames, in pixels."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """JPEG has quality 95; PNG is exact and larger."""
    sound: bool = True
    """Send the sound as 16-bit mono WAV at 16 kHz."""
    max_mb: float = Field(default=16.0, gt=0, le=256)
    """Maximum size of the clip in a request, in units of 10^6 bytes. A larger clip is not sent, and
    its completions are not graded."""
    decode: DecodeConfig = DecodeConfig(workers=1, max_seconds=120.0)
    """Limits on decoding."""


@dataclass(frozen=True, slots=True)
class SentMedia:
    """A clip's content parts. ``described``: what they are, in words. ``digests``: of its files."""

    parts: tuple[Mapping[str, Any], ...]
    described: str
    digests: tuple[str, ...]


class MediaEncoder:
    """Decodes and encodes clips, and keeps the last ones.

    ``counts``: ``bad_clip`` and ``clip_too_large``, once for each clip that is asked for.
    """

    def __init__(self, config: JudgeMediaConfig, counts: Counter[str]) -> None:
        self.config, self.counts = config, counts
        self._kept: OrderedDict[ClipMedia, asyncio.Future[SentMedia | None]] = OrderedDict()

    async def encode(self, clip: ClipMedia) -> SentMedia | None:
        """The clip's parts; None for a clip that cannot be decoded or is too large."""
        pending = self._kept.get(clip)
        # A future belongs to its event loop, which a reward may have lost to a time limit.
        if pending is None or (not pending.done() and pending.get_loop() is not _loop()):
            pending = _loop().create_future()
            self._kept[clip] = pending
            try:
                pending.set_result(await asyncio.to_thread(self._encode, clip))
            except BaseException:
                # Cancelled, for example: the next who asks tries again.
                self._kept.pop(clip, None)
                pending.cancel()
                raise
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return await asyncio.shield(pending) if not pending.done() else pending.result()

    def _encode(self, clip: ClipMedia) -> SentMedia | None:
        jobs = self._jobs(clip)
        if jobs is None:
            self.counts["bad_clip"] += 1
            return None
        decoded = list(_pool(self.config.decode.model_dump_json()).map(jobs))
        parts: list[Mapping[str, Any]] = []
        said: list[str] = []
        for one in decoded:
            if isinstance(one, BadClip):
                self.counts["bad_clip"] += 1
                return None
            if one.frames is not None:
                parts += [frame_part(frame, self.config.image_format) for frame in one.frames]
                said.append(f"{len(one.frames)} frames in order of time")
        for one in decoded:
            if isinstance(one, DecodedClip) and one.waveform is not None:
                parts.append(sound_part(one.waveform, one.sample_rate))
                said.append("its sound")
        size = sum(_size(part) for part in parts)
        if size > self.config.max_mb * 1e6:
            self.counts["clip_too_large"] += 1
            return None
        digests = tuple(one.digest for one in decoded if isinstance(one, DecodedClip))
        return SentMedia(tuple(parts), " and ".join(said), digests)

    def _jobs(self, clip: ClipMedia) -> list[DecodeJob] | None:
        """One job for each span; None if a file cannot be found under the media root."""
        wanted: dict[ClipSpan, set[Modality]] = {}
        if clip.picture is not None and self.config.frames:
            wanted.setdefault(clip.picture, set()).add("video")
        if clip.audio is not None and self.config.sound:
            wanted.setdefault(clip.audio, set()).add("audio")
        sampling = SamplingConfig(frames=max(1, self.config.frames), max_side=self.config.max_side)
        jobs: list[DecodeJob] = []
        for span, want in wanted.items():
            try:
                path = resolve(Path(clip.root), span.path)
            except MediaError:
                return None
            limits = self.config.decode
            jobs.append(
                DecodeJob(path, span.path, frozenset(want), sampling, limits, span.start, span.end)
            )
        return jobs


def frame_part(frame: NDArray[np.uint8], form: Literal["jpeg", "png"] = "jpeg") -> dict[str, Any]:
    """One (H, W, 3) RGB frame as an ``image_url`` part with a data URL."""
    # imencode takes BGR, while decoded frames are RGB.
    done, data = cv2.imencode(f".{form}", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    assert done
    address = f"data:image/{form};base64,{base64.b64encode(data.tobytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": address}}


def sound_part(waveform: NDArray[np.float32], rate: int) -> dict[str, Any]:
    """A mono waveform (S,) as an ``input_audio`` part: a 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        # A sample beyond 1 would wrap around in 16 bits.
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    sound = {"data": base64.b64encode(buffer.getvalue()).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": sound}


def _size(part: Mapping[str, Any]) -> int:
    """Bytes of a part in the request."""
    value = part[part["type"]]
    return len(value["url"] if part["type"] == "image_url" else value["data"])


@lru_cache(maxsize=1)
def _pool(limits: str) -> DecodePool:
    """The decoding processes, which all judges of a run share; they end with it."""
    return DecodePool(DecodeConfig.model_validate_json(limits))


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
