"""Two ranks learn with a native model what one does, however DeepSpeed holds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmemo.train.distributed import run_ranks
from tests.train.native_ranks_job import cases, prepare

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
NAMES = [(name, engine) for name, _, _, engines in cases(Path()) for engine in engines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native_ranks")
    prepare(folder)
    command = [sys.executable, "-m", "tests.train.native_ranks_job", str(folder)]
    for size in (1, 2):
        assert run_ranks(command, size, cpu=True) == 0
    return folder


@pytest.mark.parametrize(("name", "engine"), NAMES)
def test_two_ranks_learn_what_one_does(made: Path, name: str, engine: str) -> None:
    got, expected = (
        load_file(folder / "final/adapter_model.safetensors")
        for folder in (made / f"2/{name}-{engine}", made / f"1/{name}-plain")
    )
    assert set(got) == set(expected)
    # B begins at zero.
    assert any(weight.any() for key, weight in expected.items() if _is_b(key))
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-3, atol=5e-5, msg=key)


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_the_same_completions_are_drawn(made: Path, engine: str) -> None:
    said = [
        [json.loads(line)["completions"] for line in file.read_text().splitlines()]
        for file in (
            made / f"2/grpo-{engine}/completions.jsonl",
            made / "1/grpo-plain/completions.jsonl",
        )
    ]
    # The main rank writes down its own.
    assert len(said[0]) == len(said[1]) // 2
    assert all(group in said[1] for group in said[0])


def _is_b(key: str) -> bool:
    return "lora_B" in key or "experts_B" in key
