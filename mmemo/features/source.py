"""Features of samples for batches: from memory or the store, or else decoded and encoded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mmemo.data.sample import MediaRef, Modality, Sample
from mmemo.errors import MediaError
from mmemo.features.face_crops import CropCache, to_decode, with_faces
from mmemo.features.keys import Digests, Identifier, MemoryMap, Span, Stream
from mmemo.features.shard import size_of
from mmemo.features.store import FeatureStore
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig
from mmemo.media.decode import decode
from mmemo.media.decode_pool import DecodePool

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Backbone, Features

Clip = frozenset[tuple[Modality, MediaRef]]


class FeatureSource:
    """Provides the features of samples, which are identical whether they are stored or recomputed.

    With a store, a feature that is missing (evicted, damaged, or of a file that has changed) is
    recomputed and stored. Without one, every ``get`` decodes and encodes. The returned features may
    be shared, so do not change them in place.

    Args:
        memory_mb: size of the in-memory cache, in units of 10^6 bytes; used with a store only.
        isolate: decode in worker processes, so that a broken file cannot crash this process. False
            decodes in this process, for clips that are known to decode.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        backbone: Backbone,
        store: FeatureStore | None,
        media_root: Path,
        limits: DecodeConfig,
        *,
        memory_mb: float = 256.0,
        isolate: bool = True,
    ) -> None:
        self._samples, self._backbone, self._store = samples, backbone, store
        self._isolate, self._limits = isolate, limits
        digests = Digests(store.digests if store is not None else MemoryMap())
        self._identifier = Identifier(backbone, media_root, limits, digests)
        self._crops = CropCache(store)
        self._memory = _Memory(memory_mb * 1e6 if store is not None else 0)
        self._making = threading.RLock()  # get() and the prefetch thread share encoder and pool
        self._exit = ExitStack()
        self._pool: DecodePool | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._prefetched: dict[Clip, Future[dict[Modality, Features]]] = {}
        self._declared_need = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, sample: Sample) -> dict[Modality, Features]:
        """The features of each modality of the sample.

        Raises:
            MediaError: the file has become unreadable or is gone.
            DataError: the sample has a modality that the model has no branch for.
        """
        prefetched = self._prefetched.pop(frozenset(sample.media.items()), None)
        if prefetched is not None:
            return prefetched.result()
        return self._get_many([sample])[0]

    def get_many(self, samples: Sequence[Sample]) -> list[dict[Modality, Features]]:
        """Like ``get`` for several samples, which are decoded in parallel."""
        return self._get_many(samples)

    def outline(self, sample: Sample) -> dict[Modality, Features]:
        """Like ``get``, but ``x`` of stored features is on torch's meta device, because only its
        shape is read."""
        found: dict[Modality, Features] = {}
        for modality, span in self._identifier.spans(sample).items():
            key = self._identifier.stream(modality, span).key
            features = None if self._store is None else self._store.outline(key)
            if features is None:
                return self._get_many([sample])[0]
            found[modality] = features
        return found

    def keys(self, sample: Sample) -> dict[Modality, str]:
        """The key of each modality's features, computed from the current files.

        Raises:
            MediaError, DataError: as in ``get``.
        """
        wants = self._identifier.spans(sample).items()
        return {want[0]: self._identifier.stream(*want).key for want in wants}

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Load features in a background thread. The next ``get`` of a sample takes the result."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="mmemo-prefetch")
        for sample in samples:
            clip = frozenset(sample.media.items())
            if clip not in self._prefetched:
                self._prefetched[clip] = self._reader.submit(self._one, sample)

    def close(self) -> None:
        """Stop prefetching, end the decoding workers and flush the store."""
        # The reader goes first: it may be decoding in the pool that is closed next.
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None
        self._prefetched.clear()
        self._exit.close()
        self._pool = None
        if self._store is not None:
            self._store.flush()

    def _one(self, sample: Sample) -> dict[Modality, Features]:
        return self._get_many([sample])[0]

    def _get_many(self, samples: Sequence[Sample]) -> list[dict[Modality, Features]]:
        wants = [self._identifier.spans(sample) for sample in samples]
        streams = {
            want: self._identifier.stream(*want) for spans in wants for want in spans.items()
        }
        found: dict[str, Features] = {}
        lost: dict[Span, dict[str, Stream]] = {}
        for (_, span), stream in streams.items():
            if stream.key in found:
                continue
            features = self._look(stream.key)
            if features is None:
                lost.setdefault(span, {})[stream.key] = stream
            else:
                found[stream.key] = features
        if lost:
            found.update(self._make(lost))
        return [{want[0]: found[streams[want].key] for want in spans.items()} for spans in wants]

    def _look(self, key: str) -> Features | None:
        if self._store is None:
            return None
        features = self._memory.get(key)
        if features is None:
            features = self._store.get(key)
            if features is not None:
                self._memory.put(key, features)
        return features

    def _make(self, lost: Mapping[Span, Mapping[str, Stream]]) -> dict[str, Features]:
        """Decode each span once, encode it, and store the features."""
        with self._making:
            clips = self._clips(lost)
            made: dict[str, Features] = {}
            for (span, streams), clip in zip(lost.items(), clips, strict=True):
                for key, stream in streams.items():
                    # The features would be stored under the key of content that is no longer there.
                    if clip.digest != stream.digest:
                        raise MediaError(
                            span.name,
                            "changed",
                            "was replaced while it was read; start the run again",
                        )
                    if key not in made:
                        made[key] = self._backbone.encode(stream.modality, [clip])[0]
            self._keep(made)
            return made

    def _clips(self, lost: Mapping[Span, Mapping[str, Stream]]) -> list[DecodedClip]:
        """One clip per span, from cached face crops if these suffice."""
        held = [self._crops.find(streams.values()) for streams in lost.values()]
        lacking = [
            to_decode(streams.values(), faces)
            for streams, faces in zip(lost.values(), held, strict=True)
        ]
        jobs = [
            self._identifier.job(span, streams)
            for span, streams in zip(lost, lacking, strict=True)
            if streams
        ]
        decoded = iter(self._decode(jobs))
        clips: list[DecodedClip] = []
        for streams, rest, faces in zip(lost.values(), lacking, held, strict=True):
            clip = with_faces(next(decoded), faces) if rest else faces
            assert clip is not None
            if faces is None:
                self._crops.keep(streams.values(), clip)
            clips.append(clip)
        return clips

    def _decode(self, jobs: Sequence[DecodeJob]) -> list[DecodedClip]:
        if not self._isolate:
            return [decode(job) for job in jobs]
        if self._pool is None:
            self._pool = self._exit.enter_context(DecodePool(self._limits))
        clips: list[DecodedClip] = []
        for result in self._pool.map(jobs):
            if isinstance(result, BadClip):
                raise MediaError(result.path, result.kind, result.detail)
            clips.append(result)
        return clips

    def _keep(self, made: Mapping[str, Features]) -> None:
        if self._store is None:
            return
        if not self._declared_need:
            self._declared_need = True
            self._store.need(self._all_keys())
        for key, features in made.items():
            self._memory.put(key, features)
            # A store full of needed features would only drop new ones.
            if not self._store.full:
                self._store.put(key, features)

    def _all_keys(self) -> list[str]:
        keys: list[str] = []
        for sample in self._samples:
            try:
                spans = self._identifier.spans(sample).items()
                keys += [self._identifier.stream(*want).key for want in spans]
            except MediaError:  # this row was left out and needs no features
                continue
        return keys


class _Memory:
    """A least-recently-used cache of features with a limit in bytes."""

    def __init__(self, limit: float) -> None:
        self._limit, self._bytes = limit, 0
        self._items: OrderedDict[str, Features] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: str) -> Features | None:
        with self._guard:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: str, features: Features) -> None:
        size = size_of(features)
        with self._guard:
            # A feature over the limit would evict everything and then itself.
            if key in self._items or size > self._limit:
                return
            self._items[key] = features
            self._bytes += size
            while self._bytes > self._limit:
                self._bytes -= size_of(self._items.popitem(last=False)[1])
