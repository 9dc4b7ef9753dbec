"""Tokens trained beside LoRA: tied and untied heads, whole modules, new tokens, experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.adapters import lora
from mmemo.models.adapters.tokens import token_id
from mmemo.models.build import Loaded, ModelConfig
from mmemo.models.composed.scratch import train_tokenizer
from mmemo.train.reference import reference
from tests.models.adapters.test_lora import again, batch_of, logits_of, train
from tests.models.parts import TEXTS, tiny

NAMES = ["<answer>", " voice"]
LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.0}


def untied(folder: Path) -> str:
    """A small causal LM whose head is not its embedding."""
    tokenizer = train_tokenizer(TEXTS, 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tables(loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and the head as the model uses them."""
    model: Any = lora.unwrap(loaded.model)
    found = model.get_input_embeddings().weight, model.lm_head.weight
    return found[0].detach().clone(), found[1].detach().clone()


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).any(1).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("given", [NAMES, "all", "module"])
def test_chosen_rows_train_and_live_in_the_adapter(tmp_path: Path, head: str, given: Any) -> None:
    section = {"modules_to_save": ["embed_tokens", "lm_head"]}
    section = section if given == "module" else {"trainable_tokens": given}
    text = {"text": untied(tmp_path / "lm")} if head == "untied" else {}
    loaded = tiny(base_dir=tmp_path / "base", lora={**LORA, **section}, **text)
    batch, start = batch_of(loaded), tables(loaded)
    base_logits = logits_of(again(tmp_path / "base"), batch)
    torch.testing.assert_close(logits_of(loaded, batch), base_logits, atol=1e-6, rtol=0)
    expected = train(loaded)
    embedding, lm_head = tables(loaded)
    if given is NAMES:
        ids = sorted(token_id(loaded.processor.tokenizer, name) for name in NAMES)
        assert changed_rows(start[0], embedding) == ids
        assert changed_rows(start[1], lm_head) == ids
    else:
        assert len(changed_rows(start[1], lm_head)) == len(lm_head)
    assert torch.equal(embedding, lm_head) is (head == "tied")

    # Without the adapter it is the base, bit for bit, and afterwards it is what it was.
    with reference(loaded.model):
        assert torch.equal(logits_of(loaded, batch), base_logits)
    assert torch.equal(logits_of(loaded, batch), expected)

    folder = tmp_path / "final"
    lora.save_model(loaded.model, loaded.processor, folder, base=loaded.base)
    torch.testing.assert_close(logits_of(again(folder), batch), expected, atol=1e-6, rtol=0)
    merged = again(folder, adapter="merge")
    assert not isinstance(merged.model, PeftModel)
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-4, rtol=0)
    whole = tmp_path / "whole"
    lora.save_model(merged.model, merged.processor, whole)
    torch.testing.assert_close(logits_of(again(whole), batch), expected, atol=1e-4, rtol=0)
    embedding, lm_head = tables(again(whole))
    assert torch.equal(embedding, lm_head) is (head == "tied")

    # The adapter is PEFT's own: PEFT alone, given the base, answers the same.
    alone = PeftModel.from_pretrained(again(tmp_path / "base").model, str(folder))
    other = Loaded(alone, loaded.processor)  # type: ignore[arg-type]
    torch.testing.assert_close(logits_of(other, batch), expected, atol=1e-6, rtol=0)


def test_trained_rows_are_saved_once_and_nothing_else_of_the_table(tmp_path: Path) -> None:
    loaded = tiny(base_dir=tmp_path / "base", lora={**LORA, "trainable_tokens": NAMES})
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    with safe_open(tmp_path / "final/adapter_model.safetensors", framework="pt") as opened:
        names = [key for key in sorted(opened.keys()) if "tokens" in key]
        rows = [opened.get_tensor(key).shape for key in names]
    assert rows == [(len(NAMES), 32)]


def test_experts_train_tokens_too(tmp_path: Path) -> None:
    section = {**LORA, "experts": {"variant": "mose"}, "trainable_tokens": NAMES}
    loaded = tiny(base_dir=tmp_path / "base", lora=section)
    batch, start = batch_of(loaded), tables(loaded)
    expected = train(loaded)
    ids = sorted(token_id(loaded.processor.tokenizer, name) for name in NAMES)
    assert changed_rows(start[1], tables(loaded)[1]) == ids
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    torch.testing.assert_close(logits_of(again(tmp_path / "final"), batch), expected)
    with pytest.raises(ConfigError, match="trainable_tokens: all"):
        tiny(lora={**LORA, "experts": {"variant": "mose"}, "modules_to_save": ["lm_head"]})


@pytest.mark.parametrize("fused", [True, False])
def test_rollouts_use_the_trained_rows(tmp_path: Path, fused: bool) -> None:
    loaded = tiny(base_dir=tmp_path / "base", lora={**LORA, "trainable_tokens": NAMES})
    train(loaded, steps=4)
    model: Any = lora.unwrap(loaded.model)
    prompt = loaded.processor.tokenizer("How loud is the voice?", return_tensors="pt")
    ids = prompt["input_ids"]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "modality_ids": torch.zeros_like(ids),
        "clip_index": torch.tensor([-1]),
    }
    found = []
    for merge in (True, False):
        config = RolloutConfig(
            num_generations=4, max_completion_length=8, merge_adapter=merge, fused_steps=fused
        )
        engine = HFRollouts(loaded.processor.tokenizer, model, config)
        found.append(engine.generate(loaded.model, batch, [1, 2, 3, 4]))
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[0].logps, found[1].logps, atol=1e-4, rtol=0)


def test_half_precision_trains_rows_in_float32(tmp_path: Path) -> None:
    section = {**LORA, "trainable_tokens": NAMES}
    loaded = tiny(base_dir=tmp_path / "base", lora=section, dtype="bfloat16")
    rows = [p for n, p in loaded.model.named_parameters() if "trainable_tokens_delta" in n]
    assert [row.dtype for row in rows] == [torch.float32]
    batch = batch_of(loaded)
    assert torch.isfinite(logits_of(loaded, batch)).all()
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    other = logits_of(again(tmp_path / "final"), batch)
    torch.testing.assert_close(other, logits_of(loaded, batch), atol=0.02, rtol=0)


def test_new_tokens_are_one_token_and_begin_as_what_they_were(tmp_path: Path) -> None:
    first = tiny()
    tokenizer, (table, _) = first.processor.tokenizer, tables(first)
    old = tokenizer.encode("AU12", add_special_tokens=False)
    assert len(old) > 1
    section = {**LORA, "trainable_tokens": "new"}
    new = ["AU12", "<cue>", "AU12"]
    loaded = tiny(base_dir=tmp_path / "base", lora=section, new_tokens=new)
    tokenizer = loaded.processor.tokenizer
    (at,) = tokenizer.encode("AU12", add_special_tokens=False)
    assert tokenizer.decode([at]) == "AU12"
    torch.testing.assert_close(tables(loaded)[1][at], table[old].mean(0))
    assert len(tables(loaded)[0]) == len(table) + 2
    start = tables(loaded)
    batch, expected = batch_of(loaded), train(loaded)
    assert changed_rows(start[0], tables(loaded)[0]) == [len(table), len(table) + 1]
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    back = again(tmp_path / "final", lora=section, new_tokens=["AU12", "<cue>"])
    torch.testing.assert_close(logits_of(back, batch), expected, atol=1e-6, rtol=0)
    # Merged and whole, the tokens are there, and a later stage may name them again.
    whole = again(tmp_path / "final", adapter="merge", new_tokens=["<cue>"])
    lora.save_model(whole.model, whole.processor, tmp_path / "whole")
    later = again(tmp_path / "whole", new_tokens=["<cue>", "<more>"])
    assert len(tables(later)[0]) == len(table) + 3
    with pytest.raises(ConfigError, match="'<more>' is not a token"):
        again(tmp_path / "final", new_tokens=["<more>"])


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'How loud' is \d tokens"):
        tiny(lora={**LORA, "trainable_tokens": ["How loud"]})
    with pytest.raises(ConfigError, match="names none; name the tokens"):
        tiny(lora={**LORA, "trainable_tokens": "new"})
    with pytest.raises(ConfigError, match="exclude each other"):
        tiny(lora={**LORA, "trainable_tokens": "all", "modules_to_save": ["lm_head"]})
    loaded = tiny(base_dir=tmp_path / "base", lora={**LORA, "trainable_tokens": NAMES})
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    config = json.loads((tmp_path / "final/adapter_config.json").read_text())
    assert len(next(iter(config["trainable_token_indices"].values()))) == len(NAMES)
    again(tmp_path / "final", lora={**LORA, "trainable_tokens": NAMES[::-1]})
    with pytest.raises(ConfigError, match="other tokens than the adapter"):
        again(tmp_path / "final", lora=LORA)
    with pytest.raises(ConfigError, match="other tokens than the adapter"):
        again(tmp_path / "final", lora={**LORA, "trainable_tokens": NAMES[:1]})


def test_an_old_config_means_no_token() -> None:
    config = parse(ModelConfig, {"path": "x", "lora": {"r": 2}})
    assert config.lora is not None
    assert config.lora.trainable_tokens is None
    assert config.lora.modules_to_save is None
    assert config.new_tokens is None
