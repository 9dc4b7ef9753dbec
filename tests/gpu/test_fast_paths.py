"""Every fast path of training, on and off, through whole stages: the same losses and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo.train.dpo.train import run_dpo
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import run_sft
from tests.generation.test_rollout import PLAIN
from tests.models.parts import values
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.grpo.tiny import grpo_config
from tests.train.tiny import sft_config, write_rows

STAGES: dict[str, tuple[Callable[..., Any], Callable[[Any], Path]]] = {
    "sft": (sft_config, run_sft),
    "grpo": (grpo_config, run_grpo),
    "dpo": (dpo_config, run_dpo),
}
LORA = {**values(), "lora": {"r": 4, "lora_dropout": 0.0}}
FLEX = {"model": {**LORA, "attn_implementation": "flex_attention"}}
CHUNKS, WHOLE = {"train": {"max_logits": 500}}, {"train": {"max_logits": 0}}


@dataclass(frozen=True)
class Case:
    """A stage with one fast path on and off; sections of its config are merged in."""

    stage: str
    on: dict[str, Any]
    off: dict[str, Any]
    cpu: bool = False
    """Also run on the CPU. One case a stage is, so that this file is never found broken on the day
    that there is a GPU; on the CPU each path has a test of its own."""


def switch(section: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {section: {key: True}}, {section: {key: False}}


CASES = {
    "sft_packing": Case("sft", {"packing": {"max_tokens": 400}}, {}, cpu=True),
    "sft_chunks": Case("sft", CHUNKS, WHOLE),
    "sft_prefetch": Case("sft", {"run": {"prefetch": 2}}, {"run": {"prefetch": 0}}),
    "sft_checkpointing": Case("sft", *switch("train", "gradient_checkpointing")),
    "grpo_chunks": Case("grpo", CHUNKS, WHOLE),
    "grpo_prefix": Case("grpo", *switch("grpo", "shared_prefix")),
    "grpo_drawing": Case("grpo", {}, {"rollout": {**PLAIN, "whole_steps": False}}, cpu=True),
    "grpo_graphs": Case("grpo", {"rollout": {"cuda_graphs": True}}, {"rollout": PLAIN}),
    "dpo_chunks": Case("dpo", CHUNKS, WHOLE),
    "dpo_prefix": Case("dpo", *switch("dpo", "shared_prefix"), cpu=True),
    "dpo_stored": Case("dpo", {}, {"dpo": {"reference": "adapter_off"}}),
    "sft_flex": Case(
        "sft",
        {**FLEX, "packing": {"max_tokens": 400}},
        {"model": LORA, "packing": {"max_tokens": 400}},
    ),
    "grpo_flex": Case("grpo", FLEX, {"model": LORA}),
    "dpo_flex": Case("dpo", FLEX, {"model": LORA}),
}


def cases() -> list[Any]:
    """Each on CUDA, and those for the CPU there too."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return [
        pytest.param(case, device, id=f"{name}-{device}", marks=marks)
        for name, case in CASES.items()
        for device, marks in (("cpu", []), ("cuda", [pytest.mark.gpu, missing]))
        if device == "cuda" or case.cpu
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    write_pairs(folder)
    return folder


def trained(
    case: Case, given: dict[str, Any], rows: Path, out: Path, device: str, *, bf16: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each of two steps, and the weights in the end."""
    make, run = STAGES[case.stage]
    changes = dict(given)
    # A path that changes the order of sums must not decide between two kernels, nor two tokens.
    changes["train"] = {
        **changes.get("train", {}),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "bf16": bf16,
        "full_determinism": True,
    }
    changes["run"] = {**changes.get("run", {}), "use_cpu": device == "cpu", "save_steps": 100}
    final = run(make(rows, out, **changes))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = next(f for f in final.iterdir() if f.name.endswith("model.safetensors"))
    return [line["loss"] for line in lines if "loss" in line], load_file(saved)


@pytest.mark.parametrize(("case", "device"), cases())
def test_on_is_off(case: Case, device: str, rows: Path, tmp_path: Path) -> None:
    one = trained(case, case.on, rows, tmp_path / "on", device, bf16=False)
    other = trained(case, case.off, rows, tmp_path / "off", device, bf16=False)
    assert len(one[0]) == 2
    assert one[0] == pytest.approx(other[0], abs=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        # AdamW divides by the gradient's size, so a weight moves by the learning rate at most,
        # wherever its gradient is nothing but rounding.
        moved = (weight - other[1][name]).abs()
        assert moved.max() < 3e-3, name
        assert (moved > 1e-5).float().mean() < 0.01, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_is_off_in_bfloat16(case: Case, rows: Path, tmp_path: Path) -> None:
    """Drawn tokens may differ by rounding, so a step that draws has no loss to compare."""
    one = trained(case, case.on, rows, tmp_path / "on", "cuda", bf16=True)
    other = trained(case, case.off, rows, tmp_path / "off", "cuda", bf16=True)
    if case.stage != "grpo":
        assert one[0] == pytest.approx(other[0], abs=0.05)
    assert all(torch.isfinite(weight).all() for weight in one[1].values())
