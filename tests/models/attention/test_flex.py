"""Packed sequences by FlexAttention give the numbers of SDPA, on the CPU without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.generation.packing import block_mask, pack, pack_rows, rows_mask
from mmemo.models.adapters.lora import unwrap
from mmemo.models.attention import flex
from mmemo.models.attention.shared_prefix import FLEX
from mmemo.models.build import ModelConfig, load_model
from mmemo.train.dpo.train import run_dpo
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import SftObjective, run_sft, sft_batch
from tests.generation.test_logprobs import NO_MEDIA, continuations, fresh
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import tiny, values
from tests.train.dpo.tiny import dpo_config
from tests.train.grpo.tiny import grpo_config
from tests.train.test_packing import labelled
from tests.train.tiny import sft_config


def table(allowed: flex.Allowed, tokens: int) -> Tensor:
    """(T, T) bool."""
    at, none = torch.arange(tokens), torch.tensor(0)
    return allowed(none, none, at[:, None], at[None, :])


@pytest.mark.parametrize("index", [[3, 0, 0, 1, 1, 2, 3, 0, 3], [1] * 9])
def test_what_is_allowed_is_the_block_mask(index: list[int]) -> None:
    loaded = fresh()
    batch = batch_of(loaded, [0, 1, 2, 3])
    packed = pack(unwrap(loaded.model), batch, *continuations(index=index))
    tokens, prompts = packed.modality_ids.shape[1], packed.prompt_mask.numel()
    found, wanted = table(packed.layout.allowed(), tokens), block_mask(packed)[0, 0]
    # Padding of prompts is read by nobody, whatever it looks at.
    real = torch.cat([packed.prompt_mask.flatten(), torch.ones(tokens - prompts).bool()])
    # A prompt that nobody continues may keep its padding, which comes after all of its tokens.
    assert torch.equal(found[real], wanted[real])
    assert found.diagonal().all()


def test_what_is_allowed_of_rows_is_their_mask() -> None:
    mask = torch.arange(9) < torch.tensor([4, 9, 1, 8])[:, None]
    layout = pack_rows(mask.long()).layout
    assert torch.equal(
        table(layout.allowed(), 22), rows_mask(layout.lengths, torch.device("cpu"))[0, 0]
    )


@torch.no_grad()
def test_prefixes_and_rows_by_flex_are_those_by_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attend = flex.attend

    def watched(*args: Any) -> Tensor:
        calls.append(args[0].shape[2])
        return attend(*args)

    monkeypatch.setattr(flex, "attend", watched)
    loaded = fresh()
    loaded.model.eval()
    batch, parts = batch_of(loaded, [0, 1, 2, 3]), continuations()
    rows = sft_batch(labelled(batch), packed=True)
    wanted = packed_logps(loaded.model, batch, *parts).logps
    losses = SftObjective()(loaded.model, rows).rows
    assert not calls
    lm = unwrap(loaded.model).language_model
    lm.set_attn_implementation(FLEX)
    found = packed_logps(loaded.model, batch, *parts).logps
    layers = len(lm.layers)
    assert len(calls) == layers
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        SftObjective()(loaded.model, rows).rows, losses, atol=1e-5, rtol=1e-5
    )
    assert len(calls) == 2 * layers
    # Everything else is computed as before.
    naive = naive_logps(loaded.model, batch, *parts).logps
    torch.testing.assert_close(naive, wanted, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 * layers


def test_gradients_on_the_cpu_are_those_of_sdpa() -> None:
    grads: list[Tensor] = []
    for name in ("sdpa", FLEX):
        loaded = fresh(name)
        packed_logps(
            loaded.model, batch_of(loaded, [0, 1]), *continuations([2, 3], [0, 1])
        ).logps.sum().backward()
        grads.append(unwrap(loaded.model).language_model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_the_key_sets_the_language_models_attention_alone(name: str) -> None:
    loaded = tiny(attn_implementation=name)
    model: Any = loaded.model
    used = {"flex_attention": FLEX}.get(name, name)
    assert model.language_model.config._attn_implementation == used
    assert model.encoder("video").config._attn_implementation == "sdpa"
    batch = batch_of(loaded, [0, 1])
    real, plain = batch["attention_mask"].bool(), cast(Any, tiny().model)
    found, wanted = model(**batch).logits[real], plain(**batch).logits[real]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_stage_that_packs_refuses_flash_attention_before_it_begins(tmp_path: Path) -> None:
    model = {**values(), "attn_implementation": "flash_attention_2"}
    with pytest.raises(ConfigError, match="packs nothing; set packing=null"):
        run_sft(sft_config(tmp_path, tmp_path / "a", model=model, packing={"max_tokens": 64}))
    with pytest.raises(ConfigError, match=r"packs nothing; set dpo\.shared_prefix=false"):
        run_dpo(dpo_config(tmp_path, tmp_path / "b", model=model))
    with pytest.raises(ConfigError, match=r"packs nothing; set grpo\.shared_prefix=false"):
        run_grpo(grpo_config(tmp_path, tmp_path / "c", model=model))
    assert not list(tmp_path.iterdir())


def test_attention_that_is_not_there_is_refused() -> None:
    config = parse(
        ModelConfig, {**values(), **NO_MEDIA, "attn_implementation": "flash_attention_2"}
    )
    with pytest.raises(ConfigError, match="attn_implementation: 'flash_attention_2' cannot"):
        load_model(config, ["a text"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_flex_has_the_gradients_of_sdpa(dtype: torch.dtype) -> None:
    near = 1e-3 if dtype == torch.float32 else 0.05
    found: list[tuple[Tensor, Tensor]] = []
    for name in ("sdpa", FLEX):
        loaded = fresh(name)
        model = loaded.model.to("cuda", dtype)  # pyright: ignore
        batch = {name: x.to("cuda") for name, x in batch_of(loaded, [0, 1, 2, 3]).items()}
        logps = packed_logps(model, batch, *(x.to("cuda") for x in continuations())).logps
        logps.sum().backward()
        weight = unwrap(model).language_model.layers[0].self_attn.q_proj.weight
        found.append((logps.detach(), weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)
