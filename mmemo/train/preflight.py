"""What the ranks of a run must have in common, compared before anything is loaded.

Without it a node with an old checkout trains another model, and one that does not see the output
folder dies in the middle, while the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmemo
from mmemo.config import Config, dump
from mmemo.errors import TrainingError
from mmemo.media.config import is_url
from mmemo.run_log import versions
from mmemo.train.distributed import Ranks


def preflight(config: Config, folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """Compare code, libraries, config and file system of the ranks.

    Returns:
        For each host once: its name, ranks, free memory and free disk space at ``folder`` in GiB,
        and whether it sees the main rank's feature store; nothing for one rank.

    Raises:
        TrainingError: the ranks differ, or one does not see the main rank's ``folder``.
    """
    if ranks.size == 1:
        return []
    mine = {
        "host": socket.gethostname(),
        "code": code_digest(),
        "versions": versions(),
        "config": dump(config),
    }
    everyone = [json.loads(text) for text in ranks.all_gather_text(json.dumps(mine))]
    problem = difference(everyone)
    if problem is not None:
        raise TrainingError(problem)
    blind = [n for n, seen in enumerate(_see(folder, ranks)) if not seen]
    if blind:
        where = sorted({str(everyone[n]["host"]) for n in blind})
        raise TrainingError(
            f"{', '.join(where)}: not the folder {folder} of rank 0 on {everyone[0]['host']}; put "
            "output_dir on a file system that all nodes share (store.path may be on a disk of each "
            "node's own, which then encodes the clips for itself)"
        )
    store: Any = getattr(config, "store", None)
    # What lies at a URL is copied by each machine for itself.
    path: Path | None = None
    if store is not None and store.enabled and store.path and not is_url(store.path):
        path = Path(store.path)
    shared = [True] * ranks.size if path is None else _see(path, ranks)
    free = {"memory_gib": _memory(), "disk_gib": round(shutil.disk_usage(folder).free / 2**30, 1)}
    told = [json.loads(text) for text in ranks.all_gather_text(json.dumps(free))]
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (one, has) in enumerate(zip(everyone, told, strict=True)):
        host = hosts.setdefault(
            one["host"], {"host": one["host"], "ranks": [], **has, "shared_store": shared[rank]}
        )
        host["ranks"].append(rank)
    return list(hosts.values())


def difference(everyone: Sequence[Mapping[str, Any]]) -> str | None:
    """What the first rank that differs from rank 0 has differently, and what to do; or None.

    Args:
        everyone: ``host``, ``code``, ``versions`` and ``config`` of each rank.
    """
    first = everyone[0]
    for rank, other in enumerate(everyone[1:], start=1):
        who = f"rank {rank} on {other['host']}"
        for name, version in first["versions"].items():
            if other["versions"].get(name) != version:
                return (
                    f"{who} has {name} {other['versions'].get(name)}, and rank 0 on "
                    f"{first['host']} has {version}; install the same version on every node"
                )
        if other["code"] != first["code"]:
            return (
                f"{who} runs other code of mmemo than rank 0 on {first['host']}; use the same "
                "checkout on every node"
            )
        one, two = _flat(first["config"]), _flat(other["config"])
        wrong = [key for key in one | two if one.get(key) != two.get(key)]
        if wrong:
            return (
                f"{who} has another config than rank 0 on {first['host']} ({', '.join(wrong[:3])});"
                " start the same command with the same file on every node"
            )
    return None


def code_digest() -> str:
    """SHA-256 over the package's Python files."""
    digest, root = hashlib.sha256(), Path(mmemo.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _flat(values: Any, at: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        items: Mapping[str, Any] = values
        return {
            key: one
            for name, value in items.items()
            for key, one in _flat(value, f"{at}.{name}" if at else name).items()
        }
    return {at: values}


def _see(folder: Path, ranks: Ranks) -> list[bool]:
    """For each rank, whether ``folder`` is the main rank's: whether it sees a file that was put
    there."""
    token = ranks.broadcast_text(f".seen-{uuid.uuid4().hex}.tmp")
    file = folder / token
    failed = ""
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")
        except OSError as error:
            failed = f"{folder}: cannot be written ({error.strerror}); check the path"
    if failed := ranks.broadcast_text(failed):
        raise TrainingError(failed)
    # A network file system may remember for a moment that a file was not there; reading the
    # folder anew shows it.
    try:
        seen = any(one.name == token for one in folder.iterdir())
    except OSError:
        seen = False
    found = ranks.all_gather_text("1" if seen else "")
    if ranks.is_main:
        file.unlink(missing_ok=True)
    return [bool(text) for text in found]


def _memory() -> float | None:
    """Free memory in GiB (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    return None if kib is None else round(kib / 2**20, 1)
