"""Free memory is the machine's, less what a container or the other ranks leave of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from mmemo.generation import free_memory
from mmemo.generation.free_memory import fits, free_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 1000 bytes available, and no limit."""

    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def limit(folder: Path, most: str, used: int, cached: int = 0) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")


def test_available_memory_with_some_to_spare() -> None:
    assert free_bytes(CPU) == 1000
    assert fits(800, CPU)
    assert not fits(801, CPU)


def test_a_containers_limit_counts(machine: Path) -> None:
    limit(machine, "600", 500, cached=100)
    assert free_bytes(CPU) == 200
    limit(machine, "600", 900)
    assert free_bytes(CPU) == 0
    limit(machine, "max", 500)
    assert free_bytes(CPU) == 1000


def test_ranks_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 250
