"""Before a stage trains or evaluates: every feature is in the store, every bad clip is named.

What a decode says about a clip's content is kept with the store, by content and limits. What may
have been the machine's fault, such as a timeout, is kept with the run: a run that is resumed leaves
out the same rows, and another run tries again. All ranks come to the same verdict.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemo.data.sample import Modality, Sample
from mmemo.errors import TrainingError
from mmemo.media.clip import BadClip
from mmemo.media.config import DecodeConfig
from mmemo.media.fill import Filler, bad_outcome
from mmemo.media.identity import Digests, Identifier, Plan, Span
from mmemo.media.journal import Journal
from mmemo.media.store import FeatureStore, StoreConfig
from mmemo.record import RunRecord

if TYPE_CHECKING:  # importing it imports transformers
    from mmemo.models.backbone import Backbone


ATTEMPTS = "attempts.jsonl"
"""In a run's folder: the clips that timed out, crashed or changed, which are not tried again."""


@dataclass
class IngestReport:
    """What a stage may use, and what it cost to know."""

    kept: list[Sample]
    bad: list[BadClip]
    clips: int  # distinct spans of files
    new: int = 0  # features computed by this process
    bytes: int = 0  # size of those, in bytes
    reused: int = 0  # features that were in the store at the start
    face_frames: int = 0  # frames in which a face was looked for
    faceless: int = 0  # those of them without one, which are kept whole
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
    """Fill the store with all that ``samples`` need, and leave out the rows of bad clips.

    Ranks share the work by claims in the store and end with the same kept samples: those that
    the first rank's ``out_dir/bad_clips.jsonl`` leaves. Without a store every clip is still
    decoded once, so that what is left out does not depend on the store.

    Raises:
        TrainingError: a larger share of the clips is bad than ``limits.max_bad_share``.
        DataError: a row has a modality that the model has no branch for.
        StoreError: the store cannot be written.
    """
    started = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    held = store or FeatureStore(StoreConfig(path=str(out_dir / "clip_check"), crops_gb=0))
    identifier = Identifier(backbone, media_root, limits, Digests(held.digests))
    plan = Plan(samples, identifier)
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
        seconds=time.monotonic() - started,
        bad_list=path,
    )
    _record(report, record, len(samples), held)
    _check_share(report, limits, attempts if rank == 0 else None)
    return report


def _faces(plan: Plan, store: FeatureStore) -> tuple[int, int]:
    """Frames in which a face was looked for, and in which it was found."""
    store.outcomes.refresh()
    keys = {stream.crops for stream in plan.streams.values() if stream.modality == "face"}
    counts: list[Any] = [count for key in keys if (count := store.outcomes.get(key))]
    return sum(count[1] for count in counts), sum(count[0] for count in counts)


def _verdict(plan: Plan, store: FeatureStore, attempts: Journal) -> list[BadClip]:
    """The bad clips, in the order in which the samples name them."""
    store.outcomes.refresh()
    attempts.refresh()
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
    temporary = path.with_suffix(f".tmp-{os.getpid()}")  # fillers may share the folder
    with temporary.open("w", encoding="utf-8") as handle:
        for clip in bad:
            handle.write(json.dumps(clip.row(), ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def _read_bad(path: Path) -> list[BadClip]:
    rows: list[Any] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        BadClip(row["path"], row["kind"], row["detail"], tuple(row["sample_ids"])) for row in rows
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
        bytes=report.bytes,
        seconds=round(report.seconds, 3),
        damaged_shards=list(stats.damaged),
        not_kept=stats.dropped,
    )


def retry_hint(bad: Sequence[BadClip]) -> str | None:
    """What to do about clips whose failure may have been the machine's, not theirs."""
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
        f"{report.bad_list}: mend or remove these clips, or raise decode.max_bad_share"
        + (f"; {hint}" if hint else "")
    )
