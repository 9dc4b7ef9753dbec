"""One small world, written once for all tests of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmemo.config import parse
from mmemo.world.config import WorldConfig
from mmemo.world.render import run_world

SMALL = {
    "train_clips": 18,
    "val_clips": 6,
    "test_clips": 12,
    "train_speakers": 5,
    "val_speakers": 2,
    "test_speakers": 4,
}


def small(folder: Path, **changes: object) -> WorldConfig:
    """A config of 36 clips."""
    values = {"output_dir": str(folder), "size": SMALL, "workers": 1, **changes}
    return parse(WorldConfig, values)


def rows_of(folder: Path, name: str) -> list[dict[str, object]]:
    """The rows of one manifest."""
    text = (folder / "manifests" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world made by one process."""
    return run_world(small(tmp_path_factory.mktemp("world")))
