"""A cache of face crops, so that a new face encoder needs no new decoding and face detection.

An entry holds the crops as uint8 with their size and colour order, and which frames show the face.
A frame without a face is kept whole. Shapes: F frames, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmemo.features.keys import Stream
from mmemo.features.store import FeatureStore
from mmemo.media.clip import DecodedClip, FaceTrack

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Features


def pack(clip: DecodedClip) -> Features:
    """Convert the faces of a clip to tensors.

    Returns:
        ``crops`` (F, S, S, 3), ``found`` (F,), ``scores`` (F,), ``times`` (F,), ``size`` S,
        ``duration`` in seconds, and ``colour`` and ``detector`` as UTF-8 bytes.
    """
    track = clip.faces
    if track is None or clip.times is None:
        raise ValueError(f"{clip.name} was decoded without faces")
    return {
        "crops": torch.from_numpy(np.ascontiguousarray(track.crops)),
        "found": torch.from_numpy(track.found),
        "scores": torch.from_numpy(track.scores),
        "times": torch.from_numpy(clip.times),
        "size": torch.tensor(track.crops.shape[1]),
        "duration": torch.tensor(clip.duration, dtype=torch.float64),
        "colour": _text(track.colour),
        "detector": _text(track.detector),
    }


def unpack(features: Features, name: str, digest: str) -> DecodedClip:
    """Convert the tensors of :func:`pack` back to a clip without frames and waveform."""
    track = FaceTrack(
        crops=features["crops"].numpy(),
        found=features["found"].numpy(),
        scores=features["scores"].numpy(),
        detector=bytes(features["detector"].tolist()).decode(),
        colour=bytes(features["colour"].tolist()).decode(),
    )
    duration, times = float(features["duration"]), features["times"].numpy()
    return DecodedClip(name, digest, duration, times=times, faces=track)


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


class CropCache:
    """The face crops of a store. A cache without a store is always empty."""

    def __init__(self, store: FeatureStore | None) -> None:
        self._store = None if store is None else store.crops

    def find(self, streams: Iterable[Stream]) -> DecodedClip | None:
        """The clip with the cached faces that one of ``streams`` needs, or None."""
        for stream in streams:
            if stream.modality == "face" and self._store is not None:
                features = self._store.get(stream.crops)
                if features is not None:
                    return unpack(features, stream.span.name, stream.digest)
        return None

    def keep(self, streams: Iterable[Stream], clip: DecodedClip) -> None:
        """Cache the faces of a clip that was decoded for ``streams``."""
        for stream in streams:
            if stream.modality == "face" and self._store is not None:
                self._store.put(stream.crops, pack(clip))


def to_decode(streams: Iterable[Stream], held: DecodedClip | None) -> list[Stream]:
    """The streams for which the file must be decoded, given the cached faces ``held``."""
    # The file is decoded only for what the cached crops do not give.
    return [stream for stream in streams if held is None or stream.modality != "face"]


def with_faces(clip: DecodedClip, held: DecodedClip | None) -> DecodedClip:
    """``clip``, decoded without faces, with the cached faces of ``held``."""
    return clip if held is None else replace(clip, faces=held.faces)
