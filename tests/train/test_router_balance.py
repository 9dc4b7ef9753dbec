"""The load-balancing loss of a mixture of experts is transformers' own, and moves its routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

from mmemo.errors import ConfigError
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.models.adapters.lora import unwrap
from mmemo.models.transformers_compat import find_routers
from mmemo.train.router_balance import RouterBalanced, with_router_loss
from mmemo.train.sft import SftObjective, sft_batch
from mmemo.train.trainer import Loss
from tests.models.qwen.kinds import KINDS, batch_of, load, rows
from tests.train.grpo.tiny import reward
from tests.train.test_native import run, train, write_pairs, write_rows


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
    with pytest.raises(
        ConfigError, match=r"no mixture of experts; set train\.router_aux_loss_coef"
    ):
        RouterBalanced(SftObjective(), 0.1)(dense.model, batch)


def said_of_tokens(model: Any, prompts: Any, answers: list[list[int]]) -> Any:
    """transformers' loss of two prompts' tokens, each once, and their answers', row by row.

    The last token of an answer predicts nothing and is not computed."""
    heard: list[list[torch.Tensor]] = []
    layers = find_routers(model.language_model)
    hooks = [
        one.register_forward_hook(lambda _, __, out, n=n: heard[n].append(out[0]))
        for n, one in enumerate(layers)
    ]
    every: list[list[torch.Tensor]] = [[] for _ in layers]
    for place, mask in enumerate(prompts["attention_mask"].bool()):
        ids = prompts["input_ids"][place][mask]
        for number, answer in enumerate(answers):
            heard[:] = [[] for _ in layers]
            row = torch.cat([ids, torch.tensor(answer[:-1])])[None]
            model.language_model(
                inputs_embeds=model.get_input_embeddings()(row),
                position_ids=torch.arange(row.shape[1]).expand(3, 1, -1),
            )
            for layer, found in zip(every, heard, strict=True):
                layer.append(found[0] if number == 0 else found[0][len(ids) :])
    for hook in hooks:
        hook.remove()
    config = model.language_model.config
    return load_balancing_loss_func(
        tuple(torch.cat(layer) for layer in every), config.num_experts, config.num_experts_per_tok
    )


def test_a_shared_prompt_counts_once_and_a_reference_not(loaded: Any) -> None:
    """Two prompts with two answers each, in two packed passes with gradient and one without."""
    model: Any = loaded.model.train()
    prompts = batch_of(loaded, rows("", 2))
    given = {k: x for k, x in prompts.items() if isinstance(x, torch.Tensor) and k != "labels"}
    answers = [[30, 41, 52], [60, 71]]
    ids = torch.tensor([[30, 41, 52], [60, 71, 0]] * 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]] * 2)
    at = torch.tensor([0, 0, 1, 1])

    def compute(_: Any, batch: Any) -> Loss:
        with torch.no_grad():
            naive_logps(model, given, ids, mask, at)
        return Loss(-batch(model, given, ids, mask, at).logps.sum(1), {})

    try:
        plain = compute(model, packed_logps).rows
        found = with_router_loss(compute, model, packed_logps, 4.0, 0.5, learning_only=True)
        wanted = said_of_tokens(model, prompts, answers)
        torch.testing.assert_close(found.metrics["router_aux_loss"][0] / 4, wanted)
        added = (found.rows - plain).sum() / 4
        torch.testing.assert_close(added, 0.5 * wanted, atol=1e-3, rtol=0)
        twice = with_router_loss(
            lambda one, batch: (compute(one, batch), compute(one, batch))[1],
            *(model, packed_logps, 4.0, 0.5),
            learning_only=True,
        )
        torch.testing.assert_close(twice.rows, found.rows)
        # Padding of ordinary rows counts nothing, and their prompts count with each answer.
        other = with_router_loss(compute, model, naive_logps, 4.0, 0.5, learning_only=True)
        count = sum(len(answer) for answer in answers)
        assert other.metrics["router_aux_loss"][0] != found.metrics["router_aux_loss"][0]
        assert 0.5 < float(other.metrics["router_aux_loss"][0]) / 4 < count
        everything = with_router_loss(compute, model, packed_logps, 4.0, 0.5)
        assert not torch.equal(everything.rows, found.rows)
        none = with_router_loss(compute, model, packed_logps, 4.0, 0.0, learning_only=True)
        assert torch.equal(none.rows, plain)
        with torch.no_grad():
            quiet = with_router_loss(compute, model, packed_logps, 4.0, 0.5, learning_only=True)
        assert torch.equal(quiet.rows, plain.detach())
        assert not quiet.metrics
    finally:
        model.eval()


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_every_stage_adds_it(stage: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    write_pairs(tmp_path / "rows")
    kind = KINDS["qwen3_omni"]
    kind.save(tmp_path / "moe")
    lora = {"r": 4, "lora_dropout": 0.0, "target_parameters": ["experts.down_proj"]}
    model = {"native": kind.settings, "sampling": {"frames": 4}, "lora": lora}
    more: dict[str, Any] = {}
    if stage == "grpo":
        more = {
            "rewards": [reward("even")],
            "rollout": {"num_generations": 2, "max_completion_length": 4},
            "grpo": {"beta": 0.04},
        }
    if stage == "dpo":
        more = {"objective": {"terms": [{"kind": "avem_dpo"}]}}
    logged: list[dict[str, Any]] = []
    for coefficient in (0.0, 1.0):
        steps = {"max_steps": 1, "router_aux_loss_coef": coefficient}
        values = train(tmp_path, tmp_path / "moe", model=model, train=steps, **more)
        if stage == "dpo":
            values["data"] = {**values["data"], "manifests": [str(tmp_path / "rows/pairs.jsonl")]}
        out = run(tmp_path, stage, f"{stage}{coefficient}", **values)
        logged.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
    assert "router_aux_loss" not in logged[0]
    assert logged[1]["loss"] - logged[0]["loss"] == pytest.approx(
        logged[1]["router_aux_loss"], abs=1e-4
    )
