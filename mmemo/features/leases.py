"""Leases on the feature store, by which processes on one machine or on several share its work.

Every process that writes has a folder of its own, ``claims/<session>/``, which is its lease. It
holds ``beat`` (who it is, and a number that grows every few seconds), ``keys`` (the features that
it is computing) and the shards that it is writing. The store's lock is one empty file, ``token``:
whoever renames it into his own folder has the lock.

A lease ends with its folder. The others end that of a process which is gone or has been silent for
``expiry`` seconds: they rename the folder, put the token back, and delete the rest. A writer that
wakes up afterwards cannot commit any more, because the shard that it would rename is no longer
where it left it. No check comes before that rename, so there is no moment between the two. A
session's name is never used again, so several may end one lease at the same time.

What this asks of the file system, and what NFS, Lustre and local disks promise: a rename is atomic,
and of several renames of one file one succeeds; ``rmdir`` removes empty folders only; and a file
or folder that is opened sees what was closed or renamed before (close-to-open consistency). It asks
for no locks, no links, and no clocks that agree: silence is measured by the clock of the one who
listens. ``flock`` only tells sooner, on one machine, that a process is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmemo.errors import StoreError

_LOCK_TIMEOUT = 120.0
_SESSION = re.compile(r"[0-9a-f]{32}(\.ended)?")  # other files do not belong to the store
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}
_GONE = {errno.ENOENT, errno.ESTALE}
_NEW, _TOKEN, _BEAT, _KEYS = "lock", "token", "beat", "keys"
_BEATS = 12  # signs of life in the time after which silence ends a lease
_LOOK = 0.25  # seconds between two looks at who is alive
_TRIES = 100


def try_lock(descriptor: int) -> bool:
    """Take an exclusive ``flock`` if it is free, and return whether it was. Where the file system
    has no locks, it counts as free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def share_lock(descriptor: int) -> None:
    """Take a shared ``flock``, waiting for the short time that an eviction holds it. Where the file
    system has no locks, nothing happens."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def is_gone(error: OSError) -> bool:
    """Whether a file is not there any more, removed by this machine or by another one (NFS)."""
    return error.errno in _GONE


@dataclass
class _Silence:
    """How long a process has been seen to be silent."""

    beat: bytes
    looked: float
    seconds: float = 0.0


class Lease:
    """This process's lease on a store: the store's lock (call it), and the claims on features.

    Args:
        folder: ``claims`` in the store's folder.
        expiry: seconds of silence after which a lease ends.
    """

    def __init__(self, folder: Path, expiry: float = 60.0) -> None:
        self.folder, self.expiry = folder, expiry
        self.session = uuid.uuid4().hex
        self.mine: set[str] = set()
        self.lost: set[str] = set()
        """Keys that were claimed when the lease ended: others may be computing them."""
        self._token = folder / _NEW / _TOKEN
        self._descriptor: int | None = None  # of the beat, with a flock on it
        self._stop = threading.Event()
        self._silent: dict[str, _Silence] = {}
        self._looked = 0.0
        self._depth = 0
        self._threads = threading.RLock()
        on_fork(self)

    @property
    def own(self) -> Path:
        """This process's folder, which may not be there yet."""
        return self.folder / self.session

    def room(self) -> Path:
        """This process's folder, for files that nobody else may touch while the lease lasts."""
        with self._threads:
            if self._descriptor is None:
                self._begin()
            return self.own

    def renew(self) -> bool:
        """Begin a new lease if the old one was ended by others; returns whether it was."""
        with self._threads:
            if self._descriptor is None or self.own.exists():
                return False
            self.lost |= self.mine
            self._leave()
            return True

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Hold the store's lock, for milliseconds: to claim features, commit a shard or evict one.

        Raises:
            StoreError: a live process has held it for two minutes.
        """
        with self._threads:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._take_token()
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    # If the lease has ended, the others put the token back.
                    self._put_back(self.own)

    def _take_token(self) -> None:
        begun = time.monotonic()
        pause = 0.0005
        while True:
            try:
                self._token.rename(self.room() / _TOKEN)
                return
            except OSError as error:
                if not is_gone(error):
                    raise
            if self.renew():
                continue
            self._create()
            waited = time.monotonic() - begun
            if waited > _LOOK:
                self._end_the_dead()
            if waited > _LOCK_TIMEOUT + self.expiry:
                raise StoreError(self._held(waited))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def _put_back(self, folder: Path) -> None:
        try:
            (folder / _TOKEN).rename(self._token)
        except OSError as error:
            if not is_gone(error):
                raise

    def _held(self, seconds: float) -> str:
        for path in self._others():
            if (path / _TOKEN).exists():
                owner = _state(path).get("owner", path.name)
                return (
                    f"{self.folder.parent} has been locked by {owner} for {seconds:.0f} s; "
                    "end that process"
                )
        return (
            f"the lock of {self.folder.parent} is lost; end all processes that use the store, and "
            f"make the empty file {self._token}"
        )

    def _create(self) -> None:
        """Make the token of a new store: exactly one, whoever comes first."""
        home = self._token.parent
        if home.exists():
            return
        made = self.room() / _NEW
        made.mkdir(exist_ok=True)
        # A second file, so that no folder is ever renamed over the one whose token is in use.
        for name in (_TOKEN, "made"):
            (made / name).touch()
        with suppress(OSError):
            made.rename(home)
        shutil.rmtree(made, ignore_errors=True)

    def take(self, keys: Sequence[str], limit: int | None = None) -> list[str]:
        """Claim the ``keys`` that no other live process has claimed, at most ``limit`` of them."""
        with self():
            others = self.others()
            # The store's lock spans the look and the save, so no two take the same key.
            taken = [key for key in keys if key not in others][:limit]
            self.mine.update(taken)
            self.lost.difference_update(taken)
            return taken if self._save() else []

    def release(self, keys: Iterable[str]) -> None:
        """Give claims up. Keys that are not claimed are ignored."""
        gone = self.mine.intersection(keys)
        if gone:
            with self():
                self.mine -= gone
                self._save()

    def others(self) -> dict[str, str]:
        """Map each key that another live process has claimed to ``pid N on HOST``.

        Without the store's lock, what has only just been claimed may be missing.
        """
        with self._threads:
            self._end_the_dead()
            claimed: dict[str, str] = {}
            for path in self._others():
                owner = str(_state(path).get("owner", ""))
                claimed.update(dict.fromkeys(_keys(path), owner))
            return claimed

    def _save(self) -> bool:
        """Write down the claims; False if the lease has ended."""
        try:
            (self.own / _KEYS).write_text(json.dumps(sorted(self.mine)), encoding="utf-8")
        except OSError as error:
            if not is_gone(error):
                raise
            self.renew()
            return False
        return True

    def _others(self) -> list[Path]:
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if _SESSION.fullmatch(entry.name)
                and entry.name != self.session
                and entry.is_dir(follow_symlinks=False)
            ]
        return []

    def _end_the_dead(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        others = self._others()
        for path in others:
            # A folder that is half removed still holds its claims: until it is gone, a writer that
            # has it open (NFS) might commit.
            if path.name.endswith(".ended") or self._is_dead(path):
                self._end(path)
        names = {path.name for path in others}
        self._silent = {name: seen for name, seen in self._silent.items() if name in names}

    def _is_dead(self, path: Path) -> bool:
        try:
            descriptor = os.open(path / _BEAT, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if not is_gone(error):
                raise
            beat = b""  # killed before it could write one
        else:
            try:
                beat = os.pread(descriptor, 4096, 0)
                # On this machine, the kernel releases the flock of a process that has ended.
                if _parse(beat).get("kernel") == _kernel() and _unlocked(descriptor):
                    return True
            finally:
                os.close(descriptor)
        now = time.monotonic()
        seen = self._silent.get(path.name)
        if seen is None or seen.beat != beat:
            self._silent[path.name] = _Silence(beat, now)
            return False
        # Only time in which somebody listened counts: a process that was stopped itself, or whose
        # file system hung, does not take its own absence for the other's.
        seen.seconds += min(now - seen.looked, max(self.expiry / _BEATS, 2 * _LOOK))
        seen.looked = now
        return seen.seconds >= self.expiry

    def _end(self, path: Path) -> None:
        """End a lease. Several processes may do this at once, and one that is killed meanwhile
        leaves it to the next."""
        ended = path if path.suffix else path.with_name(f"{path.name}.ended")
        if ended != path:
            with suppress(FileNotFoundError):  # somebody else was first
                path.rename(ended)
        for _ in range(_TRIES):
            self._put_back(ended)
            with suppress(FileNotFoundError):
                _empty(ended)
            try:
                ended.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            # A file that a process of this machine holds open may stay for a moment (NFS).
            time.sleep(0.01)

    def _begin(self) -> None:
        """Make this process's folder, and beat from now on."""
        self.own.mkdir(parents=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self.own / _BEAT, flags, 0o644)
        kernel = ""
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel = _kernel()
        owner = f"pid {os.getpid()} on {socket.gethostname()}"
        os.pwrite(self._descriptor, _line(owner, kernel, 0), 0)
        os.fsync(self._descriptor)  # others may look while it is open
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        beat = (self.own / _BEAT, owner, kernel, self.expiry / _BEATS, self._stop)
        threading.Thread(target=_beat, args=beat, daemon=True, name="mmemo-lease").start()

    def close(self) -> None:
        """Give up all claims and the lease."""
        with self._threads:
            if self._descriptor is None:
                return
            ended = self.own
            self._leave()
            self._end(ended)

    def after_fork(self) -> None:
        """Start without a lease: a forked child is another process, and the folder its parent's."""
        # A lock that another thread held during the fork would never be released in the child.
        self._threads, self._depth = threading.RLock(), 0
        self._leave()

    def _leave(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._stop.set()
        self.session = uuid.uuid4().hex  # a name is never used again
        self.mine = set()


def _beat(path: Path, owner: str, kernel: str, pause: float, stop: threading.Event) -> None:
    """Write a growing number until told to stop or until the folder is gone."""
    count = 0
    while not stop.wait(pause):
        count += 1
        try:
            # Opened anew, because closing is what makes it visible to other machines.
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            if is_gone(error):
                return
            continue
        try:
            with suppress(OSError):
                os.pwrite(descriptor, _line(owner, kernel, count), 0)
        finally:
            with suppress(OSError):
                os.close(descriptor)


def _line(owner: str, kernel: str, count: int) -> bytes:
    # Of one length, so that it can be written in place.
    values = {"owner": owner, "kernel": kernel, "beat": f"{count:012d}"}
    return json.dumps(values).encode() + b"\n"


def _parse(data: bytes) -> dict[str, Any]:
    try:
        values: Any = json.loads(data)
        return dict(values)
    except (ValueError, TypeError):  # killed while it was written
        return {}


def _state(path: Path) -> dict[str, Any]:
    with suppress(OSError):
        return _parse((path / _BEAT).read_bytes())
    return {}


def _keys(path: Path) -> list[str]:
    """The claims of a process. A file that was cut short by a full disk claims nothing: features
    are then computed twice, which is wasteful but not wrong."""
    try:
        keys: Any = json.loads((path / _KEYS).read_bytes())
        return [str(key) for key in keys]
    except (OSError, ValueError, TypeError):
        return []


def _empty(folder: Path) -> None:
    """Remove what is in the folder of a lease, and the claims last."""
    for path in sorted(folder.iterdir(), key=lambda one: one.name == _KEYS):
        with suppress(OSError):
            if path.name == _NEW:
                shutil.rmtree(path)
            elif path.name != _TOKEN:
                path.unlink()


def _unlocked(descriptor: int) -> bool:
    """Whether nobody on this machine holds a ``flock`` on the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _kernel() -> str:
    """Names the running kernel: what shares its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


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
