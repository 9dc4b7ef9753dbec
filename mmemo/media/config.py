"""What is taken from a clip (part of every feature's identity), how decoding is bounded, and where
features are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mmemo.config import Config


class FaceConfig(Config):
    """How the face crops of a clip are made."""

    detector: Literal["yunet", "mediapipe", "boxes", "none"] = "yunet"
    """``boxes`` are given in the manifest; ``none`` means the clips are face crops already."""
    model: str | None = None
    """Detector file, or ``owner/name:file`` of a hub. Needed by ``yunet`` and ``mediapipe``."""
    size: int = Field(default=112, ge=16, le=1024)
    """Side of the square crop, in pixels."""
    margin: float = Field(default=0.25, ge=0, le=2)
    """Share of the box's side added on each side before cropping."""
    align: bool = True
    """Turn and scale the crop so that the eyes are level and at fixed places."""
    min_score: float = Field(default=0.6, ge=0, le=1)
    """Detections below this score do not count."""
    max_gap: float = Field(default=1.0, gt=0)
    """Seconds between two given boxes up to which ``boxes`` interpolates."""


class SamplingConfig(Config):
    """What arrays a clip becomes. Saved with the model; changing it changes the features."""

    frames: int = Field(default=8, ge=1, le=512)
    """Frames per clip, at the centres of equal parts of the span."""
    max_side: int | None = Field(default=None, ge=16)
    """Longer side of decoded frames, in pixels; None keeps the file's size."""
    sample_rate: int = Field(default=16000, ge=8000, le=48000)
    """Rate of the mono waveform, in Hz."""
    face: FaceConfig = FaceConfig()


class DecodeConfig(Config):
    """Limits of the decoding workers. They change nothing in what a good clip becomes."""

    workers: int = Field(default=2, ge=1, le=256)
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one clip before its worker is killed."""
    memory_mb: int = Field(default=4096, ge=256)
    """Address space a worker may add for decoding, in MiB."""
    max_seconds: float = Field(default=600.0, gt=0)
    """A longer span is refused as ``too_long``."""
    backend: Literal["auto", "decord", "pyav"] = "auto"
    """``auto`` is decord, and PyAV where decord fails."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when a larger share of the clips is bad."""


class StoreConfig(Config):
    """Where features are kept, and how much of them."""

    enabled: bool = True
    """False computes every feature each time it is needed; the features are the same."""
    path: str | None = None
    """Folder of the store. None is ``features`` beside the run's own folder, which the stages of
    a pipeline share."""
    budget_gb: float | None = Field(default=50.0, gt=0)
    """Size on disk, in units of 10^9 bytes. The shards used longest ago go first. None: no
    bound."""
    crops_gb: float = Field(default=10.0, ge=0)
    """Size of the face crops kept beside the features, in units of 10^9 bytes, from which another
    face tower is served without decoding and detecting again. 0 keeps none."""
    shard_mb: float = Field(default=64.0, gt=0, le=4096)
    """Size at which a shard is written, in units of 10^6 bytes."""
    verify: bool = True
    """Compare every feature that is read with its checksum."""


def store_folder(config: StoreConfig, output_dir: Path | str) -> Path:
    """Where a run's store is."""
    if config.path is not None:
        return Path(config.path)
    return Path(output_dir).resolve().parent / "features"
