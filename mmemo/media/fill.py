"""Fills the store: decodes and encodes what is missing, in step with other processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmemo.console import Bar, progress
from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.crops import CropCache, to_decode, with_faces
from mmemo.media.identity import DigestMap, Plan, Span, Stream
from mmemo.media.journal import Journal
from mmemo.media.shard import size_of
from mmemo.media.store import FeatureStore
from mmemo.media.worker import DecodePool

if TYPE_CHECKING:  # importing it imports transformers
    from mmemo.models.backbone import Backbone, Features

_OK = "ok"
_BATCH = 4  # clips per encode: what is in memory at once
_CULPRITS: dict[str, frozenset[Modality]] = {
    "no_audio": frozenset({"audio"}),
    "no_video": frozenset({"video", "face"}),
    "no_frames": frozenset({"video", "face"}),
}
_WHOLE_FILE = frozenset({"empty", "not_media", "too_long"})
_RACED = frozenset({"missing", "outside_root", "changed"})  # about a name, not about content
_MACHINE = frozenset({"timeout", "crashed", "out_of_memory"})  # may succeed another time


def bad_outcome(stream: Stream, outcomes: DigestMap, attempts: DigestMap | None = None) -> Any:
    """Why a stream is known to be bad, ``{"kind", "detail"}``, or None.

    Args:
        outcomes: the store's; what lies in a clip's content stays true in every run.
        attempts: the run's own; what may have been the machine's fault, or the moment's.
    """
    for key in (stream.outcome, stream.key):
        found = outcomes.get(key)
        if isinstance(found, dict) and found["kind"] not in _MACHINE:
            return found
    if attempts is None:
        return None
    return attempts.get(stream.outcome) or attempts.get(_by_name(stream.span))


def _by_name(span: Span) -> str:
    return f"file {span.name}"


@dataclass
class _Task:
    span: Span
    streams: list[Stream]
    clip: DecodedClip | None = None
    held: DecodedClip | None = None  # with the face crops that the store keeps


class Filler:
    """Decodes and encodes what is missing, in step with other processes that do the same."""

    def __init__(
        self, plan: Plan, store: FeatureStore, attempts: Journal, backbone: Backbone, *, keep: bool
    ) -> None:
        self.plan, self.store, self.backbone, self._keep = plan, store, backbone, keep
        self.attempts = attempts
        self._crops = CropCache(store if keep else None)
        self.limits = plan.identifier.limits
        self.new, self.bytes, self._begun = 0, 0, 0
        self._retry: deque[_Task] = deque()
        self._decoded: list[_Task] = []
        self._gone: set[str] = set()  # keys of files that were replaced

    def run(self) -> int:
        """Returns the number of features that were there already."""
        spans = self.plan.by_span()
        keys = [stream.key for streams in spans.values() for stream in streams]
        reused = len(keys) - len(self.store.missing(keys)) if self._keep else 0
        self.store.need(keys)
        todo = self._left(spans)
        if not todo:
            return reused
        with progress("features", len(todo), unit="clips") as bar, DecodePool(self.limits) as pool:
            try:
                while todo or self._retry:
                    worked = self._round(pool, todo)
                    left = self._left(todo)
                    bar.advance(len(todo) - len(left))
                    todo = left
                    if todo and not worked:
                        self._wait(todo, bar)
            finally:
                self.store.flush()
                self.store.release()
        return reused

    def _round(self, pool: DecodePool, todo: dict[Span, list[Stream]]) -> bool:
        """Do what can be claimed. Returns whether there was anything."""
        sent: deque[_Task] = deque()
        before = self._begun
        results: Iterable[DecodedClip | BadClip] = pool.map(self._jobs(todo, sent))
        for result in results:
            self._take(sent.popleft(), result)
        self._encode()
        self.store.flush()
        return self._begun > before

    def _wait(self, todo: dict[Span, list[Stream]], bar: Bar) -> None:
        bar.note("waiting for other processes")
        self.store.wait([stream.key for streams in todo.values() for stream in streams], 2.0)
        bar.note("")

    def _left(self, spans: dict[Span, list[Stream]]) -> dict[Span, list[Stream]]:
        self.store.missing(())  # take note of what others wrote
        self._refresh()
        left = {
            span: [stream for stream in streams if not self._settled(stream)]
            for span, streams in spans.items()
        }
        return {span: streams for span, streams in left.items() if streams}

    def _refresh(self) -> None:
        self.store.outcomes.refresh()
        self.attempts.refresh()

    def _settled(self, stream: Stream) -> bool:
        if stream.key in self._gone or bad_outcome(stream, self.store.outcomes, self.attempts):
            return True
        if self._keep and self.store.has(stream.key):
            return True
        return not self._encodes and self.store.outcomes.get(stream.outcome) == _OK

    @property
    def _encodes(self) -> bool:
        """When the store is full of needed features, the rest is only checked, once."""
        return self._keep and not self.store.full

    def _jobs(self, todo: dict[Span, list[Stream]], sent: deque[_Task]) -> Iterator[DecodeJob]:
        """Claim a few clips at a time, so that processes share the work evenly."""
        while self._retry:
            yield from self._send(self._retry.popleft(), sent)
        spans = list(todo.items())
        step = max(2, self.limits.workers)
        for at in range(0, len(spans), step):
            chunk = spans[at : at + step]
            mine = set(self.store.claim([s.key for _, streams in chunk for s in streams]))
            self._refresh()  # what a process settled before it let go
            for span, streams in chunk:
                claimed = [stream for stream in streams if stream.key in mine]
                work = [stream for stream in claimed if not self._settled(stream)]
                self.store.release(s.key for s in claimed if s not in work)
                if work:
                    task = _Task(span, work, held=self._crops.find(work))
                    yield from self._send(task, sent)

    def _send(self, task: _Task, sent: deque[_Task]) -> Iterator[DecodeJob]:
        """Ask for what is not at hand: nothing when it is a face whose crops are kept."""
        self._begun += 1
        streams = to_decode(task.streams, task.held)
        if streams:
            sent.append(task)
            yield self.plan.identifier.job(task.span, streams)
        else:
            self._collect(task, task.held)

    def _take(self, task: _Task, result: DecodedClip | BadClip) -> None:
        if isinstance(result, BadClip):
            self._fail(task, result)
            return
        if result.digest != task.streams[0].digest:
            if not self._rekey(task, result.digest):
                return
            if task.held is not None:  # the crops are the old file's
                self._retry.append(_Task(task.span, task.streams))
                return
        if task.held is None:
            self._crops.keep(task.streams, result)
        self._collect(task, with_faces(result, task.held))

    def _collect(self, task: _Task, clip: DecodedClip | None) -> None:
        task.clip = clip
        self._decoded.append(task)
        if len(self._decoded) >= _BATCH:
            self._encode()

    def _rekey(self, task: _Task, digest: str) -> bool:
        """The file was replaced after it was hashed: go by what was decoded, if it still is so."""
        identifier, name = self.plan.identifier, task.span.name
        try:
            new = [identifier.stream(stream.modality, task.span) for stream in task.streams]
            if new[0].digest != digest:
                detail = "keeps changing while it is read; start again when it is whole"
                raise MediaError(name, "changed", detail)
        except MediaError as error:
            self._fail(task, BadClip(name, error.kind, error.detail))
            return False
        self.store.release([stream.key for stream in task.streams])
        self._gone.update(stream.key for stream in task.streams)
        for stream in new:
            self.plan.streams[stream.modality, task.span] = stream
        task.streams = new
        return True

    def _fail(self, task: _Task, bad: BadClip) -> None:
        """Find which streams of a clip are to blame: a file without sound has good frames."""
        wanted = {stream.modality for stream in task.streams}
        blamed = _CULPRITS.get(bad.kind, frozenset()) & wanted
        single = len(task.streams) == 1 or bad.kind in _WHOLE_FILE | _RACED
        if single or (not blamed and bad.kind in _CULPRITS):
            blamed = frozenset(wanted)
        outcome = {"kind": bad.kind, "detail": bad.detail}
        for stream in task.streams:
            if stream.modality in blamed:
                if bad.kind in _RACED:
                    self.attempts.set(_by_name(task.span), outcome)
                elif bad.kind in _MACHINE:
                    self.attempts.set(stream.outcome, outcome)
                else:
                    self.store.outcomes.set(stream.outcome, outcome)
        rest = [stream for stream in task.streams if stream.modality not in blamed]
        if blamed:
            if rest:
                self._retry.append(_Task(task.span, rest))
        else:
            self._retry.extend(_Task(task.span, [stream]) for stream in rest)
        self.store.outcomes.flush()
        self.attempts.flush()
        self.store.release(s.key for s in task.streams if s.modality in blamed)

    def _encode(self) -> None:
        """Run the towers on the clips that are decoded, and put what they give."""
        tasks, self._decoded = self._decoded, []
        for modality in self.backbone.modalities:
            pairs = [
                (stream, task.clip)
                for task in tasks
                for stream in task.streams
                if stream.modality == modality and task.clip is not None
            ]
            if pairs and self._encodes:
                self._run_tower(modality, pairs)
            for stream, clip in pairs:
                self.store.outcomes.set(stream.outcome, _OK)
                if modality == "face" and clip.faces is not None:
                    found = clip.faces.found
                    self.store.outcomes.set(stream.crops, [int(found.sum()), len(found)])
        if not self._encodes:
            self.store.outcomes.flush()
            self.store.release(stream.key for task in tasks for stream in task.streams)

    def _run_tower(self, modality: Modality, pairs: list[tuple[Stream, DecodedClip]]) -> None:
        try:
            made = self.backbone.encode(modality, [clip for _, clip in pairs])
        except MediaError as error:
            if len(pairs) > 1:  # find the one that the tower refuses
                for pair in pairs:
                    self._run_tower(modality, [pair])
            else:
                self._refuse(pairs[0][0], error.kind, error.detail)
            return
        for (stream, _), features in zip(pairs, made, strict=True):
            self._put(stream, features)

    def _refuse(self, stream: Stream, kind: str, detail: str) -> None:
        """This tower cannot use the clip; another may."""
        self.store.outcomes.set(stream.key, {"kind": kind, "detail": detail})
        self.store.outcomes.flush()
        self.store.release([stream.key])

    def _put(self, stream: Stream, features: Features) -> None:
        if not all_finite(features):
            detail = f"the {stream.modality} tower gives values that are not finite"
            self._refuse(stream, "decode", detail)
            return
        self.store.put(stream.key, features)
        self.new += 1
        self.bytes += size_of(features)


def all_finite(features: Features) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in features.values())
