"""A small shared map on disk, as append-only JSON lines of which the last one per key counts.

It holds what is too small for a shard: the digests of files, and the clips that are known to be
bad. Lines are appended under the store's lock, so several processes may write.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.features.leases import Lease

_SLACK = 1000  # superseded lines allowed before the file is rewritten


class Journal:
    """A map ``key -> JSON value`` in one file. ``refresh`` reads the lines of other processes."""

    def __init__(self, path: Path, lock: Lease) -> None:
        self.path, self._lock = path, lock
        self._known: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._inode, self._offset, self._lines = 0, 0, 0
        self.refresh()

    def get(self, key: str) -> Any:
        """The value of ``key`` as of the last refresh, or None."""
        return self._new[key] if key in self._new else self._known.get(key)

    def set(self, key: str, value: Any) -> None:
        """Set a value, which ``flush`` writes."""
        if self.get(key) != value:
            self._new[key] = value

    def refresh(self) -> None:
        """Read the lines appended since the last refresh. A line cut short by a kill is skipped."""
        try:
            handle = self.path.open("rb")
        except FileNotFoundError:
            self._known, self._inode, self._offset, self._lines = {}, 0, 0, 0
            return
        with handle:
            status = os.fstat(handle.fileno())
            # Another inode or a shorter file means that it was rewritten, so the offset is void.
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._known, self._offset, self._lines = {}, 0, 0
                self._inode = status.st_ino
            handle.seek(self._offset)
            tail = handle.read()
        # The last line may still be on its way; it is read by the next refresh.
        whole = tail[: tail.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._lines += 1
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                continue
            self._known[str(key)] = value

    def flush(self) -> None:
        """Append new values, and rewrite the file when most of its lines are superseded."""
        new = dict(self._new)  # a copy, because another thread may call set()
        if not new:
            return
        with self._lock():
            self.refresh()
            files.append_rows(self.path, ([key, value] for key, value in new.items()))
            self.refresh()
            # They leave `_new` only after they are read back, so that get() never misses one.
            for key, value in new.items():
                if self._new.get(key) is value:  # else set() has replaced it since
                    del self._new[key]
            if self._lines > 2 * len(self._known) + _SLACK:
                self._rewrite()

    def _rewrite(self) -> None:
        # The rewrite makes a new inode, by which other processes notice it in refresh().
        files.write_rows(self.path, ([key, value] for key, value in self._known.items()))
        self.refresh()
