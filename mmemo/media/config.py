"""Configs of what is read from a clip, of the limits on decoding, and of the feature store.

The sampling is part of the identity of every feature; the limits and the store are not.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from mmemo.config import Config, nearest
from mmemo.media.edits import EDITS

TrackChoice = (
    Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}([-_]\w+)*$")] | None
)
"""A track of a file: its number among those of its kind, from 0, or a language; None: the best."""


class FaceConfig(Config):
    """How faces are detected, cropped and aligned."""

    detector: Literal["yunet", "mediapipe", "boxes", "none"] = "yunet"
    """``boxes`` uses the manifest's boxes; ``none`` means that the clips are face crops already."""
    model: str | None = None
    """Detector file, or ``owner/name:file`` on the hub. Required by ``yunet`` and ``mediapipe``."""
    size: int = Field(default=112, ge=16, le=1024)
    """Side length of the square crop, in pixels."""
    margin: float = Field(default=0.25, ge=0, le=2)
    """Margin added on each side before cropping, as a share of the box's side length."""
    align: bool = True
    """Rotate and scale the crop so that the eyes are level and at fixed positions."""
    min_score: float = Field(default=0.6, ge=0, le=1)
    """Detections with a lower score are ignored."""
    max_gap: float = Field(default=1.0, gt=0)
    """Longest gap between two given boxes that ``boxes`` interpolates over, in seconds."""


class SamplingConfig(Config):
    """How a clip is sampled into arrays. Saved with the model; a change changes the features."""

    frames: int = Field(default=8, ge=1, le=512)
    """Number of frames per clip, taken at the centres of equal parts of the span."""
    max_side: int | None = Field(default=None, ge=16)
    """Longer side of the decoded frames, in pixels. None keeps the size of the file."""
    sample_rate: int = Field(default=16000, ge=8000, le=48000)
    """Sample rate of the mono waveform, in Hz."""
    audio_track: TrackChoice = None
    """Audio track to read: its number among the audio tracks, from 0, or its language (``eng``).
    None takes the default one (docs: What is fed)."""
    video_track: TrackChoice = None
    """The same for the video. Attached pictures, such as covers, are not counted."""
    face: FaceConfig = FaceConfig()

    @model_serializer(mode="wrap")
    def _without_unset_tracks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dump is part of the identity of encoders, base models and answers. Those that were
        made before a track could be chosen keep theirs."""
        values: dict[str, Any] = handler(self)
        unset = {"audio_track", "video_track"} - {k for k, v in values.items() if v is not None}
        return {key: value for key, value in values.items() if key not in unset}


class DecodeConfig(Config):
    """Limits on the decoding workers, and an edit. The limits do not change the arrays of a clip
    that decodes."""

    workers: int = Field(default=2, ge=1, le=256)
    """Number of worker processes."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that one clip may take before its worker is killed."""
    memory_mb: int = Field(default=4096, ge=256)
    """Address space that a worker may add for decoding, in MiB."""
    max_seconds: float = Field(default=600.0, gt=0)
    """Longest span, in seconds. A longer one is refused as ``too_long``."""
    backend: Literal["auto", "decord", "pyav"] = "auto"
    """``auto`` uses decord, and PyAV for clips on which decord fails."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of bad clips; the run stops if there are more."""
    edit: str | None = None
    """A small edit of every decoded sound or picture, by its name in :mod:`mmemo.media.edits`, such
    as ``gain_-2``. ``mmemo eval --robustness`` goes through all of them."""

    @field_validator("edit")
    @classmethod
    def _known_edit(cls, value: str | None) -> str | None:
        if value is not None and value not in EDITS:
            guess = nearest(value, list(EDITS))
            hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(EDITS)}"
            raise ValueError(f"there is no edit '{value}'; {hint}")
        return value

    @model_serializer(mode="wrap")
    def _without_no_edit(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dump is part of the keys of decoding outcomes, which stay as they were."""
        values: dict[str, Any] = handler(self)
        if values.get("edit") is None:
            values.pop("edit", None)
        return values


class StoreConfig(Config):
    """Where the features of frozen encoders are stored, and how much space they may use."""

    enabled: bool = True
    """False recomputes every feature whenever it is needed; the features are the same."""
    path: str | None = None
    """Folder of the store. None uses ``features`` beside the run's own folder, which all stages of
    a pipeline share. A URL that fsspec knows, such as ``s3://bucket/features``, is read only: its
    shards are copied to the user's cache when they are needed."""
    budget_gb: float | None = Field(default=50.0, gt=0)
    """Maximum size on disk, in units of 10^9 bytes. The least recently used shards are evicted
    first. None sets no limit."""
    crops_gb: float = Field(default=10.0, ge=0)
    """Maximum size of the face crops that are kept beside the features, in units of 10^9 bytes.
    With them, another face encoder needs no new decoding and detection. 0 keeps none."""
    shard_mb: float = Field(default=64.0, gt=0, le=4096)
    """Size of the pending features at which a shard is written, in units of 10^6 bytes."""
    verify: bool = True
    """Verify the checksum of every feature that is read."""
    lease_seconds: float = Field(default=60.0, ge=1)
    """Seconds of silence after which a process on another machine counts as dead, and others
    compute the features that it has claimed. It gives a sign of life twelve times as often."""


def store_folder(config: StoreConfig, output_dir: Path | str) -> Path:
    """The folder of a run's store; of one at a URL, the local copy of what was needed of it."""
    if config.path is None:
        return Path(output_dir).resolve().parent / "features"
    if not is_url(config.path):
        return Path(config.path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mmemo" / "features" / hashlib.sha256(config.path.encode()).hexdigest()[:32]


def store_place(config: StoreConfig, output_dir: Path | str) -> str:
    """The ``store.path`` with which another run uses the store of this one."""
    if config.path is not None and is_url(config.path):
        return config.path
    return store_folder(config, output_dir).as_posix()


def is_url(path: str) -> bool:
    """Whether a store's path is that of an object store, and not a folder."""
    return "://" in path
