"""How much memory drawing may still take: of the GPU, or of the machine for a run on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

SHARE = 0.8
"""Share of the free memory that is planned with; the rest is for what is not counted."""
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on ``device``.

    On a GPU, what torch has reserved and does not use counts too. On the CPU it is the available
    RAM, no more than a container or a batch job allows, divided by the ranks on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    free = min(psutil.virtual_memory().available, _left_in_group(_CGROUP))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` more bytes fit on ``device`` with some to spare."""
    return size <= SHARE * free_bytes(device)


def _left_in_group(folder: Path) -> int:
    """Bytes left of the limit that the control group (version 2) sets; huge without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = {name: int(count) for name, count in (line.split() for line in lines)}
        # The kernel gives cached files up before it refuses memory.
        return max(0, int(limit) - used + counts.get("inactive_file", 0))
    except (OSError, ValueError):  # no such file, or "max"
        return 2**62
