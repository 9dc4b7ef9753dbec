"""Keys of features: hashes of the file's bytes, the span, the sampling and the encoder.

The key changes if any of these changes, so a stale feature is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmemo.console import progress
from mmemo.content import sha256
from mmemo.data.sample import FaceBox, MediaRef, Modality, Sample
from mmemo.errors import DataError, MediaError
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.edits import concerns
from mmemo.media.face_detectors import detector_file
from mmemo.media.paths import resolve

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Backbone

_VERSION = 2  # increase it when a change of the code changes the arrays of a clip that decodes
_RACY_NS = 2_000_000_000  # a second change within one clock tick of a file system is not visible


@dataclass(frozen=True, slots=True)
class Span:
    """One span of one file, as named by rows. Its streams are decoded together."""

    name: str
    start: float | None = None
    end: float | None = None
    face_boxes: tuple[FaceBox, ...] = ()

    @property
    def label(self) -> str:
        """The span for use in messages; empty for a whole file."""
        if self.start is None and self.end is None:
            return ""
        return f" (from {self.start or 0:g} s to {'the end' if self.end is None else self.end})"


def feature_key(
    digest: str, start: float | None, end: float | None, sampling_part: str, fingerprint: str
) -> str:
    """The key of a feature, as 32 hex digits.

    Args:
        digest: SHA-256 of the file's bytes.
        start, end: the span in seconds; None for the start and the end of the file.
        sampling_part: from :func:`sampling_part`.
        fingerprint: from ``Backbone.feature_fingerprint``.
    """
    # A start of None and of 0.0 mean the same span, so they have the same key.
    return _hash("feature", digest, start or 0.0, end, sampling_part, fingerprint)


def outcome_key(
    digest: str,
    start: float | None,
    end: float | None,
    sampling_part: str,
    limits: DecodeConfig,
) -> str:
    """The key of a decoding outcome ("ok", or the reason of a failure).

    It does not depend on the encoder, but on the limits that decide whether a clip is too long, too
    slow or too large.
    """
    # Neither the number of workers nor the allowed share decides about a single clip.
    bounds = limits.model_dump(mode="json", exclude={"workers", "max_bad_share"})
    return _hash("outcome", digest, start or 0.0, end, sampling_part, bounds)


def sampling_part(
    modality: Modality, sampling: SamplingConfig, face_boxes: tuple[FaceBox, ...] = ()
) -> str:
    """The settings that affect the arrays of this modality, as JSON.

    Other settings are left out: the number of frames, for example, does not change the key of audio
    features.
    """
    asked = sampling.audio_track if modality == "audio" else sampling.video_track
    # Only where a track is asked for, so that the keys of all others stay as they are.
    track = {} if asked is None else {"track": asked}
    if modality == "audio":
        return _json({"modality": modality, "sample_rate": sampling.sample_rate, **track})
    part: dict[str, Any] = {
        "modality": modality,
        "frames": sampling.frames,
        "max_side": sampling.max_side,
        **track,
    }
    if modality == "face":
        face = sampling.face
        # The content of the detector's file counts (below), wherever a machine keeps it.
        part["face"] = face.model_dump(mode="json", exclude={"model"})
        if face.detector == "boxes":
            part["boxes"] = [asdict(box) for box in face_boxes]
        file = detector_file(face)
        if file is not None:
            part["detector"] = sha256(file)
    return _json(part)


class DigestMap(Protocol):
    """A map for caching digests, such as a journal of the store."""

    def get(self, key: str, /) -> Any: ...
    def set(self, key: str, value: Any, /) -> None: ...


class Digests:
    """SHA-256 digests of files, cached until the status of a file changes.

    Size, modification time, change time and inode must all agree; no program can set back the
    change time. The digest of a file that was written just now is not cached, because the file
    could be written again within the same tick of the file system's clock.
    """

    def __init__(self, memory: DigestMap) -> None:
        self._memory = memory

    def of(self, path: Path) -> str:
        """The digest of the bytes that are now on disk.

        Raises:
            OSError: the file cannot be read.
        """
        status = os.stat(path)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known: Any = self._memory.get(str(path))
        if known is not None and known[0] == state:
            return str(known[1])
        # The clock is read before the hash: a long hash must not make a fresh file look old.
        now = time.time_ns()
        digest = sha256(path)
        if now - status.st_ctime_ns > _RACY_NS:
            # The status is that from before the hash, so a write in between voids this entry.
            self._memory.set(str(path), [state, digest])
        return digest


class MemoryMap:
    """An in-memory digest map on top of another one that is only read."""

    def __init__(self, under: DigestMap | None = None) -> None:
        self._under, self._known = under, dict[str, Any]()

    def get(self, key: str, /) -> Any:
        found = self._known.get(key)
        return self._under.get(key) if found is None and self._under is not None else found

    def set(self, key: str, value: Any, /) -> None:
        self._known[key] = value


@dataclass(frozen=True, slots=True)
class Stream:
    """One modality of one span, with the keys of its feature, outcome and face crops."""

    modality: Modality
    span: Span
    path: Path
    digest: str
    key: str
    outcome: str
    crops: str


class Identifier:
    """Maps samples to streams with keys, for one backbone."""

    def __init__(
        self, backbone: Backbone, media_root: Path, limits: DecodeConfig, digests: Digests
    ) -> None:
        self.media_root, self.limits, self.digests = media_root, limits, digests
        self.sampling, self._modalities = backbone.sampling, tuple(backbone.modalities)
        self._prints = {m: backbone.feature_fingerprint(m) for m in self._modalities}
        self._paths: dict[str, Path] = {}
        self._known: dict[tuple[Modality, Span], Stream] = {}
        self._parts: dict[Modality, str] = {}

    def spans(self, sample: Sample) -> dict[Modality, Span]:
        """The span of each modality of a sample.

        Streams of the same file and span share one ``Span``, and are therefore decoded together.
        Face boxes are part of the span if the detector uses them.

        Raises:
            DataError: the model has no branch for a modality of the row, or its detector needs
                boxes that the row does not have.
        """
        found: dict[Modality, Span] = {}
        uses_boxes = self.sampling.face.detector == "boxes"
        face = sample.media.get("face")
        if uses_boxes and face is not None and not face.face_boxes:
            file, line = sample.source
            raise DataError(
                f"is missing in row '{sample.sample_id}' for {face.path}; add it (that of a "
                "negative is part of face_negative), or choose a sampling.face.detector other than "
                "'boxes'",
                file=file,
                line=line,
                field="face_boxes",
            )
        for modality, ref in sample.media.items():
            if modality not in self._modalities:
                file, line = sample.source
                have = ", ".join(self._modalities) or "no media"
                raise DataError(
                    f"row '{sample.sample_id}' has {modality}, but the model reads {have}; set "
                    "data.modalities to what the model reads",
                    file=file,
                    line=line,
                )
            boxes = face.face_boxes if face and uses_boxes and _same(face, ref) else ()
            found[modality] = Span(ref.path, ref.start, ref.end, boxes)
        return found

    def stream(self, modality: Modality, span: Span) -> Stream:
        """The stream with its keys, computed from the current content of the file.

        Raises:
            MediaError: the file is missing, outside the media root, or cannot be read.
        """
        path, digest = self.digest(span.name)
        known = self._known.get((modality, span))
        if known is not None and known.digest == digest:
            return known
        part = self._part(modality, span)
        # The outcome and the crops have no fingerprint in their keys, so that encoders share them.
        key = feature_key(digest, span.start, span.end, part, self._prints[modality])
        outcome = outcome_key(digest, span.start, span.end, part, self.limits)
        crops = _hash("crops", digest, span.start or 0.0, span.end, part)
        found = Stream(modality, span, path, digest, key, outcome, crops)
        self._known[modality, span] = found
        return found

    @cached_property
    def _with_detector(self) -> SamplingConfig:
        """The sampling config for the workers, with the detector's name resolved to a file path."""
        file = detector_file(self.sampling.face)
        model = None if file is None else str(file)
        face = self.sampling.face.model_copy(update={"model": model})
        return self.sampling.model_copy(update={"face": face})

    def _part(self, modality: Modality, span: Span) -> str:
        if modality == "face" and span.face_boxes:
            return self._edited(modality) + sampling_part(modality, self.sampling, span.face_boxes)
        if modality not in self._parts:  # cached, because it hashes the detector's file
            part = self._edited(modality) + sampling_part(modality, self.sampling)
            self._parts[modality] = part
        return self._parts[modality]

    def _edited(self, modality: Modality) -> str:
        """The edit of this modality, if there is one: an edited sound leaves the picture's key."""
        edit = self.limits.edit
        return edit if edit is not None and concerns(edit, modality) else ""

    def digest(self, name: str) -> tuple[Path, str]:
        """The path of a file and its current digest.

        Raises:
            MediaError: the file is missing, outside the media root, or cannot be read.
        """
        path = self._paths.get(name)
        if path is None:
            path = self._paths[name] = resolve(self.media_root, name)
        try:
            return path, self.digests.of(path)
        except OSError as error:
            self._paths.pop(name)
            message = f"cannot be read ({error.strerror}); check the file and its permissions"
            raise MediaError(name, "missing", message) from error

    def job(self, span: Span, streams: Sequence[Stream]) -> DecodeJob:
        """One decoding job for all ``streams`` of ``span``."""
        want: frozenset[Modality] = frozenset(stream.modality for stream in streams)
        return DecodeJob(
            path=streams[0].path,
            name=span.name,
            want=want,
            sampling=self._with_detector if "face" in want else self.sampling,
            limits=self.limits,
            start=span.start,
            end=span.end,
            face_boxes=span.face_boxes,
        )


class Plan:
    """The streams that a list of samples needs, and the problems with their files."""

    def __init__(self, samples: Sequence[Sample], identifier: Identifier) -> None:
        self.identifier = identifier
        self.wants = [(sample, identifier.spans(sample)) for sample in samples]
        self.names = list(
            dict.fromkeys(span.name for _, spans in self.wants for span in spans.values())
        )
        self.clips = {
            (span.name, span.start, span.end) for _, spans in self.wants for span in spans.values()
        }
        self.streams: dict[tuple[Modality, Span], Stream] = {}
        self.problems: dict[tuple[Modality, Span], MediaError] = {}

    def hash_files(self, rank: int, world_size: int) -> None:
        """Hash this rank's share of the files; the store provides the digests of the others."""
        mine = self.names[rank::world_size]
        with progress("digests", len(mine), unit="files") as bar:
            for name in mine:
                try:
                    self.identifier.digest(name)
                except MediaError as error:
                    bar.note(error.kind)  # counted by identify()
                bar.advance()

    def identify(self) -> None:
        """Compute the key of every stream from the current content of its file."""
        self.streams.clear()
        self.problems.clear()
        for _, spans in self.wants:
            for want in spans.items():
                if want in self.streams or want in self.problems:
                    continue
                try:
                    self.streams[want] = self.identifier.stream(*want)
                except MediaError as error:
                    self.problems[want] = error

    def by_span(self) -> dict[Span, list[Stream]]:
        """Streams to decode together, by span. A feature of several spans is in the first."""
        found: dict[Span, list[Stream]] = {}
        grouped: set[str] = set()
        for (_, span), stream in self.streams.items():
            # Copies of a file share their content and thus the key; it is computed once.
            if stream.key not in grouped:
                grouped.add(stream.key)
                found.setdefault(span, []).append(stream)
        return found


def _same(one: MediaRef, other: MediaRef) -> bool:
    return (one.path, one.start, one.end) == (other.path, other.start, other.end)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(*parts: Any) -> str:
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
