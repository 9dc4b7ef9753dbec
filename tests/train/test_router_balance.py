"""The load-balancing loss of a mixture of experts is transformers' own, and moves its routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.train.router_balance import RouterBalanced
from mmemo.train.sft import SftObjective, sft_batch
from tests.models.qwen.kinds import KINDS, batch_of, load, rows


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("qwen3_omni", KINDS["qwen3_omni"].save(tmp_path_factory.mktemp("moe")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_transformers_loss_of_real_tokens(loaded: Any, checkpointing: bool) -> None:
    model: Any = loaded.model
    batch = sft_batch(batch_of(loaded, rows("<audio>", 3, "angry"), left=False))
    assert not bool(batch["attention_mask"].all())
    kind = KINDS["qwen3_omni"].model
    embeds = model.embed(batch["input_ids"], batch["modality_ids"], batch)
    with torch.no_grad():
        wanted = kind.forward(
            model,
            inputs_embeds=embeds,
            position_ids=batch["mrope_positions"].transpose(0, 1),
            attention_mask=batch["attention_mask"],
            output_router_logits=True,
        ).aux_loss
    plain = SftObjective()(model, batch)
    balanced = RouterBalanced(SftObjective(), 0.5)
    quiet = balanced(model, batch)  # not in training: logged alone
    torch.testing.assert_close(quiet.rows, plain.rows)
    model.train()
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = balanced.weight(batch)
    try:
        found = balanced(model, batch)
        more = (found.rows.sum() - plain.rows.sum()) / tokens
        torch.testing.assert_close(more, 0.5 * wanted)
        total, count = found.metrics["router_aux_loss"]
        torch.testing.assert_close(total / count, wanted)
        gate = model.language_model.layers[0].mlp.gate.weight
        (moved,) = torch.autograd.grad(found.rows.sum() - plain.rows.sum(), gate)
    finally:
        model.language_model.gradient_checkpointing_disable()
        model.eval()
    before = gate.detach().clone()
    with torch.no_grad():
        gate -= 0.05 * moved / moved.norm()
        total, count = balanced(model, batch).metrics["router_aux_loss"]
        gate.copy_(before)
    assert total / count < wanted


def test_it_reaches_the_model_under_an_adapter(loaded: Any) -> None:
    adapted: Any = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"]))
    batch = sft_batch(batch_of(loaded, rows("", 2, "sad"), left=False))
    assert unwrap(adapted) is loaded.model
    assert "router_aux_loss" in RouterBalanced(SftObjective(), 1.0)(adapted, batch).metrics
    adapted.unload()


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    dense = load("qwen2_audio", KINDS["qwen2_audio"].save(tmp_path))
    batch = sft_batch(batch_of(dense, rows("", 1, "sad"), left=False))
    with pytest.raises(ConfigError, match="no mixture of experts; set router_aux_loss_coef to 0"):
        RouterBalanced(SftObjective(), 0.1)(dense.model, batch)
