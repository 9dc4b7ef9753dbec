"""A backbone of fixed linear maps, for tests of what happens around the towers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmemo.data.sample import MODALITIES, FaceBox, MediaRef, Modality, Sample, Turn
from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import FaceConfig, SamplingConfig
from mmemo.media.decode import decode

if TYPE_CHECKING:
    from mmemo.models.backbone import Features


class TinyBackbone:
    """``x`` (T, 8): a fixed projection of each frame, or of each 20 ms of sound."""

    def __init__(
        self,
        *,
        weight: float = 1.0,
        frames: int = 4,
        sample_rate: int = 16000,
        modalities: tuple[Modality, ...] = MODALITIES,
        log: Path | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.sampling = SamplingConfig(
            frames=frames, sample_rate=sample_rate, face=FaceConfig(detector="none", size=32)
        )
        self.modalities = modalities
        self.weight, self.log, self.seconds = weight, log, seconds
        self.encoded: list[tuple[str, str]] = []

    def feature_fingerprint(self, modality: Modality) -> str:
        return hashlib.sha256(f"{modality}{self.weight}".encode()).hexdigest()

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        return [self._encode(modality, clip) for clip in clips]

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        self.encoded.append((modality, clip.name))
        if self.log is not None:
            with self.log.open("a") as handle:
                handle.write(f"{modality} {clip.digest}\n")
        time.sleep(self.seconds)
        if modality == "audio":
            assert clip.waveform is not None
            step = clip.sample_rate // 50
            rows = clip.waveform[: len(clip.waveform) // step * step].reshape(-1, step)
        else:
            pictures = clip.frames if modality == "video" else clip.faces and clip.faces.crops
            assert pictures is not None
            rows = np.stack([frame[::8, ::8].reshape(-1) for frame in pictures]) / 255.0
        generator = torch.Generator().manual_seed(len(rows[0]))
        matrix = torch.randn(len(rows[0]), 8, generator=generator) * self.weight
        return {"x": torch.from_numpy(rows.astype(np.float32)) @ matrix}


class Refusing(TinyBackbone):
    """Cannot take the clips named in ``refused``; makes NaN of those in ``broken``."""

    refused: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        if clip.name in self.refused:
            raise MediaError(clip.name, "decode", "refused by the tower")
        features = super()._encode(modality, clip)
        return {"x": features["x"] * float("nan")} if clip.name in self.broken else features


def local_pool(seen: list[DecodeJob]) -> Callable[..., object]:
    """A decoding pool in this process that notes its jobs."""

    class LocalPool:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> LocalPool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, jobs: Iterable[DecodeJob]) -> Generator[DecodedClip | BadClip]:
            for job in jobs:
                seen.append(job)
                try:
                    yield decode(job)
                except MediaError as error:
                    yield BadClip(job.name, error.kind, error.detail)

    return LocalPool


def sample(name: str, *modalities: Modality, sample_id: str = "", **span: float) -> Sample:
    """A row that asks one question about ``modalities`` of one file."""
    ref = MediaRef(name, **span)
    wanted = modalities or MODALITIES
    return Sample(
        sample_id or f"{name}-{'-'.join(wanted)}",
        (Turn("user", "Which emotion?"), Turn("assistant", "angry")),
        dict.fromkeys(wanted, ref),
    )


def boxed(name: str, left: float) -> Sample:
    """A row whose face box is given."""
    boxes = (FaceBox(0.0, (left, 10.0, left + 40.0, 50.0)),)
    media = {"face": MediaRef(name, face_boxes=boxes)}
    return Sample(f"{name}-{left}", (Turn("user", "?"),), media)
