"""File locks of the feature store, which record which process computes which feature.

They let several processes fill one store without computing any feature twice. Every process that
locks features keeps one file under ``claims/`` and holds a ``flock`` on it for as long as it lives.
The kernel releases that lock however the process ends, so the feature locks of a killed process are
void at once, and no clock, process id or host name has to be trusted. Feature locks
change only while the store's own lock is held.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
import uuid
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mmemo.errors import StoreError

_LOCK_TIMEOUT = 120.0
_SESSION = re.compile(r"[0-9a-f]{32}")  # other files do not belong to the store
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}


def try_lock(descriptor: int) -> bool:
    """Take an exclusive ``flock`` if it is free, and return whether it was.

    Raises:
        StoreError: the file system has no file locks.
    """
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share_lock(descriptor: int) -> None:
    """Take a shared ``flock``, waiting for the short time that an eviction holds it.

    Raises:
        StoreError: the file system has no file locks.
    """
    _flock(descriptor, fcntl.LOCK_SH)


def _flock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise StoreError(
            "the file system of the feature store has no file locks; set store.path to a "
            "folder on a file system with locks, such as a local disk"
        ) from error


class StoreLock:
    """The store's own lock, held for milliseconds to lock features, commit a shard or evict one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        on_fork(self)

    @contextmanager
    def __call__(self) -> Generator[None]:
        if self._descriptor is not None:  # reentered: the caller excludes other threads
            yield
            return
        # A program started meanwhile must not inherit the file, or it would keep the lock.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._wait(self._descriptor)
            yield
        finally:
            self.after_fork()

    def _wait(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        pause = 0.0005
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.path} has been locked by another process for {_LOCK_TIMEOUT:.0f} s; "
                    "end the process that holds it"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def after_fork(self) -> None:
        """Close the inherited handle: a forked child must not keep its parent's lock alive."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class FeatureLocks:
    """The locks of one process on the features of one store that it is computing."""

    def __init__(self, folder: Path, lock: StoreLock) -> None:
        self.folder, self._lock = folder, lock
        self.session = uuid.uuid4().hex
        self.mine: set[str] = set()
        self._descriptor: int | None = None
        on_fork(self)

    def announce(self) -> None:
        """Create this process's file, so that ``tmp/<session>.*`` is known to belong to it."""
        if self._descriptor is None:
            with self._lock():
                self._save()

    def take(self, keys: Sequence[str], limit: int | None = None) -> list[str]:
        """Lock the ``keys`` that no other live process has locked, at most ``limit`` of them."""
        with self._lock():
            others = self._others()
            # The store's lock spans the look and the save, so no two take the same key.
            taken = [key for key in keys if key not in others][:limit]
            self.mine.update(taken)
            self._save()
        return taken

    def release(self, keys: Iterable[str]) -> None:
        """Release locks. Keys that are not locked are ignored."""
        gone = self.mine.intersection(keys)
        if gone:
            with self._lock():
                self.mine -= gone
                self._save()

    def others(self) -> dict[str, str]:
        """Map each key that another live process has locked to ``pid N on HOST``."""
        with self._lock():
            return self._others()

    def _others(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in self.folder.glob("*.json"):
            # A second open of this process's own file would find it locked, as if by another.
            if path.stem == self.session or not _SESSION.fullmatch(path.stem):
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if try_lock(descriptor):  # its owner is gone
                    path.unlink(missing_ok=True)
                    # A shard whose writer was killed before it got its final name.
                    for leftover in self.folder.parent.glob(f"tmp/{path.stem}.*"):
                        leftover.unlink(missing_ok=True)
                    continue
                found.update(_read(descriptor))
            finally:
                os.close(descriptor)
        return found

    def _save(self) -> None:
        """Rewrite this process's file in place: the flock is on the open file, not on its name."""
        if self._descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.session}.json"
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not try_lock(self._descriptor):
                raise StoreError(f"{path} is locked by another process; remove it")
        owner = f"pid {os.getpid()} on {socket.gethostname()}"
        data = json.dumps({"owner": owner, "keys": sorted(self.mine)}).encode()
        # A replaced file would be a new one, which this process's flock does not cover.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)

    def close(self) -> None:
        """Release all locks."""
        if self._descriptor is None:
            return
        with self._lock():
            # Removed before it is unlocked, or another process may open it in between.
            (self.folder / f"{self.session}.json").unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
            self.mine.clear()

    def after_fork(self) -> None:
        """Start without locks: a forked child is another process."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.session = uuid.uuid4().hex
        self.mine = set()


def _read(descriptor: int) -> dict[str, str]:
    """The locks in an open file.

    A file that was cut short by a full disk locks nothing: features are then computed twice, which
    is wasteful but not wrong.
    """
    try:
        locks: Any = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        return dict.fromkeys(locks["keys"], str(locks["owner"]))
    except (ValueError, KeyError, TypeError):
        return {}


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


# register_at_fork cannot be undone, so it must not keep every store alive.
_forked: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def on_fork(item: _Forkable) -> None:
    """Call ``item.after_fork()`` in every forked child."""
    _forked.add(item)


def _after_fork() -> None:
    for item in list(_forked):
        item.after_fork()


os.register_at_fork(after_in_child=_after_fork)
