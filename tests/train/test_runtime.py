"""What a process computes with: deterministic kernels, TF32, pinned batches, number types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.experiments.pipeline import settings_known_to
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import MicroBatch, OptimizerStep, pinned, prefetch
from mmemo.train.dpo.train import run_dpo
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import run_sft
from tests.models.parts import values
from tests.train.dpo.tiny import dpo_config
from tests.train.grpo.tiny import grpo_config
from tests.train.tiny import sft_config


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    fixed, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(fixed)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize(
    ("given", "device", "fixed"),
    [(None, "cpu", True), (None, "cuda", False), (True, "cuda", True), (False, "cpu", False)],
)
def test_kernels_are_deterministic_on_the_cpu_or_if_asked_for(
    given: bool | None, device: str, fixed: bool
) -> None:
    train = parse(TrainConfig, {"full_determinism": given})
    runtime.prepare(train, RunConfig(threads=1), on(device))
    assert runtime.kernels()["deterministic"] is fixed
    assert torch.are_deterministic_algorithms_enabled() is fixed


def test_tf32_is_set_on_cuda_and_refused_elsewhere() -> None:
    for wanted in (True, False):
        runtime.prepare(TrainConfig(tf32=wanted), RunConfig(threads=1), on("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.backends.cudnn.allow_tf32 is wanted
    runtime.prepare(TrainConfig(), RunConfig(threads=1), on("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 is False
    with pytest.raises(ConfigError, match=r"train\.tf32 needs a CUDA device"):
        runtime.prepare(TrainConfig(tf32=True), RunConfig(threads=1), on("cpu"))


def test_the_log_says_how_it_computes(rows: Path, tmp_path: Path) -> None:
    run_sft(sft_config(rows, tmp_path / "run", train={"max_steps": 1}))
    (event,) = RunRecord(tmp_path / "run").events("train_start")
    assert (event["deterministic"], event["tf32"]) == (True, False)
    # As an earlier version, whose default it was, wrote it: such a run can be resumed.
    assert event["identity"]["config"]["train"]["full_determinism"] is True


def test_a_stage_that_was_finished_with_the_earlier_default_stays_finished() -> None:
    config = parse(
        type(sft_config(Path("a"), Path("b"))), sft_config(Path("a"), Path("b")).model_dump()
    )
    before = config.model_dump(mode="json")
    before["train"]["full_determinism"] = True
    for new in ("max_logits", "tf32"):
        del before["train"][new]
    del before["packing"]
    assert settings_known_to(before, config) == before


@dataclass(frozen=True, slots=True)
class Pass:
    ids: Tensor
    keys: tuple[str, ...]


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the forward passes of a preference batch."""
    seen: list[int] = []

    def pin_memory(self: Tensor) -> Tensor:
        seen.append(int(self))
        return self + 100

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    one = [torch.tensor(number) for number in range(4)]
    batch = {"a": one[0], "passes": [Pass(one[1], ("x",))], "m": {"b": one[2]}, "n": 3}
    step = OptimizerStep(0, 0, [MicroBatch({**batch, "t": (one[3],)}, 7)])
    found = pinned(step)
    assert sorted(seen) == [0, 1, 2, 3]
    made = found.micro_batches[0]
    assert (made.index, made.batch["n"], made.batch["passes"][0].keys) == (7, 3, ("x",))
    assert int(made.batch["passes"][0].ids) == 101
    assert int(made.batch["t"][0]) == 103
    with prefetch(lambda: iter([step]), 1, pin=True) as steps:
        assert int(next(steps).micro_batches[0].batch["m"]["b"]) == 102
    with prefetch(lambda: iter([step]), 1) as steps:
        assert int(next(steps).micro_batches[0].batch["m"]["b"]) == 2


def test_float16_is_refused_in_one_sentence_by_every_stage(rows: Path, tmp_path: Path) -> None:
    model = {**values(), "lora": {"r": 2}, "dtype": "float16"}
    says = r"float16 needs loss scaling.*dtype=bfloat16"
    with pytest.raises(ConfigError, match=says):
        run_sft(sft_config(rows, tmp_path / "sft", model=model))
    with pytest.raises(ConfigError, match=says):
        run_dpo(dpo_config(rows, tmp_path / "dpo", model=model))
    with pytest.raises(ConfigError, match=says):
        run_grpo(grpo_config(rows, tmp_path / "grpo", model=model))
    assert not list(tmp_path.iterdir())


def test_a_saved_model_in_float16_is_refused_too(rows: Path, tmp_path: Path) -> None:
    from mmemo.models.adapters.lora import save_full

    made: Any = load_model(parse(ModelConfig, {**values(), "dtype": "float16"}), ["a text"])
    save_full(made.model, made.processor, tmp_path / "half")
    section = {"path": str(tmp_path / "half"), "lora": {"r": 2}}
    with pytest.raises(ConfigError, match="float16 needs loss scaling"):
        run_sft(sft_config(rows, tmp_path / "run", model=section))
