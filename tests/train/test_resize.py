"""A run goes on with another number of ranks, another ZeRO stage, or without DeepSpeed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmemo.run_log import RunRecord
from mmemo.train.distributed import run_ranks
from tests.train.native_ranks_job import prepare
from tests.train.resize_job import PAIRS, STAGES
from tests.train.resize_stages_job import CASES, STOPPED
from tests.train.resize_stages_job import SIZES as CHANGES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resize")
    command = [sys.executable, "-m", "tests.train.resize_job", str(folder)]
    assert run_ranks([*command, "begin"], 2, cpu=True) == 0
    for size in SIZES:
        assert run_ranks([*command, "go_on"], size, cpu=True) == 0
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("begun", "stage"), PAIRS)
def test_the_weights_are_those_of_the_run_that_was_not_stopped(
    made: Path, size: int, begun: str, stage: str
) -> None:
    name = f"{size}-{begun}-{stage}"
    assert RunRecord(made / name).events("resume")[-1]["step"] == 3
    got, expected = (load_file(made / f"{x}.safetensors") for x in (name, begun))
    assert set(got) == set(expected)
    if (size, begun) == (2, stage):
        assert all(torch.equal(weight, got[key]) for key, weight in expected.items())
    for key, weight in expected.items():
        if key.startswith("spare") and "plain" in (stage, begun) and stage != begun:
            continue  # nothing uses it: it stays under plain torch, and decays under DeepSpeed
        # Sums over ranks have another order.
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6, msg=key)
    stopped = load_file(made / begun / "checkpoint-3/trainable.safetensors")
    assert not torch.equal(got["body.0.weight"], stopped["body.0.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_names_and_no_pickle(made: Path, stage: str) -> None:
    folder = made / stage / "checkpoint-3"
    assert not [x for x in folder.rglob("*") if x.suffix in (".pt", ".pkl", ".bin")]
    state = load_file(folder / "optimizer.safetensors")
    plain = load_file(made / "plain/checkpoint-3/optimizer.safetensors")
    used = {key for key in plain if "spare" not in key}
    assert used <= set(state)
    for key in used:
        torch.testing.assert_close(state[key], plain[key], rtol=1e-4, atol=1e-7, msg=key)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT, GRPO and DPO of a native model, begun by some ranks and ended by others."""
    folder = tmp_path_factory.mktemp("resize_stages")
    prepare(folder)
    command = [sys.executable, "-m", "tests.train.resize_stages_job", str(folder)]
    for size in sorted({begun for begun, _ in CHANGES}):
        assert run_ranks([*command, "begin"], size, cpu=True) == 0
    for size in sorted({size for _, size in CHANGES}):
        assert run_ranks([*command, "go_on"], size, cpu=True) == 0
    return folder


@pytest.mark.parametrize(("begun", "size"), CHANGES)
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_stage_goes_on_with_other_ranks(
    trained: Path, name: str, engine: str, begun: int, size: int
) -> None:
    folder = trained / f"{begun}-{size}/{name}-{engine}"
    assert RunRecord(folder).events("resume")[-1]["step"] == STOPPED
    got, expected, stopped = (
        load_file(file)
        for file in (
            folder / "final/adapter_model.safetensors",
            trained / f"{begun}/{name}-{engine}/final/adapter_model.safetensors",
            folder / f"checkpoint-{STOPPED}/trainable.safetensors",
        )
    )
    assert set(got) == set(expected)
    for key, weight in expected.items():
        # Sums over ranks have another order, and Adam divides small gradients by small moments.
        torch.testing.assert_close(got[key], weight, rtol=1e-3, atol=5e-5, msg=key)
    moved = [
        (weight - before).abs().max()
        for key, weight in got.items()
        for name, before in stopped.items()
        if "lora_B" in key and name.replace(".default", "").endswith(key)
    ]
    assert moved
    assert max(moved) > 1e-3  # twenty times what the comparison allows
