"""The reference: what training starts from, whatever learns and wherever it is kept."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import save_model
from mmemo.models.build import ModelConfig, load_model, set_trainable
from mmemo.train.config import RunConfig, TrainConfig, zero_stage
from mmemo.train.distributed import Ranks
from mmemo.train.engine import PlainEngine
from mmemo.train.reference import (
    AdapterOff,
    FrozenCopy,
    ReferenceKind,
    check_adapter_off,
    copied,
    make_reference,
    starts_new_adapter,
)
from tests.models.parts import TEXTS, shake, values

LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.1}


def built(trainable: tuple[str, ...] = ("lm",), **more: Any) -> nn.Module:
    loaded = load_model(parse(ModelConfig, {**values(), **more}), TEXTS)
    set_trainable(loaded.model, trainable)
    return loaded.model


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        return model(input_ids=ids, modality_ids=torch.zeros_like(ids)).logits


def learn(model: nn.Module) -> None:
    """Move every trainable weight, in place as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def under(reference: Any, model: nn.Module) -> Tensor:
    with reference.of(model) as start:
        return logits(start)


@pytest.mark.parametrize("kind", ["copy", "copy_cpu"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_copy_computes_what_training_started_from(
    kind: ReferenceKind, lora: dict[str, Any] | None
) -> None:
    model = built(("lm", "connectors"), lora=lora)
    before = logits(model)
    reference = make_reference(model, kind)
    reference.at_start(model)
    assert torch.equal(under(reference, model), before)
    learn(model)
    model.train()  # the reference has no dropout
    assert torch.equal(under(reference, model), before)
    model.eval()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    if lora is not None:  # where both exist they agree
        torch.testing.assert_close(under(AdapterOff(), model), before)


def test_only_what_learns_is_there_twice(tmp_path: Path) -> None:
    full, lora = built(), built(lora=LORA)
    for model in (full, lora):
        learnt = {id(p) for p in model.parameters() if p.requires_grad}
        reference = FrozenCopy(model)
        own = {id(p) for p in reference.model.parameters()} - {id(p) for p in model.parameters()}
        assert len(own) == len(learnt) == len(copied(model))
        assert not any(p.requires_grad for p in reference.model.parameters())
        assert {id(p) for p in model.parameters() if p.requires_grad} == learnt
    # ZeRO-3 shards what is frozen, too: nothing but the encoders is shared with it.
    alone = FrozenCopy(lora, shared=False)
    shared = {id(p) for p in alone.model.parameters()} & {id(p) for p in lora.parameters()}
    names = {name for name, p in lora.named_parameters() if id(p) in shared}
    assert names
    assert all("_tower" in name for name in names)


def test_a_continued_adapter_has_a_reference(tmp_path: Path) -> None:
    """Which has what the adapter had learnt: switching it off would not."""
    first = load_model(
        parse(ModelConfig, {**values(), "lora": LORA}), TEXTS, base_dir=tmp_path / "base"
    )
    shake(first.model, 0.05)
    save_model(first.model, first.processor, tmp_path / "first", base=first.base)
    section = parse(ModelConfig, {"path": str(tmp_path / "first")})
    model = load_model(section).model
    set_trainable(model, ["lm"])
    before = logits(model)
    reference = FrozenCopy(model)
    reference.at_start(model)
    learn(model)
    assert torch.equal(under(reference, model), before)
    assert not torch.allclose(under(AdapterOff(), model), before, atol=1e-3)
    assert not starts_new_adapter(section)
    with pytest.raises(ConfigError, match=r"adapter_off, .*or grpo\.reference=copy$"):
        check_adapter_off(section, "grpo.reference", "copy")
    merged = parse(ModelConfig, {**section.model_dump(), "adapter": "merge", "lora": LORA})
    check_adapter_off(merged, "grpo.reference", "copy")


@pytest.mark.parametrize("offload", [False, True])
def test_it_has_the_number_types_of_the_engine(offload: bool) -> None:
    """Half-precision weights are raised by the engine, and then compute otherwise."""
    model = built(dtype="bfloat16")
    reference = FrozenCopy(model, offload=offload)
    engine = PlainEngine(model, parse(TrainConfig, {"bf16": True}), Ranks(cpu=True))
    reference.at_start(engine.model)
    types = {name: p.dtype for name, p in engine.model.named_parameters()}
    assert {name: p.dtype for name, p in reference.model.named_parameters()} == types
    assert torch.float32 in types.values()
    with engine.autocast():
        assert torch.equal(under(reference, engine.model), logits(engine.model))


def test_the_stage_is_that_of_the_deepspeed_config(tmp_path: Path) -> None:
    stages = [None, "ds_configs/zero2.json", "ds_configs/zero3.json"]
    assert [zero_stage(parse(RunConfig, {"deepspeed": one})) for one in stages] == [0, 2, 3]
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not a DeepSpeed JSON config"):
        zero_stage(parse(RunConfig, {"deepspeed": str(broken)}))


def test_an_exception_leaves_the_copy_at_home_and_the_policy_in_training() -> None:
    model = built(lora=LORA)
    for reference in (FrozenCopy(model, offload=True), AdapterOff()):
        reference.at_start(model)
        model.train()
        with pytest.raises(RuntimeError, match="out of memory"), reference.of(model):
            raise RuntimeError("out of memory")
        assert model.training
        assert any(p.requires_grad for p in model.parameters())
        model.eval()
        assert torch.isfinite(under(reference, deepcopy(model))).all()
