"""Estimate the size of the feature store, and the time to fill it, from a few clips."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmemo.console import progress
from mmemo.data.sample import Modality, Sample
from mmemo.errors import MediaError
from mmemo.features.face_crops import pack
from mmemo.features.ingest import bad_outcome
from mmemo.features.keys import Digests, Identifier, MemoryMap, Plan, Span, Stream
from mmemo.features.shard import size_of
from mmemo.features.store import FeatureStore
from mmemo.media.clip import BadClip
from mmemo.media.config import DecodeConfig
from mmemo.media.decode_pool import DecodePool

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Backbone


@dataclass
class Forecast:
    """The estimated cost of filling the store, from ``probed`` clips. Sizes are in bytes."""

    clips: int
    known: int  # features that the store already holds
    new: int  # features that would be computed
    bytes: int = 0
    seconds: float = 0.0
    probed: int = 0
    by_modality: dict[Modality, int] = field(default_factory=dict[Modality, int])
    crop_bytes: int = 0  # size of all face crops that the store lacks
    bad: dict[Span, BadClip] = field(default_factory=dict[Span, BadClip])  # among the probed clips


def forecast(
    samples: Sequence[Sample],
    backbone: Backbone,
    store: FeatureStore | None,
    *,
    media_root: Path,
    limits: DecodeConfig,
    probe: int = 8,
) -> Forecast:
    """Encode a few clips and extrapolate. Nothing is written.

    The probed clips are evenly spread over the sizes of the files, which correlate with their
    durations, so features that grow with time (audio) are counted at their mean length.
    """
    # A forecast writes nothing, so new digests stay in memory.
    digests = Digests(MemoryMap(None if store is None else store.digests))
    plan = Plan(samples, Identifier(backbone, media_root, limits, digests))
    plan.hash_files(0, 1)
    plan.identify()
    spans = plan.by_span()
    keys = [stream.key for streams in spans.values() for stream in streams]
    lacking = set(keys if store is None else store.missing(keys))
    known_bad = {
        stream.key
        for streams in spans.values()
        for stream in streams
        if store is not None and bad_outcome(stream, store.outcomes) is not None
    }
    todo = {
        span: [stream for stream in streams if stream.key in lacking - known_bad]
        for span, streams in spans.items()
    }
    todo = {span: streams for span, streams in todo.items() if streams}
    result = Forecast(len(plan.clips), len(keys) - len(lacking), sum(map(len, todo.values())))
    if todo:
        each = _measure(result, todo, plan.identifier, backbone, probe)
        crops = [s.crops for streams in todo.values() for s in streams if s.modality == "face"]
        if store is not None and store.crops is not None:
            crops = store.crops.missing(crops)
        result.crop_bytes = round(each * len(crops))
    return result


def _measure(
    result: Forecast,
    todo: dict[Span, list[Stream]],
    identifier: Identifier,
    backbone: Backbone,
    probe: int,
) -> float:
    """Fill in ``result`` and return the mean size of a clip's face crops."""
    by_size = sorted(todo, key=lambda span: (todo[span][0].path.stat().st_size, span.name))
    step = max(1.0, len(by_size) / probe)
    # The middle of each part stands for it; the ends would give the extremes too much weight.
    chosen = [by_size[int((i + 0.5) * step)] for i in range(min(probe, len(by_size)))]
    sizes: defaultdict[Modality, list[int]] = defaultdict(list)
    crops: list[int] = []
    with DecodePool(identifier.limits) as pool, progress("sample", len(chosen)) as bar:
        jobs = [identifier.job(span, todo[span]) for span in chosen]
        started = time.monotonic()
        for span, clip in zip(chosen, pool.map(jobs), strict=True):
            bar.advance()
            if isinstance(clip, BadClip):
                result.bad[_plain(span)] = clip
                continue
            try:
                for stream in todo[span]:
                    features = backbone.encode(stream.modality, [clip])[0]
                    sizes[stream.modality].append(size_of(features))
            except MediaError as error:  # the encoder cannot use the clip
                result.bad[_plain(span)] = BadClip(span.name, error.kind, error.detail)
            if clip.faces is not None:
                crops.append(size_of(pack(clip)))
        result.seconds = (time.monotonic() - started) / len(chosen) * len(todo)
    result.probed = len(chosen)
    counts = Counter(stream.modality for streams in todo.values() for stream in streams)
    for modality, measured in sizes.items():
        mean = sum(measured) / len(measured)
        result.by_modality[modality] = round(mean * counts[modality])
    result.bytes = sum(result.by_modality.values())
    return sum(crops) / max(1, len(crops))


def _plain(span: Span) -> Span:
    return Span(span.name, span.start, span.end)
