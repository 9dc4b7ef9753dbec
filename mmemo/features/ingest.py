"""Fill the feature store before a stage trains or evaluates, and list every bad clip.

Several processes share the work: each decodes and encodes what it can lock in the store. Errors
that lie in a clip's content are kept with the store, by content and limits. Errors that may be the
machine's fault, such as a timeout, are kept with the run: a resumed run leaves out the same rows,
and another run tries again. All ranks come to the same verdict.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmemo import files
from mmemo.console import Bar, console, progress
from mmemo.data.sample import Modality, Sample
from mmemo.errors import MediaError, TrainingError
from mmemo.features.face_crops import CropCache, to_decode, with_faces
from mmemo.features.journal import Journal
from mmemo.features.keys import DigestMap, Digests, Identifier, Plan, Span, Stream
from mmemo.features.shard import size_of
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.probe import CULPRITS
from mmemo.run_log import RunRecord

if TYPE_CHECKING:  # importing it imports transformers
    from mmemo.models.backbone import Backbone, Features

ATTEMPTS = "attempts.jsonl"
"""File in a run's folder that lists clips that timed out, crashed or changed: these are not tried
again."""
_OK = "ok"
_BATCH = 4  # clips per encoder call, which are in memory at once
_CHUNK = 64  # most clips that are claimed at once, and least parts that the clips are claimed in
_WHOLE_FILE = frozenset({"empty", "not_media", "too_long"})
_RACED = frozenset({"missing", "outside_root", "changed"})  # errors of a name, not of content
_MACHINE = frozenset({"timeout", "crashed", "out_of_memory"})  # may succeed in another run


def bad_outcome(stream: Stream, outcomes: DigestMap, attempts: DigestMap | None = None) -> Any:
    """Why a stream is known to be bad, ``{"kind", "detail"}``, or None.

    Args:
        stream: the stream.
        outcomes: of the store; errors of a clip's content, which hold in every run.
        attempts: of the run; errors that may be the machine's fault.
    """
    # The first key tells what decoding found, the second what this encoder refused.
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
    held: DecodedClip | None = None  # cached face crops


class Filler:
    """Decodes and encodes missing features, together with other processes that do the same."""

    def __init__(
        self, plan: Plan, store: FeatureStore, attempts: Journal, backbone: Backbone, *, keep: bool
    ) -> None:
        self.plan, self.store, self.backbone, self._keep = plan, store, backbone, keep
        self.attempts = attempts
        self._crops = CropCache(store if keep else None)
        self.limits = plan.identifier.limits
        self.new, self.bytes, self._begun = 0, 0, 0
        self.notes = Counter[str]()  # of the clips that this process decoded
        self._bar: Bar | None = None
        self._shown = 0  # clips that the bar has been moved by in this round
        self._retry: deque[_Task] = deque()
        self._decoded: list[_Task] = []
        self._gone: set[str] = set()  # keys of files that were replaced

    def run(self) -> int:
        """Fill the store; returns the number of features that it already held."""
        spans = self.plan.by_span()
        keys = [stream.key for streams in spans.values() for stream in streams]
        reused = len(keys) - len(self.store.missing(keys)) if self._keep else 0
        # Declared before anything is written: eviction for new features must not hit these.
        self.store.need(keys)
        todo = self._left(spans)
        if not todo:
            return reused
        with progress("features", len(todo), unit="clips") as bar, DecodePool(self.limits) as pool:
            self._bar = bar
            try:
                while todo or self._retry:
                    worked = self._round(pool, todo)
                    left = self._left(todo)
                    self._show(len(todo) - len(left) - self._shown)
                    self._shown = 0
                    todo = left
                    if todo and not worked:
                        self._wait(todo, bar)
            finally:
                self.store.flush()
                self.store.release()
        return reused

    def _round(self, pool: DecodePool, todo: dict[Span, list[Stream]]) -> bool:
        """Do the work that can be locked; returns whether there was any."""
        sent: deque[_Task] = deque()
        before = self._begun
        # _jobs fills `sent` as the pool reads it; results come in that order, so both stay in step.
        results: Iterable[DecodedClip | BadClip] = pool.map(self._jobs(todo, sent))
        for result in results:
            self._take(sent.popleft(), result)
        self._encode()
        self.store.flush()
        return self._begun > before

    def _show(self, clips: int) -> None:
        """Move the bar by clips that are done, here or by another process."""
        if self._bar is not None:
            self._bar.advance(clips)
            self._shown += clips

    def _wait(self, todo: dict[Span, list[Stream]], bar: Bar) -> None:
        bar.note("waiting for other processes")
        self.store.wait([stream.key for streams in todo.values() for stream in streams], 2.0)
        bar.note("")

    def _left(self, spans: dict[Span, list[Stream]]) -> dict[Span, list[Stream]]:
        self.store.missing(())  # reads what other processes wrote
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
        # A bad stream is settled too: retrying it would keep every process waiting for its feature.
        if stream.key in self._gone or bad_outcome(stream, self.store.outcomes, self.attempts):
            return True
        if self._keep and self.store.has(stream.key):
            return True
        # Without room for features, a clip is done once it has been decoded successfully.
        return not self._encodes and self.store.outcomes.get(stream.outcome) == _OK

    @property
    def _encodes(self) -> bool:
        """False once needed features fill the store: the rest is then only checked, once."""
        return self._keep and not self.store.full

    def _jobs(self, todo: dict[Span, list[Stream]], sent: deque[_Task]) -> Iterator[DecodeJob]:
        """Claim some clips at a time, so that processes share the work evenly."""
        while self._retry:
            yield from self._send(self._retry.popleft(), sent)
        spans, at = list(todo.items()), 0
        while at < len(spans):
            # Each claim costs a look at the other processes; small ones share the end evenly.
            step = max(2, self.limits.workers, min(_CHUNK, (len(spans) - at) // _CHUNK))
            chunk = spans[at : at + step]
            at += step
            mine = set(self.store.claim([s.key for _, streams in chunk for s in streams]))
            self._refresh()  # what another process settled before it released its locks
            for span, streams in chunk:
                claimed = [stream for stream in streams if stream.key in mine]
                work = [stream for stream in claimed if not self._settled(stream)]
                # Others would wait for these, although nobody computes them.
                self.store.release(s.key for s in claimed if s not in work)
                if all(map(self._settled, streams)):
                    self._show(1)
                if work:
                    task = _Task(span, work, held=self._crops.find(work))
                    yield from self._send(task, sent)

    def _send(self, task: _Task, sent: deque[_Task]) -> Iterator[DecodeJob]:
        """Request the decode that is needed: none for a face whose crops are cached."""
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
        self.notes.update(result.notes)
        if result.digest != task.streams[0].digest:
            if not self._rekey(task, result.digest):
                return
            if task.held is not None:  # the cached crops are those of the old file
                self._retry.append(_Task(task.span, task.streams))
                return
        # Crops that came from the cache are in it already.
        if task.held is None:
            self._crops.keep(task.streams, result)
        self._collect(task, with_faces(result, task.held))

    def _collect(self, task: _Task, clip: DecodedClip | None) -> None:
        task.clip = clip
        self._decoded.append(task)
        if len(self._decoded) >= _BATCH:
            self._encode()

    def _rekey(self, task: _Task, digest: str) -> bool:
        """The file was replaced after it was hashed: use the keys of the decoded content, provided
        that the file has not changed again."""
        identifier, name = self.plan.identifier, task.span.name
        try:
            new = [identifier.stream(stream.modality, task.span) for stream in task.streams]
            # The keys come from the file as it is now, the arrays from the file as it was decoded.
            if new[0].digest != digest:
                detail = "keeps changing while it is read; start again when it is whole"
                raise MediaError(name, "changed", detail)
        except MediaError as error:
            self._fail(task, BadClip(name, error.kind, error.detail))
            return False
        self.store.release([stream.key for stream in task.streams])
        # The old keys can never be made any more, and would keep the loop of run() waiting.
        self._gone.update(stream.key for stream in task.streams)
        for stream in new:
            self.plan.streams[stream.modality, task.span] = stream
        task.streams = new
        return True

    def _fail(self, task: _Task, bad: BadClip) -> None:
        """Record a failure for the streams that caused it: a file without sound has good frames."""
        wanted = {stream.modality for stream in task.streams}
        blamed = CULPRITS.get(bad.kind, frozenset()) & wanted
        # Where nothing tells the streams apart, all of them are to blame.
        single = len(task.streams) == 1 or bad.kind in _WHOLE_FILE | _RACED
        if single or (not blamed and bad.kind in CULPRITS):
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
            # The culprit is unknown, so each stream is decoded alone: a good one must not be lost.
            self._retry.extend(_Task(task.span, [stream]) for stream in rest)
        # Outcomes are written before the locks go: whoever locks next must find them.
        self.store.outcomes.flush()
        self.attempts.flush()
        self.store.release(s.key for s in task.streams if s.modality in blamed)

    def _encode(self) -> None:
        """Run the encoders on the decoded clips and store their features."""
        tasks, self._decoded = self._decoded, []
        self._show(len(tasks))
        for modality in self.backbone.modalities:
            pairs = [
                (stream, task.clip)
                for task in tasks
                for stream in task.streams
                if stream.modality == modality and task.clip is not None
            ]
            if pairs and self._encodes:
                self._run_encoder(modality, pairs)
            for stream, clip in pairs:
                self.store.outcomes.set(stream.outcome, _OK)
                if modality == "face" and clip.faces is not None:
                    found = clip.faces.found
                    self.store.outcomes.set(stream.crops, [int(found.sum()), len(found)])
        if not self._encodes:
            # Nothing is put into the store any more, so no flush of a shard releases these locks.
            self.store.outcomes.flush()
            self.store.release(stream.key for task in tasks for stream in task.streams)

    def _run_encoder(self, modality: Modality, pairs: list[tuple[Stream, DecodedClip]]) -> None:
        try:
            made = self.backbone.encode(modality, [clip for _, clip in pairs])
        except MediaError as error:
            if len(pairs) > 1:  # find the one that the encoder refuses
                for pair in pairs:
                    self._run_encoder(modality, [pair])
            else:
                self._refuse(pairs[0][0], error.kind, error.detail)
            return
        for (stream, _), features in zip(pairs, made, strict=True):
            self._put(stream, features)

    def _refuse(self, stream: Stream, kind: str, detail: str) -> None:
        """Record that this encoder cannot use the clip; another one may."""
        # Under the feature's key, not the decoding outcome's: another encoder may accept the clip.
        self.store.outcomes.set(stream.key, {"kind": kind, "detail": detail})
        self.store.outcomes.flush()
        self.store.release([stream.key])

    def _put(self, stream: Stream, features: Features) -> None:
        # A NaN in the store would reach every run that shares it.
        if not all_finite(features):
            detail = f"the {stream.modality} encoder returns values that are not finite"
            self._refuse(stream, "decode", detail)
            return
        self.store.put(stream.key, features)
        self.new += 1
        self.bytes += size_of(features)


def all_finite(features: Features) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in features.values())


@dataclass
class IngestReport:
    """The rows that a stage may use, and the work that it took to find out."""

    kept: list[Sample]
    bad: list[BadClip]
    clips: int  # distinct spans of files
    new: int = 0  # features computed by this process
    bytes: int = 0  # size of those, in bytes
    reused: int = 0  # features that were in the store at the start
    face_frames: int = 0  # frames in which a face was looked for
    faceless: int = 0  # those without one, which are kept whole
    notes: dict[str, int] = field(default_factory=dict[str, int])  # odd sounds decoded here
    seconds: float = 0.0
    bad_list: Path = field(default_factory=Path)

    @property
    def kinds(self) -> dict[str, int]:
        """Bad clips by kind."""
        return dict(sorted(Counter(clip.kind for clip in self.bad).items()))


def noop() -> None:
    """The barrier of a single process."""


def ensure_features(
    samples: Sequence[Sample],
    backbone: Backbone,
    store: FeatureStore | None,
    *,
    media_root: Path,
    limits: DecodeConfig,
    record: RunRecord,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = noop,
) -> IngestReport:
    """Fill the store with the features of ``samples``, and leave out the rows of bad clips.

    Ranks share the work by locks in the store. All keep the same samples: those without a clip in
    the first rank's ``out_dir/bad_clips.jsonl``. Without a store every clip is still decoded once,
    so that the rows that are left out do not depend on the store.

    Raises:
        TrainingError: the share of bad clips exceeds ``limits.max_bad_share``.
        DataError: a row has a modality that the model has no branch for.
        StoreError: the store cannot be written.
    """
    started = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    held = store or FeatureStore(StoreConfig(path=str(out_dir / "clip_check"), crops_gb=0))
    plan = Plan(samples, Identifier(backbone, media_root, limits, Digests(held.digests)))
    plan.hash_files(rank, world_size)
    held.flush()
    barrier()
    held.digests.refresh()
    plan.identify()
    attempts = held.journal(out_dir / ATTEMPTS)
    filler = Filler(plan, held, attempts, backbone, keep=store is not None)
    reused = filler.run()
    barrier()
    path = out_dir / "bad_clips.jsonl"
    if rank == 0:
        _write_bad(path, _verdict(plan, held, attempts))
    barrier()
    bad = _read_bad(path)
    frames, found = _faces(plan, held)
    dropped = {name for clip in bad for name in clip.sample_ids}
    report = IngestReport(
        kept=[sample for sample in samples if sample.sample_id not in dropped],
        bad=bad,
        clips=len(plan.clips),
        new=filler.new,
        bytes=filler.bytes,
        reused=reused,
        face_frames=frames,
        faceless=frames - found,
        notes=dict(filler.notes),
        seconds=time.monotonic() - started,
        bad_list=path,
    )
    _record(report, record, len(samples), held)
    _check_share(report, limits, attempts if rank == 0 else None)
    return report


def _faces(plan: Plan, store: FeatureStore) -> tuple[int, int]:
    """The number of frames in which a face was searched, and in which one was found."""
    store.outcomes.refresh()
    keys = {stream.crops for stream in plan.streams.values() if stream.modality == "face"}
    counts: list[Any] = [count for key in keys if (count := store.outcomes.get(key))]
    return sum(count[1] for count in counts), sum(count[0] for count in counts)


def _verdict(plan: Plan, store: FeatureStore, attempts: Journal) -> list[BadClip]:
    """The bad clips, in the order of the samples."""
    store.outcomes.refresh()
    attempts.refresh()
    # A file may have been replaced while the store was filled.
    plan.identify()
    reasons: dict[Span, tuple[str, str]] = {}
    users: dict[Span, list[str]] = {}
    for sample, spans in plan.wants:
        for want in spans.items():
            reason = _reason(plan, want, store, attempts)
            if reason is not None:
                place = Span(want[1].name, want[1].start, want[1].end)
                reasons.setdefault(place, reason)
                names = users.setdefault(place, [])
                if sample.sample_id not in names:
                    names.append(sample.sample_id)
    return [
        BadClip(span.name, kind, f"{detail}{span.label}", tuple(users[span]))
        for span, (kind, detail) in reasons.items()
    ]


def _reason(
    plan: Plan, want: tuple[Modality, Span], store: FeatureStore, attempts: Journal
) -> tuple[str, str] | None:
    problem = plan.problems.get(want)
    if problem is not None:
        return problem.kind, problem.detail
    stream = plan.streams[want]
    outcome: Any = bad_outcome(stream, store.outcomes, attempts)
    return None if outcome is None else (str(outcome["kind"]), str(outcome["detail"]))


def _write_bad(path: Path, bad: Sequence[BadClip]) -> None:
    # One rank writes this list for all, because every rank has to train on the same rows.
    files.write_rows(path, (clip.row() for clip in bad), ensure_ascii=False)


def _read_bad(path: Path) -> list[BadClip]:
    return [
        BadClip(row["path"], row["kind"], row["detail"], tuple(row["sample_ids"]))
        for row in files.read_rows(path)
    ]


def _record(report: IngestReport, record: RunRecord, rows: int, store: FeatureStore) -> None:
    stats = store.stats()
    for clip in report.bad:
        record.event(
            "bad_clip",
            path=clip.path,
            reason=clip.kind,
            detail=clip.detail,
            sample_ids=list(clip.sample_ids),
        )
    record.event(
        "ingest",
        clips=report.clips,
        rows=rows,
        rows_left_out=rows - len(report.kept),
        bad=report.kinds,
        bad_list=str(report.bad_list),
        new=report.new,
        reused=report.reused,
        face_frames=report.face_frames,
        frames_without_a_face=report.faceless,
        notes=report.notes,
        bytes=report.bytes,
        seconds=round(report.seconds, 3),
        damaged_shards=list(stats.damaged),
        not_kept=stats.dropped,
    )
    if report.notes:
        counts = ", ".join(f"{count} {note}" for note, count in report.notes.items())
        console.print(f"Odd sounds: {counts}; mmemo check --probe names the clips.")


def retry_hint(bad: Sequence[BadClip]) -> str | None:
    """Advice about clips whose failure may be the machine's fault, or None."""
    if not any(clip.kind in ("timeout", "out_of_memory", "crashed", "changed") for clip in bad):
        return None
    return (
        "clips that timed out, crashed or changed are tried again by the next run; decode.timeout "
        "and memory_mb give them more room"
    )


def _check_share(report: IngestReport, limits: DecodeConfig, attempts: Journal | None) -> None:
    share = len(report.bad) / max(1, report.clips)
    if share <= limits.max_bad_share:
        return
    if attempts is not None:  # nothing is built on them yet: the next start tries again
        attempts.path.unlink(missing_ok=True)
    first = "; ".join(f"{clip.path}: {clip.kind}: {clip.detail}" for clip in report.bad[:3])
    hint = retry_hint(report.bad)
    raise TrainingError(
        f"{len(report.bad)} of {report.clips} clips ({share:.1%}) cannot be used, more than "
        f"decode.max_bad_share allows ({limits.max_bad_share:.1%}): {first}; the whole list is in "
        f"{report.bad_list}: repair or remove these clips, or raise decode.max_bad_share"
        + (f"; {hint}" if hint else "")
    )
