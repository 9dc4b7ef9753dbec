"""A model for ZeRO-3 that no rank holds whole is the model that each rank would have read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo.models.config import AdapterConfig, ModelConfig
from mmemo.train.config import TrainConfig
from mmemo.train.distributed import run_ranks
from mmemo.train.zero.loading import READS_WEIGHTS, obstacle
from tests.models.native_files import save_omni
from tests.train.native_ranks_job import prepare
from tests.train.zero_loading_job import write_configs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero_loading")
    prepare(folder)
    write_configs(folder)
    command = [sys.executable, "-m", "tests.train.zero_loading_job", str(folder)]
    assert run_ranks(command, 2, cpu=True) == 0
    return folder


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_shares_are_those_of_the_whole_model(made: Path, rank: int) -> None:
    found: dict[str, Any] = json.loads((made / f"{rank}.json").read_text())
    assert found["sharded"]
    assert found["names"]
    assert found["equal"]
    assert found["learns"]
    # Rounded up in each weight.
    assert 0.5 <= found["share"] < 0.51
    assert all("language_model" in name or "lm_head" in name for name in found["shared"])
    assert any("audio_tower" in name for name in found["whole"])
    assert found["features"][0] == found["features"][1]
    assert found["reference"][0] == found["reference"][1]
    quantized, draws = found["refused"]
    assert "zero3_init_flag is true, but quantized weights are made of whole ones" in quantized
    assert "each rank draws completions" in draws


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_stages_learn_the_same(made: Path, stage: str) -> None:
    got, expected = (
        load_file(made / f"{stage}-{flag}/final/adapter_model.safetensors")
        for flag in (True, False)
    )
    assert set(got) == set(expected)
    assert any(weight.any() for key, weight in expected.items() if "lora_B" in key)
    for key, weight in expected.items():
        assert torch.equal(got[key], weight), key


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("zero_obstacles")
    save_omni(folder / "omni")
    return str(folder / "omni")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({}, None),
        ({"lora": {}}, None),
        ({"lora": {"use_dora": True}}, "use_dora"),
        ({"lora": {"experts": {}}}, "experts"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({"quantization": "nf4", "lora": {}}, "quantized"),
        ({"new_tokens": ["<au12>"]}, "new tokens"),
        ({"face": {"encoder": "x"}}, "branches"),
        ({"path": "Qwen/Qwen2.5-Omni-7B", "lora": {}}, "copied from a hub"),
        ({"path": None, "text": "x"}, "built from parts"),
    ],
)
def test_what_needs_whole_weights_is_named(
    omni: str, model: dict[str, Any], why: str | None
) -> None:
    found = obstacle(ModelConfig(**{"path": omni, **model}), TrainConfig())
    assert (found is None) if why is None else (found is not None and why in found)


def test_every_setting_of_an_adapter_is_decided_on() -> None:
    harmless = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
    assert set(AdapterConfig.model_fields) == harmless | (
        READS_WEIGHTS & AdapterConfig.model_fields.keys()
    )


def test_a_cast_needs_whole_weights(omni: str) -> None:
    half = TrainConfig(bf16=True)
    assert "train.bf16" in str(obstacle(ModelConfig(path=omni), half))
    assert obstacle(ModelConfig(path=omni, dtype="bfloat16"), half) is None
