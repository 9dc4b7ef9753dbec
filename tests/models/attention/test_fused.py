"""Fused weights say what the modules say, or stand back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmemo.generation.decoder import Decoder
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.merging import merged, merged_bytes, whole_weight
from mmemo.models.attention.fused import fuse
from mmemo.models.attention.shared_prefix import SharedPrompts
from mmemo.models.backbone import Backbone
from mmemo.models.build import Loaded
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import shake, tiny
from tests.models.qwen.kinds import KINDS, load, rows
from tests.models.qwen.kinds import batch_of as native_batch
from tests.models.qwen.kinds import train_tokenizer as train_qwen
from tests.models.qwen.test_omni import (
    SETTINGS,
    QwenOmniBackbone,
    clip,
    make_batch,
    sample,
    tiny_thinker,
    train_tokenizer,
)

WIDE = {"scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "vocab_size": 400}}
LORA = {"r": 4, "lora_alpha": 8}


def fresh(**lora: Any) -> Loaded:
    loaded = tiny(lora={**LORA, **lora})
    shake(loaded.model, 0.2)
    loaded.model.eval()
    return loaded


def steps(backbone: Backbone, prompts: Any, *, fused: bool, shared: bool = True) -> list[Tensor]:
    """Logits of two rows a prompt over six tokens, of which the first rows end early."""
    made = fuse(backbone.language_model) if fused else None
    assert (made is not None) == fused
    with torch.no_grad():
        decoder = Decoder(backbone, prompts, 2, 8, shared=shared, fused=made)
        assert decoder.shared == shared
        found, words = [decoder.logits], torch.arange(2 * len(prompts["input_ids"])) + 60
        for step in range(6):
            if step in (2, 4):  # ragged first, then without a whole prompt
                kept = torch.arange(1 if step == 2 else 2, len(words))
                decoder.keep(kept)
                words = words[kept]
            found.append(decoder.advance(words))
            words = words + 7
    return found


def omni() -> tuple[QwenOmniBackbone, Any]:
    tokenizer = train_tokenizer()
    backbone = QwenOmniBackbone(tiny_thinker(tokenizer), tokenizer, settings=SETTINGS).eval()
    clips = {"a": clip(1), "b": clip(2, seconds=1.3, size=(64, 40))}
    rows = [sample("<video><audio>", "a"), sample("<audio>", "b"), sample("", "b")]
    return backbone, make_batch(backbone, clips, rows)


def shake_norms(lm: Any) -> None:
    """Give the norms of queries and keys weights that tell the heads' values apart."""
    torch.manual_seed(0)
    for layer in lm.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            nn.init.uniform_(norm.weight, 0.2, 2.0)


def qwen3_vl(folder: Path) -> tuple[Any, Any]:
    loaded = load("qwen3_vl", KINDS["qwen3_vl"].save(folder), lora={"r": 4, "lora_dropout": 0.0})
    shake(loaded.model, 0.1)
    model = unwrap(loaded.model.eval())
    shake_norms(model.language_model)
    samples = [*rows("<video>", 2), rows("", 3)[2]]
    return model, native_batch(loaded, samples)


def qwen3(folder: Path) -> tuple[Any, Any]:
    tokenizer = train_qwen({})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = tiny(text=str(folder), lora=LORA)
    shake(loaded.model, 0.2)
    model = unwrap(loaded.model.eval())
    shake_norms(model.language_model)
    return model, batch_of(loaded, [0, 1, 2])


@pytest.mark.parametrize("family", ["llama", "omni", "qwen3", "qwen3_vl"])
def test_steps_are_the_modules_own(family: str, tmp_path: Path) -> None:
    """Prompts of several lengths; for Omni, fewer heads of keys, biases and M-RoPE; for Qwen3,
    norms of queries and keys."""
    if family == "omni":
        backbone, prompts = omni()
    elif family != "llama":
        backbone, prompts = (qwen3 if family == "qwen3" else qwen3_vl)(tmp_path / family)
    else:
        loaded = fresh()
        backbone, prompts = unwrap(loaded.model), batch_of(loaded, [0, 1, 2])
    assert not bool(prompts["attention_mask"].all())
    plain = steps(backbone, prompts, fused=False, shared=False)
    for wanted, shared, fused in zip(
        plain,
        steps(backbone, prompts, fused=False),
        steps(backbone, prompts, fused=True),
        strict=True,
    ):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(shared, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused, wanted, atol=1e-5, rtol=1e-5)


def test_the_adapter_is_in_the_weight_and_the_base_is_not_touched() -> None:
    loaded = fresh()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    x = torch.randn(3, 32)
    layer: Any = unwrap(loaded.model).language_model.layers[0].mlp.gate_proj
    found = whole_weight(layer)
    assert found is not None
    assert (found[0] - layer.base_layer.weight).abs().max() > 0.1
    torch.testing.assert_close(functional.linear(x, *found), layer(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad(), merged(loaded.model):
        assert "forward" in vars(layer)
        torch.testing.assert_close(layer(x), functional.linear(x, *found))
    assert "forward" not in vars(layer)
    after = loaded.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    peft: Any = loaded.model
    with peft.disable_adapter():
        off = whole_weight(layer)
        assert off is not None
        assert torch.equal(off[0], layer.base_layer.weight)


def test_what_is_not_as_known_is_left_to_its_modules() -> None:
    lm: Any = unwrap(fresh().model).language_model
    assert fuse(lm) is not None
    assert fuse(lm, adapter=False) is None
    hook = lm.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert fuse(lm) is None
    hook.remove()
    mlp = lm.layers[1].mlp
    lm.layers[1].mlp = nn.Sequential(mlp)  # as an expert would stand in its place
    assert fuse(lm) is None
    lm.layers[1].mlp = mlp
    assert fuse(lm) is not None
    lm.config.hidden_act = "gelu"
    assert fuse(lm) is None
    biased: Any = unwrap(fresh().model).language_model
    layer = biased.layers[0].self_attn.q_proj
    layer.lora_bias["default"] = True
    assert fuse(biased) is None
    with merged(biased):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"quantization": "nf4"}, {"quantization": "nf4", "use_dora": True}]
)
def test_dora_and_four_bit_weights_are_merged_and_fused(kind: dict[str, Any]) -> None:
    lora = {**LORA, "use_dora": kind.get("use_dora", False)}
    loaded = tiny(text=WIDE, lora=lora, quantization=kind.get("quantization"))
    shake(loaded.model, 0.2)
    loaded.model.eval()
    lm: Any = unwrap(loaded.model).language_model
    layer, x = lm.layers[0].mlp.gate_proj, torch.randn(3, 64)
    with torch.no_grad():
        wanted = layer(x)
        found = whole_weight(layer)
        assert found is not None
        torch.testing.assert_close(functional.linear(x, *found), wanted, atol=1e-5, rtol=1e-5)
        bare = layer.base_layer(x)
        assert (bare - wanted).abs().max() > 0.1
        with merged(lm):
            assert "forward" in vars(layer)
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    # The prediction is of what fusing really takes.
    fused: Any = fuse(lm)
    held = sum(
        weight[0].numel() * weight[0].element_size()
        for one in fused._layers
        for weight in (one.qkv, one.out, one.gate_up, one.down)
    )
    assert merged_bytes(lm) == held
    backbone, prompts = unwrap(loaded.model), batch_of(loaded, [0, 1, 2])
    plain = steps(backbone, prompts, fused=False, shared=False)
    for one, other in zip(plain, steps(backbone, prompts, fused=True), strict=True):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=2e-5)


def test_autocast_holds_the_copy_in_its_own_type() -> None:
    loaded = fresh()
    lm: Any = unwrap(loaded.model).language_model
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused: Any = fuse(lm)
        assert {fused._layers[0].qkv[0].dtype, fused._layers[0].down[0].dtype} == {torch.bfloat16}
        backbone, prompts = unwrap(loaded.model), batch_of(loaded, [0, 1, 2])
        plain = steps(backbone, prompts, fused=False)
        for one, other in zip(plain, steps(backbone, prompts, fused=True), strict=True):
            torch.testing.assert_close(other, one, atol=0.1, rtol=0.1)


def test_a_row_sees_its_own_prompt_only() -> None:
    """Scores of what it may not see are not in its softmax, padding included."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    keys, values = normal(2, 2, 5, 4), normal(2, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    prompts = SharedPrompts([keys], [values], mask, 3)
    rows = torch.tensor([0, 2, 4])  # two of the first prompt, one of the second
    prompts.keep(rows)
    query, key, value = normal(3, 6, 1, 4), normal(3, 2, 2, 4), normal(3, 2, 2, 4)
    found = prompts.attend(0, query, key, value, None)
    for row, prompt in enumerate((0, 0, 1)):
        seen = [
            torch.cat([whole[prompt][:, mask[prompt] == 1], own[row]], 1).repeat_interleave(3, 0)
            for whole, own in ((keys, key), (values, value))
        ]
        wanted = functional.scaled_dot_product_attention(query[row], *seen)  # (Q, 1, E)
        torch.testing.assert_close(found[row, 0], wanted[:, 0])
