"""The media part of ``mmemo check``.

It tells which clips a run would leave out or would stop for, and what is odd about the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmemo.check.notes import LENGTH, MediaNote, length_notes, sound_notes, stream_notes
from mmemo.check.view import show_bad, show_media, show_notes
from mmemo.console import console, progress
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MODALITIES, Modality, Sample
from mmemo.errors import MediaError
from mmemo.features.keys import Digests, Identifier, MemoryMap, Plan, Span
from mmemo.media.clip import BadClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig, StoreConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.probe import (
    CULPRITS,
    DEFAULT_SAMPLING,
    MediaInfo,
    need_span,
    need_streams,
)

_FORECAST_CLIPS = 64
_GLANCED = 64
"""Files that are read for notes where not all are."""
_GLANCED_BYTES = 100_000_000
"""Larger ones are not read for that, because each would take seconds."""


@dataclass
class MediaCheck:
    """The clips of some rows. As everywhere, a clip is one span of one file."""

    data: DataConfig
    samples: Sequence[Sample]
    limits: DecodeConfig
    bad: list[BadClip] = field(default_factory=list[BadClip])
    title: str = ""
    sampling: SamplingConfig = DEFAULT_SAMPLING
    notes: list[MediaNote] = field(default_factory=list[MediaNote])

    def __post_init__(self) -> None:
        self._users: dict[Span, dict[str, set[Modality]]] = {}  # span -> row -> its streams
        for sample in self.samples:
            for modality, ref in sample.media.items():
                users = self._users.setdefault(Span(ref.path, ref.start, ref.end), {})
                users.setdefault(sample.sample_id, set()).add(modality)

    @property
    def clips(self) -> int:
        """The number of clips."""
        return len(self._users)

    @property
    def kept(self) -> list[Sample]:
        """The rows whose clips are not known to be bad."""
        dropped = {name for clip in self.bad for name in clip.sample_ids}
        return [sample for sample in self.samples if sample.sample_id not in dropped]

    def files(self, *, probe: bool) -> None:
        """Look for every file. With ``probe``, also read it and compare it with what rows ask for.

        Raises:
            MediaError: more clips cannot be used than a run allows.
        """
        # A file with many spans is looked for, and read, only once.
        names = list(dict.fromkeys(span.name for span in self._users))
        glanced = names if probe else names[:: math.ceil(len(names) / _GLANCED) or 1]
        found: dict[str, MediaInfo | MediaError | None] = {}
        with progress("probe" if probe else "files", len(names)) as bar:
            for name in names:
                found[name] = self._file(name, probe)
                bar.advance()
        windows: dict[Span, tuple[float, float]] = {}
        for span in self._users:
            try:
                window = self._demand(span, found[span.name])
            except MediaError as error:
                self._add(span, error.kind, error.detail)
            else:
                if window is not None:
                    windows[span] = window
        there = sum(not isinstance(result, MediaError) for result in found.values())
        show_media(len(self.samples), self.clips, there, len(names), probed=probe)
        if probe:
            self._listen(windows)
        else:
            windows, found = self._glance(glanced)
        self._note(windows, found)
        show_notes(self.notes, len(windows), probed=probe)
        show_bad(self.bad)
        self._refuse()

    def _file(self, name: str, probe: bool) -> MediaInfo | MediaError | None:
        from mmemo.media.paths import resolve
        from mmemo.media.probe import probe as read_streams

        try:
            path = resolve(Path(self.data.media_root), name)
            return read_streams(path, name, self.sampling) if probe else None
        except MediaError as error:
            return error

    def _glance(
        self, names: Sequence[str]
    ) -> tuple[dict[Span, tuple[float, float]], dict[str, MediaInfo | MediaError | None]]:
        """The windows of some files' clips, and the files. Errors are left to those who decode."""
        from mmemo.media.paths import resolve

        root = Path(self.data.media_root)
        found: dict[str, MediaInfo | MediaError | None] = {}
        for name in names:
            with suppress(MediaError, OSError):
                if resolve(root, name).stat().st_size <= _GLANCED_BYTES:
                    found[name] = self._file(name, probe=True)
        windows: dict[Span, tuple[float, float]] = {}
        for span in self._users:
            with suppress(MediaError):
                window = self._demand(span, found.get(span.name))
                if window is not None:
                    windows[span] = window
        return windows, found

    def _listen(self, windows: dict[Span, tuple[float, float]]) -> None:
        """Decode the sound of every clip that rows listen to. Clips that fail leave ``windows``."""
        from mmemo.media.paths import resolve

        root = Path(self.data.media_root)
        spans = [span for span in windows if "audio" in self._wanted(span)]
        jobs = [
            DecodeJob(
                path=resolve(root, span.name),
                name=span.name,
                want=frozenset({"audio"}),
                sampling=self.sampling,
                limits=self.limits,
                start=span.start,
                end=span.end,
            )
            for span in spans
        ]
        if not jobs:
            return
        with DecodePool(self.limits) as pool, progress("sound", len(jobs), unit="clips") as bar:
            for span, result in zip(spans, pool.map(jobs), strict=True):
                if isinstance(result, BadClip):
                    self._add(span, result.kind, result.detail)
                    del windows[span]
                else:
                    self._keep_notes(span, sound_notes(result.notes))
                bar.advance()

    def _note(
        self,
        windows: Mapping[Span, tuple[float, float]],
        found: Mapping[str, MediaInfo | MediaError | None],
    ) -> None:
        for span, window in windows.items():
            info = found[span.name]
            if isinstance(info, MediaInfo):
                self._keep_notes(span, stream_notes(info, window, self._wanted(span)))
        lengths = {span: end - start for span, (start, end) in windows.items()}
        for span, detail in length_notes(lengths).items():
            self._keep_notes(span, [(LENGTH, detail)])

    def _keep_notes(self, span: Span, notes: Iterable[tuple[str, str]]) -> None:
        ids = tuple(self._users[span])
        for kind, detail in notes:
            self.notes.append(MediaNote(kind, span.name, detail, span.start, span.end, ids))

    def _demand(
        self, span: Span, found: MediaInfo | MediaError | None
    ) -> tuple[float, float] | None:
        """The clip's start and end in its file, or None if the file has not been read."""
        if isinstance(found, MediaError):
            raise found
        if found is None:
            return None
        video, audio = found.video is not None, found.audio is not None
        try:
            need_streams(span.name, self._wanted(span), video=video, audio=audio)
        except MediaError as error:
            track = {"no_video": "video_track", "no_audio": "audio_track"}[error.kind]
            asked = getattr(self.sampling, track)
            if asked is None:
                raise
            detail = f"has no {track.replace('_', ' ')} '{asked}'; correct sampling.{track}"
            raise MediaError(span.name, error.kind, detail) from error
        most = self.limits.max_seconds
        return need_span(span.name, span.start, span.end, found.duration, most)

    def _wanted(self, span: Span) -> set[Modality]:
        return set[Modality]().union(*self._users[span].values())

    def try_some(self, backbone: Any, store: StoreConfig) -> int:
        """Decode and encode a few of the clips that are not known to be bad. Nothing is written.

        Returns:
            Bytes that the features of all clips, with their face crops, need in a store.

        Raises:
            MediaError: more clips cannot be used than a run allows.
            DataError: a row asks for something that the model or its face detector cannot read.
        """
        from mmemo.features.encode import forecast

        root = Path(self.data.media_root)
        # Made for its checks alone, which cover every row; the forecast below sees only a few.
        Plan(self.samples, Identifier(backbone, root, self.limits, Digests(MemoryMap())))
        clips = _distinct(self.kept)
        if not clips:
            return 0
        step = math.ceil(len(clips) / _FORECAST_CLIPS)
        tried = clips[::step]
        found = forecast(tried, backbone, None, media_root=root, limits=self.limits)
        if found.bad:
            for span, clip in found.bad.items():
                self._add(span, clip.kind, clip.detail)
            count = f"{len(found.bad)} of {found.probed} clips that were tried"
            console.print(f"{count} cannot be used; --probe reads them all.", style="yellow")
            show_bad(list(found.bad.values()))
            if len(found.bad) == found.probed:
                self._stop(f"{count} cannot be used")
            self._refuse()
        crops = min(found.crop_bytes, round(store.crops_gb * 1e9))
        return round((found.bytes + crops) * len(clips) / len(tried))

    def _add(self, span: Span, kind: str, detail: str) -> None:
        """Note a bad clip. Rows that do not use the stream that failed are kept."""
        blamed = CULPRITS.get(kind, frozenset(MODALITIES))
        ids = tuple(name for name, wanted in self._users[span].items() if blamed & wanted)
        self.bad.append(BadClip(span.name, kind, detail + span.label, ids))

    def _refuse(self) -> None:
        most, count = self.limits.max_bad_share, len(self.bad)
        if count > most * max(1, self.clips):
            self._stop(
                f"{count} of {self.clips} clips cannot be used, more than decode.max_bad_share="
                f"{most:g} allows; check data.media_root"
            )
        # A high max_bad_share may allow what leaves nothing to train on.
        if count and not self.kept:
            self._stop(f"{count} of {self.clips} clips cannot be used, and no row is left")

    def _stop(self, why: str) -> None:
        first = self.bad[0]
        raise MediaError(first.path, first.kind, f"{first.detail} ({why})")


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    """One sample of each distinct set of streams."""
    found: dict[object, Sample] = {}
    for sample in samples:
        if sample.media:
            found.setdefault(frozenset(sample.media.items()), sample)
    return list(found.values())
