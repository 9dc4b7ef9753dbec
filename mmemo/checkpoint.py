"""Checkpoints that are complete or do not exist.

A folder is written under a temporary name, every file in it is forced to disk, ``manifest.json``
(size and SHA-256 of every file) is written last, and one rename gives the folder its name. Readers
accept only folders that match their manifest: a truncated file, a flipped bit, a missing file or an
added file is refused by name. A manifest proves that nothing changed since it was written, not who
wrote it; folders from strangers are therefore read as safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError

from mmemo.content import sha256
from mmemo.errors import CheckpointError
from mmemo.files import sync, write_whole

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_LEFTOVER = re.compile(r"^.+\.tmp-\d+(-old)?$")
# A failed write is an error of the file system, of safetensors, or, where torch.save writes
# (DeepSpeed's shards), a RuntimeError.
_FAILURES = (OSError, SafetensorError, RuntimeError)


class Ranks(Protocol):
    """What a save needs of the processes of a run: see :class:`mmemo.train.distributed.Ranks`."""

    @property
    def is_main(self) -> bool:
        """True on the one process that names, hashes and renames the folder."""
        ...

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one. It is also a barrier."""
        ...

    def broadcast_text(self, text: str) -> str:
        """The main process's text, on every process."""
        ...


class OneRank:
    """A run of a single process."""

    is_main = True

    def any(self, flag: bool) -> bool:
        return flag

    def broadcast_text(self, text: str) -> str:
        return text


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that matched its manifest when it was read. ``files`` maps names to (bytes,
    SHA-256)."""

    path: Path
    meta: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @property
    def step(self) -> int:
        """The optimizer step in the folder's name; -1 if it has another name."""
        match = _NAME.match(self.path.name)
        return int(match.group(1)) if match else -1


@dataclass(frozen=True, slots=True)
class Found:
    """The newest valid checkpoint, if any, and the errors of newer ones that were refused."""

    checkpoint: Checkpoint | None
    refused: list[CheckpointError] = field(default_factory=list[CheckpointError])


def save(
    final: Path,
    write: Callable[[Path], None],
    *,
    meta: Mapping[str, Any] | None = None,
    needed: int = 0,
    ranks: Ranks | None = None,
) -> Path:
    """Replace ``final`` with what ``write(folder)`` writes, atomically.

    Every process of the run calls this with the same ``final``. Their ``write`` functions add files
    to one temporary folder, which the main process commits.

    Args:
        meta: JSON values to keep in the manifest.
        needed: bytes that will be written, to fail before writing rather than half-way.
        ranks: the processes of the run; None: this one alone.

    Raises:
        CheckpointError: the folder could not be written. A former ``final`` is untouched.
    """
    ranks = ranks or OneRank()
    # Beside the target, since a rename is atomic only within one file system. The name has the main
    # rank's process number, so the other ranks have to be told it.
    staged = Path(ranks.broadcast_text(str(final.with_name(f"{final.name}.tmp-{os.getpid()}"))))

    def prepare() -> None:
        if ranks.is_main:
            final.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(final.parent).free
            if needed > free:
                raise OSError(None, "not enough space")
            # A killed run may have had this process number, and left a folder of this name.
            if staged.exists():
                shutil.rmtree(staged)
            staged.mkdir()

    def finish() -> None:
        if ranks.is_main:
            _seal(staged, meta or {})
            _put(staged, final)

    # The ranks wait for each other after each part: none may write before the folder is there, and
    # the main rank may not seal it before all have written.
    for action in (prepare, lambda: write(staged), finish):
        _together(action, staged, final, needed, ranks)
    return final


def verify(folder: Path, *, extra_ok: bool = False) -> Checkpoint:
    """Read every byte of a checkpoint and compare it with the manifest.

    Args:
        extra_ok: allow files that the manifest does not list, such as a model card added by hand.

    Raises:
        CheckpointError: a file is damaged, missing or added; the message names it.
    """
    checkpoint = _read_manifest(folder)
    there = set(_files(folder)) - {MANIFEST}
    for name, (size, digest) in checkpoint.files.items():
        path = folder / name
        if name not in there:
            raise CheckpointError(f"{path}: is missing; this checkpoint cannot be used")
        # The size comes first: a truncated file is then named without hashing gigabytes.
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size} bytes instead of {size}; "
                "this checkpoint cannot be used"
            )
        if sha256(path) != digest:
            raise CheckpointError(
                f"{path}: its content changed since it was saved; this checkpoint cannot be used"
            )
    added = sorted(there - set(checkpoint.files))
    if added and not extra_ok:
        raise CheckpointError(
            f"{folder / added[0]}: was added after the checkpoint was saved; move it away"
        )
    return checkpoint


def latest_valid(folder: Path) -> Found:
    """The ``checkpoint-N`` with the highest N that passes :func:`verify`."""
    refused: list[CheckpointError] = []
    for step in sorted(_steps(folder), reverse=True):
        try:
            return Found(verify(folder / f"checkpoint-{step}"), refused)
        except CheckpointError as error:
            refused.append(error)
    return Found(None, refused)


def prune(folder: Path, *, newest: int, keep: int | None) -> list[Path]:
    """Delete all but the ``keep`` latest checkpoints up to step ``newest``, the one just saved.

    Checkpoints above ``newest`` are not counted: this run has refused them.
    """
    if keep is None:
        return []
    # At least one is kept: with 0 the slice would be empty, and nothing would be deleted.
    old = sorted(step for step in _steps(folder) if step <= newest)[: -max(keep, 1)]
    removed = [folder / f"checkpoint-{step}" for step in old]
    for path in removed:
        # Renamed first, so that a kill during the deletion leaves no damaged checkpoint.
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
        os.rename(path, aside)
        shutil.rmtree(aside)
    return removed


def sweep(folder: Path) -> list[Path]:
    """Delete the temporary folders of killed saves. Only the process that owns the folder may call
    this."""
    if not folder.is_dir():
        return []
    leftovers = [path for path in folder.iterdir() if _LEFTOVER.match(path.name) and path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = [_NAME.match(path.name) for path in folder.iterdir() if path.is_dir()]
    return [int(match.group(1)) for match in matches if match]


def _files(folder: Path) -> list[str]:
    """Names of all regular files below ``folder``. Anything else, such as a link, is refused."""
    names: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: is not a plain file; move it away")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return names


def _body(meta: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> str:
    rows = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    # In a fixed order, since a manifest is compared byte for byte.
    return json.dumps({"format": 1, "meta": dict(meta), "files": rows}, indent=1, sort_keys=True)


def _with_digest(body: str) -> bytes:
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"sha256": "{digest}", "manifest": {body}}}\n'.encode()


def _read_manifest(folder: Path) -> Checkpoint:
    path = folder / MANIFEST
    wrong = CheckpointError(f"{path}: is not a whole manifest; this checkpoint cannot be used")
    try:
        raw = path.read_bytes()
        content = cast(dict[str, Any], json.loads(raw)["manifest"])
        meta = cast(dict[str, Any], content["meta"])
        rows = cast(dict[str, dict[str, Any]], content["files"])
        files = {name: (int(row["bytes"]), str(row["sha256"])) for name, row in rows.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise wrong from error
    # Compared byte for byte, so that a flipped bit in the manifest itself is found too.
    if raw != _with_digest(_body(meta, files)):
        raise wrong
    return Checkpoint(folder, meta, files)


def _seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Force every file to disk, write the manifest, then force the manifest and the folders to
    disk."""
    files: dict[str, tuple[int, str]] = {}
    for name in _files(folder):
        path = folder / name
        sync(path)
        files[name] = (path.stat().st_size, sha256(path))
    write_whole(folder / MANIFEST, _with_digest(_body(meta, files)))
    # Syncing a file does not make its directory entry durable; the folder has to be synced too.
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def _put(staged: Path, final: Path) -> None:
    """Give a sealed folder its name. An existing folder is kept if it has the same files."""
    aside = staged.with_name(f"{staged.name}-old")
    if final.exists():
        # A file that was added by hand, such as a model card, is no reason to replace the folder.
        if _same(staged, final):
            shutil.rmtree(staged)
            return
        # A rename cannot replace a folder that has files, so the old one steps aside first.
        os.rename(final, aside)
    os.rename(staged, final)
    # The rename has to be on the disk before the old folder goes.
    sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _same(staged: Path, final: Path) -> bool:
    try:
        return verify(final, extra_ok=True).files == _read_manifest(staged).files
    except CheckpointError:
        return False


def _together(
    action: Callable[[], None], staged: Path, final: Path, needed: int, ranks: Ranks
) -> None:
    """Run a part of a save on every process. If it fails on one process, it fails on all."""
    problem: Exception | None = None
    try:
        action()
    except _FAILURES as error:
        problem = error
    if not ranks.any(problem is not None):
        return
    if ranks.is_main:
        shutil.rmtree(staged, ignore_errors=True)
    reason = getattr(problem, "strerror", None) or problem or "another process could not write"
    raise CheckpointError(
        f"{final}: could not be saved ({reason}); it needs {needed:,} bytes and "
        f"{_free(final):,} are free. Make room or check the folder's permissions, then start "
        "again; earlier checkpoints are untouched"
    ) from problem


def _free(path: Path) -> int:
    # The folder itself may not have been made yet, but the disk that it would be on is known.
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
