"""The feature store, so that the features of a frozen encoder are computed only once per clip.

The folder contains ``shards/`` (safetensors files that are named by their content and never
change), ``claims/`` (the leases of the processes that write: which features they compute, and the
shards that they are writing), ``digests.jsonl`` and ``outcomes.jsonl`` (small maps), and ``crops/``
with the same layout for face crops. There is no index file that could disagree with the shards:
every process reads the headers of the shards that it finds. The modification time of a shard is the
time of its last use.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmemo.console import errors
from mmemo.errors import StoreError
from mmemo.features import shard
from mmemo.features.journal import Journal
from mmemo.features.leases import Lease, is_gone, on_fork, share_lock, try_lock
from mmemo.features.shard import DamagedShard, FeaturePlace, ForeignShard
from mmemo.files import sync
from mmemo.formats import counted
from mmemo.media.config import StoreConfig, is_url, store_folder

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Features

_TOUCH_SECONDS = 30.0  # maximum age of a shard's recorded last use
_TICK = 2.0  # coarsest clock of a file system, in seconds
_FLUSH_SECONDS = 20.0  # maximum work that a killed process loses


@dataclass
class StoreStats:
    """The contents of a store, and how this process has used it. Sizes are in bytes."""

    features: int = 0
    shards: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    dropped: int = 0  # features not kept because needed ones filled the budget
    damaged: tuple[str, ...] = ()  # files that failed a check and were dropped


def open_store(
    config: StoreConfig, output_dir: Path | str, *, read_only: bool = False
) -> FeatureStore | None:
    """Open the store of a run, or return None if the config disables it."""
    if not config.enabled:
        return None
    folder = store_folder(config, output_dir)
    if config.path is not None and is_url(config.path):
        from mmemo.features.object_store import ObjectStore

        return ObjectStore(config.model_copy(update={"path": str(folder)}), config.path)
    return FeatureStore(config.model_copy(update={"path": str(folder)}), read_only=read_only)


class FeatureStore:
    """A map from feature keys to features on disk, shared by threads, processes and runs.

    Foreign files in its folder are left alone. With ``read_only``, nothing is written or removed,
    and the folder is not created.

    Raises:
        StoreError: the folder cannot be used, or holds other files.
    """

    def __init__(self, config: StoreConfig, *, read_only: bool = False) -> None:
        if config.path is None:
            raise StoreError("the feature store has no folder; set store.path")
        self.config, self._read_only = config, read_only
        self.folder = Path(config.path)
        self._shards = self.folder / "shards"
        self._prepare()
        self._guard = threading.RLock()
        self._lease = Lease(self.folder / "claims", config.lease_seconds)
        self.digests = Journal(self.folder / "digests.jsonl", self._lease)
        self.outcomes = Journal(self.folder / "outcomes.jsonl", self._lease)
        self._places: dict[str, tuple[str, FeaturePlace]] = {}  # key -> shard name, place in it
        self._holds: dict[str, list[str]] = {}  # shard name -> keys
        self._used: dict[str, float] = {}  # shard name -> when its last use was recorded
        self._ignored: set[str] = set()  # foreign files with names like shards
        self._needed: set[str] = set()
        self._pending: dict[str, Features] = {}
        self._pending_bytes, self._pending_since, self._writes = 0, 0.0, 0
        self._listed = (-1, 0.0)  # when the shards' folder changed last, and when that was seen
        self._stats = StoreStats()
        on_fork(self)
        self._refresh()
        self.crops: FeatureStore | None = None  # has its own budget
        if config.crops_gb:
            crops = {"path": str(self.folder / "crops"), "budget_gb": config.crops_gb}
            inner = config.model_copy(update={**crops, "crops_gb": 0.0})
            self.crops = FeatureStore(inner, read_only=read_only)

    def _prepare(self) -> None:
        """Create the folders. ``claims`` comes first, because it marks the folder as a store."""
        try:
            used = self.folder.exists() and any(self.folder.iterdir())
            if (
                used and not (self.folder / "claims").is_dir()
            ):  # checked last: others may be starting
                raise StoreError(
                    f"{self.folder} holds other files and no feature store; set store.path to a "
                    "new or empty folder"
                )
            for name in () if self._read_only else ("claims", "shards"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot hold the feature store ({error.strerror}); set store.path"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> Features | None:
        """The feature, or None if the store does not have it. Do not change it in place."""
        with self._guard:
            found = self._pending.get(key)
            if found is None and key not in self._places:
                self._refresh()
            # A read that fails forgets the shard; another shard may hold the same key.
            while found is None and key in self._places:
                found = self._read(key)
            if found is None:
                self._stats.misses += 1
            else:
                self._stats.hits += 1
            return found

    def outline(self, key: str) -> Features | None:
        """Like ``get``, but ``x`` may be on torch's meta device, with a shape but no values."""
        with self._guard:
            try:
                name, place = self._places[key]
                return shard.read_outline(self._shards / name, place)
            except (KeyError, OSError, DamagedShard):
                return self.get(key)

    def put(self, key: str, features: Features) -> None:
        """Store a copy of the feature.

        It is on disk, and visible to other processes, after ``flush`` or when a shard is full.
        """
        with self._guard:
            # Others may be computing what was claimed by a lease that has ended.
            if key in self._pending or key in self._places or key in self._lease.lost:
                return
            copy = {name: _copy(tensor) for name, tensor in features.items()}
            self._pending[key] = copy
            self._pending_bytes += shard.size_of(copy)
            if len(self._pending) == 1:
                self._pending_since = time.monotonic()
            full = self._pending_bytes >= self._shard_bytes()
            if full or time.monotonic() - self._pending_since > _FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write pending features and release the locks on them.

        Raises:
            StoreError: the shard cannot be written. The message gives its path and size.
        """
        with self._guard:
            self.digests.flush()
            self.outcomes.flush()
            if self.crops is not None:
                self.crops.flush()
            while self._pending:
                temporary = self._lease.room() / str(self._writes)
                self._writes += 1
                try:
                    self._commit(temporary, shard.write_shard(temporary, self._pending))
                except (OSError, SafetensorError) as error:
                    if self._lease.renew():
                        self._give_up()
                        continue
                    temporary.unlink(missing_ok=True)
                    raise StoreError(
                        f"{self._shards} cannot take a shard of {self._pending_bytes} bytes "
                        f"({error}); free space there, or set store.path"
                    ) from error
                # Only now: others that get the claims must find the features.
                self._lease.release(self._pending)
                self._pending, self._pending_bytes = {}, 0

    def _give_up(self) -> None:
        """Drop the pending features that others may be computing, since the lease has ended."""
        gone = self._pending.keys() & self._lease.lost
        self._pending = {key: one for key, one in self._pending.items() if key not in gone}
        self._pending_bytes = sum(map(shard.size_of, self._pending.values()))
        errors.print(
            f"{self.folder}: this process was silent for so long that others took over its work; "
            f"{counted(len(gone), 'feature')} that it made meanwhile are left to them",
            style="yellow",
            soft_wrap=True,
        )

    def has(self, key: str) -> bool:
        """Whether the store held the key when this process last read its shards."""
        with self._guard:
            return key in self._places or key in self._pending

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The ``keys`` that the store does not hold now, in order."""
        with self._guard:
            self._refresh()
            return [key for key in keys if not self.has(key)]

    def claim(self, keys: Sequence[str], limit: int | None = None) -> list[str]:
        """Lock features for this process to compute.

        Args:
            keys: the features that are needed.
            limit: maximum number of features to lock.

        Returns:
            The keys that this process must now compute, because the store does not hold them and
            no other live process is computing them. A lock ends after ``put`` and ``flush``, with
            ``release``, or when the process ends.
        """
        with self._guard, self._lease():
            # One lock spans both steps, or a shard committed between them is missed.
            return self._lease.take(self.missing(keys), limit)

    def release(self, keys: Iterable[str] | None = None) -> None:
        """Release the locks on ``keys``, or all locks by default, without storing features."""
        with self._guard:
            self._lease.release(list(self._lease.mine) if keys is None else keys)

    def wait(self, keys: Collection[str], timeout: float | None = None) -> list[str]:
        """Wait until one of ``keys`` is no longer being computed by another live process.

        Returns:
            The ``keys`` that no other process is computing any more, because it has finished or
            released them, or has ended. The list is empty after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.01
        while True:
            others = self._lease.others()
            free = [key for key in keys if key not in others]
            if free or (deadline is not None and time.monotonic() > deadline):
                with self._guard:
                    self.outcomes.refresh()
                    self._refresh()
                return free
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def need(self, keys: Iterable[str]) -> None:
        """Declare that this process will read ``keys`` again.

        Their shards are then not evicted for new ones, so a full store serves part of every epoch.
        With plain least-recently-used eviction, an epoch larger than the budget would never hit.
        """
        with self._guard:
            self._needed.update(keys)

    def stats(self) -> StoreStats:
        """The current sizes, and the counts of this process."""
        with self._guard:
            self._refresh()
            sizes = [size for _, size, _ in self._by_age()]
            self._stats.features = len(self._places)
            self._stats.shards, self._stats.bytes = len(sizes), sum(sizes)
            return StoreStats(**vars(self._stats))

    def close(self) -> None:
        """Flush, and release all locks."""
        with self._guard:
            self.flush()
            self._lease.close()
            if self.crops is not None:
                self.crops.close()

    def journal(self, path: Path) -> Journal:
        """A small map in a file of the run, protected by the store's lock."""
        return Journal(path, self._lease)

    def after_fork(self) -> None:
        """Start with no pending features: the parent of a forked child writes them."""
        # A lock that another thread held during the fork would never be released in the child.
        self._guard = threading.RLock()
        self._pending, self._pending_bytes = {}, 0

    @property
    def full(self) -> bool:
        """Whether features were dropped because needed ones fill the budget."""
        return self._stats.dropped > 0

    def _shard_bytes(self) -> float:
        # A small budget still holds several shards, since eviction removes whole shards.
        size = self.config.shard_mb * 1e6
        budget = self.config.budget_gb
        return size if budget is None else min(size, budget * 1e9 / 4)

    def _by_age(self) -> list[tuple[int, int, str]]:
        """(last use, size, name) of every shard, least recently used first."""
        return sorted(
            (status.st_mtime_ns, status.st_size, name)
            for name, status in shard.shard_files(self._shards)
            if name not in self._ignored
        )

    def _refresh(self) -> None:
        """Register the shards that any process has added or removed."""
        if not self._changed():
            return
        names = self._names()
        for name in [name for name in self._holds if name not in names]:
            self._forget(name)
        for name in names - self._holds.keys() - self._ignored:
            try:
                index = self._index(name)
            except OSError as error:
                if not is_gone(error):
                    raise
                continue
            except ForeignShard:
                self._ignored.add(name)
                continue
            except DamagedShard as error:
                self._drop(name, error)
                continue
            self._holds[name] = list(index)
            for key, place in index.items():
                # A key in two shards was computed twice, which is not wrong; the first one serves.
                self._places.setdefault(key, (name, place))

    def _names(self) -> set[str]:
        return set(shard.shard_names(self._shards))

    def _index(self, name: str) -> dict[str, FeaturePlace]:
        return shard.read_index(self._shards / name)

    def _changed(self) -> bool:
        """Whether the folder of the shards has changed since it was last read."""
        try:
            # Opened, because only then does NFS ask for its present state.
            descriptor = os.open(self._shards, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            changed = os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
        now = time.monotonic()
        if changed != self._listed[0]:
            self._listed = (changed, now)
            return True
        # Two changes within one tick of the file system's clock have the same time.
        return now - self._listed[1] < _TICK

    def _forget(self, name: str) -> None:
        for key in self._holds.pop(name, ()):
            if self._places.get(key, ("",))[0] == name:
                del self._places[key]

    def _drop(self, name: str, error: DamagedShard) -> None:
        errors.print(str(error), style="yellow", soft_wrap=True)
        self._stats.damaged = (*self._stats.damaged, str(error.path))
        # It is ignored from now on, or every refresh would report it again.
        if self._read_only:
            self._ignored.add(name)
        else:
            (self._shards / name).unlink(missing_ok=True)
        self._forget(name)

    def _read(self, key: str) -> Features | None:
        """Read under a shared lock, so that the shard is not evicted in the meantime."""
        name, place = self._places[key]
        path = self._shards / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if not is_gone(error):
                raise
            return self._missed(name)
        try:
            # An eviction before this is harmless: the descriptor still reads the file.
            share_lock(descriptor)
            found = shard.read_feature(descriptor, path, key, place, verify=self.config.verify)
            self._touch(name, descriptor)
            return found
        except DamagedShard as error:
            self._drop(name, error)
            self._refresh()
            return None
        except OSError as error:
            if not is_gone(error):  # evicted by another machine
                raise
            return self._missed(name)
        finally:
            os.close(descriptor)

    def _missed(self, name: str) -> None:
        self._forget(name)
        self._refresh()

    def _touch(self, name: str, descriptor: int) -> None:
        now = time.monotonic()
        if not self._read_only and now - self._used.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._used[name] = now
            try:
                os.utime(descriptor)
            except OSError:  # another user's or a read-only store, where we cannot evict
                return

    def _commit(self, temporary: Path, name: str) -> None:
        """Make room for a written shard and move it to its final name."""
        size = temporary.stat().st_size
        with self._lease():
            if not self._make_room(size):
                temporary.unlink(missing_ok=True)
                self._stats.dropped += len(self._pending)
                return
            # Atomic: readers see the whole shard or none. It fails if the lease has ended, because
            # the file is then gone from where it was written.
            temporary.replace(self._shards / name)
            self._ignored.discard(name)
            # The new name itself is on disk only after the folder is synced.
            sync(self._shards)
        self._stats.written += len(self._pending)
        self._refresh()

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used shards, except those being read or still needed."""
        if self.config.budget_gb is None:
            return True
        self._refresh()
        entries = self._by_age()
        room = self.config.budget_gb * 1e9 - sum(entry[1] for entry in entries) - size
        for _, freed, name in entries:
            if room >= 0:
                break
            # Evicting needed shards in turn would let no epoch find anything (see need()).
            if self._needed.isdisjoint(self._holds.get(name, ())) and self._evict(name):
                room += freed
        return room >= 0

    def _evict(self, name: str) -> bool:
        path = self._shards / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # another process has removed it
            return True
        try:
            # Another process is reading this shard.
            if not try_lock(descriptor):
                return False
            path.unlink()
        finally:
            os.close(descriptor)
        self._stats.evicted += len(self._holds.get(name, ()))
        self._forget(name)
        return True


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
