"""Files that survive a kill: whole-file writes, and JSON Lines that are only ever appended.

A whole-file write goes to a temporary file in the same folder, which is forced to disk and then
renamed over the target, so that a reader sees the old content or the new one.

A JSON Lines file (``.jsonl``) holds one JSON object or array a line, in UTF-8. A kill can cut its
last line short, even in the middle of a character; nothing that is written here damages any other
line. Readers therefore pass over a torn last line, and appending first repairs it: a line that lost
only its line break gets one, and anything else is cut off. Damage elsewhere was done by something
else, so :func:`read_rows` refuses it by file and line; :func:`read_intact_rows` is for records that
are shown but not built on.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo.errors import MmemoError

CACHE_TAG = "CACHEDIR.TAG"
"""Marks a folder as a cache, for backups and for pipelines (https://bford.info/cachedir/)."""
_CACHE_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n"
_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{16}")
_STALE_S = 3600.0
_swept: set[Path] = set()
_BLOCK = 1 << 16  # bytes read at a time while looking for the start of a torn line


class DamagedLineError(MmemoError):
    """A line of a JSON Lines file, other than a torn last one, cannot be read."""

    def __init__(self, path: Path, line: int) -> None:
        super().__init__(
            f"{path}:{line}: is not a whole line of JSON; restore the file from a copy, or delete "
            "it so that it is made again"
        )
        self.path, self.line = path, line


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a JSON Lines file. ``row`` is None where the line is damaged; ``whole`` says
    whether its line break is there; ``end`` is the offset in bytes behind it."""

    number: int
    raw: bytes
    row: Any
    whole: bool
    end: int


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace ``path`` with ``content`` (text in UTF-8) in one step.

    Args:
        durable: wait until the content is on the disk. Without it a power cut, though no kill,
            may leave an empty file.

    Raises:
        OSError: the file could not be written; the old content still stands.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not the process and thread: on a file system that nodes share, containers have the same ones.
    unique = secrets.token_hex(8)
    temporary = path.with_name(f".{path.name}.tmp-{unique}")
    _sweep(path.parent)
    try:
        with temporary.open("wb") as handle:
            # While it is held, nobody takes the file for one that a killed process has left.
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.write(data)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.replace(path)
    # Also after a Ctrl-C: no temporary file may stay behind.
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)  # the rename itself


def mark_cache(folder: Path) -> None:
    """Make a folder, and mark it as a cache: its files can be made again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CACHE_TAG).exists():
        write_whole(folder / CACHE_TAG, _CACHE_SIGNATURE)


def _sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder, once per process.

    One is left over if it is an hour old and nobody holds its lock: a process that is still
    writing holds it, and one that has only just made the file has a young one.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError):
        for entry in os.scandir(folder):
            if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(OSError):  # held, or removed by another process
                if time.time() - entry.stat().st_mtime > _STALE_S:
                    with open(entry.path, "rb") as handle:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(entry.path)


def write_rows(path: Path, rows: Iterable[Any], *, durable: bool = True, **dumps: Any) -> None:
    """Replace a JSON Lines file with ``rows`` in one step; see :func:`write_whole`.

    Args:
        dumps: keyword arguments for :func:`json.dumps`.
    """
    write_whole(path, _encode(rows, dumps), durable=durable)


def append_rows(
    path: Path, rows: Iterable[Any], *, at: int | None = None, durable: bool = False, **dumps: Any
) -> int:
    """Append ``rows`` to a JSON Lines file, which is made where there is none, after repairing a
    torn last line. Several processes may append to one file.

    Args:
        at: cut off everything behind this offset first, in place of the repair.
        durable: wait until the rows are on the disk.
        dumps: keyword arguments for :func:`json.dumps`.

    Returns:
        The offset behind the last row.
    """
    data = memoryview(_encode(rows, dumps))
    # Unbuffered: rows that were written are in the kernel, where a kill of this process cannot lose
    # them.
    with path.open("a+b", buffering=0) as handle:
        # Else the repair could take a line that another process is still writing for a torn one.
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if at is None:
            _repair(handle)
        else:
            handle.truncate(at)
        # An unbuffered write may take only a part of the data.
        while data:
            data = data[handle.write(data) :]
        if durable:
            os.fsync(handle.fileno())
        return handle.seek(0, os.SEEK_END)


def scan(path: Path, *, errors: str = "strict") -> Iterator[Line]:
    """Every line that is not blank, damaged ones included.

    Args:
        errors: what becomes of bytes that are not UTF-8; see :meth:`bytes.decode`.
    """
    end = 0
    # Lines are split as bytes, since a torn one may end in the middle of a character.
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            end += len(raw)
            if raw.strip():
                yield Line(number, raw, _row(raw, errors), raw.endswith(b"\n"), end)


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, without a last one that a kill has torn.

    Raises:
        DamagedLineError: any other line is damaged.
        OSError: the file cannot be read.
    """
    rows: list[Any] = []
    for line in scan(path):
        if line.row is None and line.whole:
            raise DamagedLineError(path, line.number)
        if line.row is not None:
            rows.append(line.row)
    return rows


def read_intact_rows(path: Path) -> Iterator[Any]:
    """The rows that can be read; damaged lines are passed over, and a missing file has none.

    Bytes that are not UTF-8 are replaced: what a report shows may have been written by anyone.
    """
    if path.exists():
        yield from (line.row for line in scan(path, errors="replace") if line.row is not None)


def keep_rows(path: Path, keep: Callable[[Any], bool]) -> list[Any]:
    """Rewrite a JSON Lines file with the rows that ``keep`` chooses, byte for byte, and without
    damaged lines.

    Returns:
        The rows that were kept.
    """
    lines = [line for line in scan(path) if line.row is not None and keep(line.row)]
    # The bytes that were read are written, since another json.dumps might encode a row otherwise. A
    # kept last line may lack its line break.
    write_whole(path, b"".join(line.raw.rstrip(b"\r\n") + b"\n" for line in lines))
    return [line.row for line in lines]


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(rows: Iterable[Any], dumps: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, **dumps) + "\n" for row in rows).encode()


def _row(raw: bytes, errors: str = "strict") -> Any:
    """The object or array in a line; None for anything else. Only these two end with a character
    of their own, so a torn line is never taken for a whole one, as ``12`` of ``123`` would be."""
    try:
        value: Any = json.loads(raw.decode("utf-8", errors))
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict | list) else None  # pyright: ignore[reportUnknownVariableType]


def _repair(handle: io.FileIO) -> None:
    """End a whole last line that lost its line break, and cut off a torn one."""
    end = start = handle.seek(0, os.SEEK_END)
    tail = b""
    # Read from the end, block by block: a log may be large and only its last line matters.
    while start and b"\n" not in tail:
        size = min(_BLOCK, start)
        start -= size
        handle.seek(start)
        tail = handle.read(size) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return
    if _row(torn) is None:
        handle.truncate(end - len(torn))
    else:
        handle.write(b"\n")
