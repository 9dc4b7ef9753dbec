"""On a CUDA device: features, training and answers work there and resume to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mmemo.train.sft import run_sft
from tests.train.tiny import sft_config, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_sft_on_cuda_is_the_same_twice_and_bf16_trains(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    same = {"full_determinism": True}
    first = run_sft(sft_config(tmp_path / "rows", tmp_path / "a", train=same))
    second = run_sft(sft_config(tmp_path / "rows", tmp_path / "b", train=same))
    assert weights(first) == weights(second)
    half = run_sft(sft_config(tmp_path / "rows", tmp_path / "c", train={"bf16": True}))
    assert weights(half) != weights(first)
