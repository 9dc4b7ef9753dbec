"""Negatives as files: a clip's own stream made worse, or a clip with a stream of another clip.

A file is named by the content and the span of what it is made of and by how it was made, so that
all pairs, runs and stages use it again, and a killed run goes on. ``index.jsonl`` beside the files
has the SHA-256 of each, and what it was made of. Only the streams of a negative are new; the other
streams of the clip's file are copied into it, packet by packet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmemo import content, files
from mmemo.console import progress
from mmemo.data.preference import MEDIA_KINDS, Negative, Side
from mmemo.data.sample import FaceBox, MediaRef, Modality, Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.media.clip import BadClip, DecodeJob
from mmemo.media.config import SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.paths import resolve
from mmemo.media.perturb import Perturbation
from mmemo.media.probe import file_digest
from mmemo.media.rewrite import VERSION, suffix
from mmemo.pairs.config import NegativesConfig, PairsConfig
from mmemo.pairs.rows import PairDraft

INDEX = "index.jsonl"
_TARGET = "mmemo.media.rewrite:rewrite"
_DISPLACED = ("cropped",)  # kinds after which a face is no longer where the row says


@dataclass(frozen=True, slots=True)
class _File:
    """One file to write."""

    name: str
    source: MediaRef
    """What the new streams are made of."""
    want: frozenset[Modality]
    change: Perturbation | None
    base: str | None
    """The file whose other streams are copied."""

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.source.path, self.base or self.source.path)))


@dataclass(slots=True)
class WrittenNegatives:
    """What was written."""

    negatives: list[dict[Side, Negative]] = field(default_factory=list[dict[Side, Negative]])
    """Those of each pair, which name files."""
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Written file -> the files that it was made of, all relative to the media root."""
    failed: list[tuple[Side, Negative, str]] = field(
        default_factory=list[tuple[Side, Negative, str]]
    )
    """Negatives that could not be written, and why."""
    kept: int = 0
    """Files that were there."""


def write_negatives(
    config: PairsConfig, drafts: Sequence[PairDraft], chosen: Sequence[Mapping[Side, Negative]]
) -> WrittenNegatives:
    """Write the files of all negatives, and return the negatives that name them.

    Raises:
        ConfigError: the folder of the files cannot be written to.
    """
    root, made = Path(config.data.media_root), WrittenNegatives()
    plans: list[dict[Side, dict[Modality, _File | None]]] = []
    lost: dict[tuple[int, Side], str] = {}
    for at, (draft, sides) in enumerate(zip(drafts, chosen, strict=True)):
        plans.append({})
        for side, negative in sides.items():
            try:
                plans[at][side] = _files_of(draft.sample, negative, config.negatives, root)
            except MediaError as error:
                lost[at, side] = str(error)
    wanted = {
        one.name: one
        for sides in plans
        for plan in sides.values()
        for one in plan.values()
        if one is not None
    }
    bad, made.kept = _write(config, wanted)
    made.sources = {
        f"{config.negatives.folder}/{name}": one.sources
        for name, one in wanted.items()
        if name not in bad
    }
    for at, sides in enumerate(chosen):
        made.negatives.append({})
        for side, negative in sides.items():
            plan = plans[at].get(side, {})
            failed = [bad[one.name] for one in plan.values() if one and one.name in bad]
            if (at, side) in lost or failed:
                made.failed.append((side, negative, lost.get((at, side)) or failed[0]))
            else:
                made.negatives[at][side] = _named(
                    drafts[at].sample, negative, plan, config.negatives.folder
                )
    return made


def _files_of(
    sample: Sample, negative: Negative, config: NegativesConfig, root: Path
) -> dict[Modality, _File | None]:
    """The file of each stream of a negative; None where another clip's own file serves.

    Raises:
        MediaError: a file that it is made of cannot be found.
    """
    other = negative.kind in MEDIA_KINDS
    media = negative.media if other else sample.media
    refs: dict[Modality, MediaRef] = {m: media[m] for m in negative.modalities}
    groups: dict[MediaRef, set[Modality]] = {}
    for modality, ref in refs.items():
        groups.setdefault(replace(ref, face_boxes=()), set()).add(modality)
    change = None
    if not other:
        change = Perturbation(
            kind=negative.kind,
            seed=negative.seed,
            snr_db=config.snr_db,
            noise_step=config.noise_step,
            blur=config.blur,
            crop_scale=config.crop_scale,
        )
    found: dict[Modality, _File | None] = {}
    for ref, streams in groups.items():
        base = _base(sample, negative, streams)
        one = None if other and base is None else _file(ref, streams, change, base, root)
        found |= dict.fromkeys(streams, one)
    return found


def _base(sample: Sample, negative: Negative, streams: set[Modality]) -> str | None:
    """The clip's own file, if it has further streams to copy. Those of a span cannot be copied:
    packets do not begin and end where it does."""
    own = sample.media[min(streams)]
    rest = [m for m, ref in sample.media.items() if ref.path == own.path]
    if (own.start, own.end) != (None, None) or set(rest) <= set(negative.modalities):
        return None
    return own.path


def _file(
    source: MediaRef,
    streams: set[Modality],
    change: Perturbation | None,
    base: str | None,
    root: Path,
) -> _File:
    want: frozenset[Modality] = frozenset("audio" if m == "audio" else "video" for m in streams)
    paths = [resolve(root, source.path), *([] if base is None else [resolve(root, base)])]
    span = (source.start, source.end)
    try:
        contents = [file_digest(path) for path in paths]
    except OSError as error:
        raise MediaError(source.path, "missing", "cannot be read; check the path") from error
    parts = [
        *(VERSION, contents, span, sorted(want)),
        None if change is None else asdict(change),
    ]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    encoded = change is not None or span != (None, None)
    return _File(f"{name}{suffix(want, paths, encoded=encoded)}", source, want, change, base)


def _write(config: PairsConfig, wanted: Mapping[str, _File]) -> tuple[dict[str, str], int]:
    """Write the files that are not there. Returns why files could not be written, by their names,
    and the number of files that were there."""
    root = Path(config.data.media_root)
    folder = root / config.negatives.folder
    try:
        files.mark_cache(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); negatives at level media need a "
            "media_root that can be written to"
        ) from error
    known = {
        row["file"]: row["sha256"]
        for row in files.read_intact_rows(folder / INDEX)
        if {"file", "sha256"} <= row.keys()
    }
    todo = [
        one
        for name, one in wanted.items()
        if not (folder / name).is_file() or content.sha256(folder / name) != known.get(name)
    ]
    bad: dict[str, str] = {}
    jobs = [_job(one, config, root, folder) for one in todo]
    with (
        progress("negatives", len(wanted), done=len(wanted) - len(todo), unit="files") as bar,
        DecodePool(config.decode, target=_TARGET) as pool,
    ):
        for one, result in zip(todo, pool.map(jobs), strict=True):
            if isinstance(result, BadClip):
                bad[one.name] = f"{result.path}: {result.kind}: {result.detail}"
            else:
                change = None if one.change is None else asdict(one.change)
                row: dict[str, Any] = {"file": one.name, "sha256": result.digest}
                row |= {"sources": list(one.sources), "streams": sorted(one.want)}
                files.append_rows(folder / INDEX, [row | {"change": change}])
            bar.advance()
    return bad, len(wanted) - len(todo)


def _job(one: _File, config: PairsConfig, root: Path, folder: Path) -> DecodeJob:
    ref = one.source
    options: dict[str, Any] = {
        "out": str(folder / one.name),
        "change": None if one.change is None else asdict(one.change),
        "base": None if one.base is None else str(resolve(root, one.base)),
    }
    return DecodeJob(
        path=resolve(root, ref.path),
        name=ref.path,
        want=one.want,
        sampling=SamplingConfig(),
        limits=config.decode,
        start=ref.start,
        end=ref.end,
        options=options,
    )


def _named(
    sample: Sample, negative: Negative, plan: Mapping[Modality, _File | None], folder: str
) -> Negative:
    """The negative, naming its files."""
    media: dict[Modality, MediaRef] = {}
    for modality in negative.modalities:
        one = plan[modality]
        if one is None:
            media[modality] = negative.media[modality]
            continue
        ref = negative.media.get(modality) or sample.media[modality]
        boxes = () if negative.kind in _DISPLACED else ref.face_boxes
        media[modality] = MediaRef(
            f"{folder}/{one.name}", face_boxes=_from(boxes, one.source.start or 0.0)
        )
    return replace(negative, feature_level=False, media=media)


def _from(boxes: Sequence[FaceBox], start: float) -> tuple[FaceBox, ...]:
    """Boxes in a file that begins ``start`` seconds later. The last one before it begins it."""
    before = [replace(box, time=0.0) for box in boxes if box.time < start][-1:]
    return (*before, *(replace(b, time=b.time - start) for b in boxes if b.time >= start))
