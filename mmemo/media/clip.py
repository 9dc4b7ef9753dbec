"""Decoded clips as arrays. Shapes: F frames, H x W pixels, S audio samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo.data.sample import FaceBox, Modality
from mmemo.media.config import DecodeConfig, SamplingConfig


@dataclass(frozen=True, slots=True)
class FaceTrack:
    """Crops of one face: the largest and most central one of the clip.

    ``crops``: (F, size, size, 3) uint8 RGB. ``found``: (F,) bool; if False, the crop is the whole
    frame. ``scores``: (F,) float32, 0 if not found.
    """

    crops: NDArray[np.uint8]
    found: NDArray[np.bool_]
    scores: NDArray[np.float32]
    detector: str
    colour: str = "RGB"


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """One decoded span of one file. Streams that were not requested are None.

    ``frames``: (F, H, W, 3) uint8 RGB. ``times``: (F,) float64, seconds from the file's start.
    ``waveform``: (S,) float32 mono in [-1, 1] at ``sample_rate`` Hz. ``digest``: SHA-256 of the
    file's bytes, in hex. ``notes``: what was found odd in the sound, see
    :func:`mmemo.media.audio.read_waveform`.
    """

    name: str
    digest: str
    duration: float
    frames: NDArray[np.uint8] | None = None
    times: NDArray[np.float64] | None = None
    waveform: NDArray[np.float32] | None = None
    sample_rate: int = 16000
    faces: FaceTrack | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """What to decode from one file. ``path`` is already resolved under the media root."""

    path: Path
    name: str  # as written in the manifest, for errors
    want: frozenset[Modality]
    sampling: SamplingConfig
    limits: DecodeConfig
    start: float | None = None
    end: float | None = None
    face_boxes: tuple[FaceBox, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plain values for a target other than decoding, such as :mod:`mmemo.media.rewrite`."""


@dataclass(frozen=True, slots=True)
class BadClip:
    """A clip that is left out, and the reason. ``sample_ids`` are the rows that use it."""

    path: str
    kind: str  # MediaError.kind
    detail: str
    sample_ids: tuple[str, ...] = ()

    def row(self) -> Mapping[str, object]:
        """The clip as a row of ``bad_clips.jsonl``."""
        return {
            "path": self.path,
            "kind": self.kind,
            "detail": self.detail,
            "sample_ids": list(self.sample_ids),
        }
