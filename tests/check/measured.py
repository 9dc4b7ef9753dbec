"""Stages of tiny random models whose memory is both forecast and measured.

Measured is a whole optimizer step of the stage itself, its second one, when the optimizer has its
state: the weights and that state, and the most bytes of tensors that the step makes
(:mod:`tests.memory`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.check.memory import MemoryEstimate
from mmemo.check.run import run_check
from mmemo.config import Config, parse
from mmemo.stages import stage
from mmemo.train.trainer import Trainer
from tests.memory import peak_bytes
from tests.models.parts import values
from tests.models.qwen.kinds import KINDS, train_tokenizer

QUESTION = "Which emotion does the person show? "
SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LARGE_VOCABULARY = 16000


@dataclass(frozen=True, slots=True)
class Case:
    """``base``: as :func:`save_bases` names it, or ``composed``. ``model`` and ``changes``: values
    of the config."""

    stage: str
    base: str
    model: Mapping[str, Any]
    changes: Mapping[str, Any]


def case(stage: str, base: str, model: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    return Case(stage, base, model or {}, changes)


def lora(dropout: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"lora": {"r": 8, "lora_dropout": dropout, **more}}


BF16, AGAIN = {"bf16": True}, {"gradient_checkpointing": True}
ADDED = {"gradient_accumulation_steps": 2}
CASES: Mapping[str, Case] = {
    "SFT, full": case("sft", "float32"),
    "SFT, full, checkpointing": case("sft", "float32", train=AGAIN),
    "SFT, full, bf16": case("sft", "float32", train=BF16),
    "SFT, full, bf16 weights, checkpointing": case("sft", "bfloat16", train={**BF16, **AGAIN}),
    "SFT, full, accumulation": case(
        "sft", "float32", train={"per_device_train_batch_size": 2, **ADDED}
    ),
    "SFT, full, one row": case("sft", "float32", train={"per_device_train_batch_size": 1}),
    "SFT, LoRA": case("sft", "float32", lora()),
    "SFT, LoRA with dropout": case("sft", "float32", lora(0.05)),
    "SFT, LoRA, checkpointing": case("sft", "float32", lora(), train=AGAIN),
    "SFT, LoRA, bf16 weights": case("sft", "bfloat16", lora(0.05), train=BF16),
    "SFT, LoRA, bf16 weights, checkpointing": case(
        "sft", "bfloat16", lora(), train={**BF16, **AGAIN}
    ),
    "SFT, LoRA on attention, trained tokens": case(
        "sft", "float32", lora(target_modules=["q_proj", "v_proj"], trainable_tokens=[" sad"])
    ),
    "SFT, DoRA": case("sft", "float32", lora(use_dora=True)),
    "SFT, experts": case("sft", "float32", lora(experts={"variant": "mose"})),
    "SFT, nf4": case("sft", "bfloat16", {**lora(), "quantization": "nf4"}, train=BF16),
    "SFT, nf4, checkpointing": case(
        "sft", "bfloat16", {**lora(), "quantization": "nf4"}, train={**BF16, **AGAIN}
    ),
    "SFT, large vocabulary": case("sft", "words", train={"max_logits": 0}),
    "SFT, large vocabulary in chunks": case("sft", "words", train={"max_logits": 400000}),
    "SFT, LoRA, large vocabulary": case("sft", "words", lora()),
    "SFT, LoRA, large vocabulary in chunks": case(
        "sft", "words", lora(), train={"max_logits": 400000}
    ),
    "SFT, packed": case("sft", "float32", packing={"max_tokens": 700}),
    "SFT, mixture of experts, LoRA": case("sft", "qwen3_omni", lora()),
    "SFT, composed, full": case("sft", "composed"),
    "SFT, composed, LoRA, bf16": case("sft", "composed", lora(), train=BF16),
    "DPO, LoRA": case("dpo", "float32", lora(), train={"per_device_train_batch_size": 2}),
    "DPO, full, copy": case(
        "dpo",
        "float32",
        train={"per_device_train_batch_size": 2},
        dpo={"reference": "copy"},
    ),
    "DPO, prompts not shared": case(
        "dpo",
        "float32",
        lora(),
        train={"per_device_train_batch_size": 2},
        dpo={"shared_prefix": False},
    ),
    "GRPO, LoRA": case("grpo", "float32", lora(), train={"per_device_train_batch_size": 2}),
    "GRPO, full, copy, checkpointing": case(
        "grpo",
        "float32",
        train={"per_device_train_batch_size": 2, **AGAIN},
        grpo={"beta": 0.04},
    ),
    "GRPO, nf4": case(
        "grpo",
        "bfloat16",
        {**lora(), "quantization": "nf4"},
        train={"per_device_train_batch_size": 2, **BF16},
    ),
}


def write_rows(folder: Path) -> None:
    """``rows.jsonl`` and ``pairs.jsonl``: text alone. Lengths differ a little: every batch has
    padding, and none is much shorter than the longest."""
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for number in range(8):
        prompt = [{"role": "user", "content": QUESTION * 6 + "now " * (number % 3)}]
        answer = "angry sad happy " * 12 + "sad " * (number % 4)
        spoken = {"role": "assistant", "content": answer}
        rows.append({"sample_id": f"r{number}", "messages": [*prompt, spoken], "label": "angry"})
        pair = {"prompt": prompt, "chosen": answer, "rejected_spurious": f"sad {answer}"}
        pairs.append({"sample_id": f"p{number}", **pair})
    for name, lines in (("rows", rows), ("pairs", pairs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def save_base(folder: Path, name: str) -> None:
    """A random model by the name of a case's base."""
    kind = KINDS["qwen3_omni" if name == "qwen3_omni" else "qwen2_5_omni"]
    tokenizer = train_tokenizer(kind.names)
    words = LARGE_VOCABULARY if name == "words" else len(tokenizer)
    sizes = {} if name == "qwen3_omni" else SIZES
    text = {**kind.parts["text_config"], **sizes, "vocab_size": words}
    text["pad_token_id"] = tokenizer.pad_token_id
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in kind.names.items()}
    torch.manual_seed(0)
    model = kind.model(kind.config(**{**kind.parts, "text_config": text}, **ids))
    model = model.to(torch.bfloat16 if name == "bfloat16" else torch.float32)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def config_of(one: Case, folder: Path, out: Path) -> Config:
    """The config of a case, whose rows and bases are in ``folder``."""
    if one.base == "composed":
        scratch = {"hidden_size": 128, "layers": 3, "heads": 4, "vocab_size": 500}
        base = values(text={"scratch": scratch})
    else:
        base = {"path": str(folder / one.base)}
    found: dict[str, Any] = {
        "output_dir": str(out),
        "model": {**base, **one.model},
        "data": {
            "manifests": [str(folder / ("pairs" if one.stage == "dpo" else "rows")) + ".jsonl"],
            "media_root": str(folder),
        },
        "trainable": ["lm"],
        "train": {"max_steps": 2, "per_device_train_batch_size": 4},
        "run": {"threads": 1, "use_cpu": True, "prefetch": 0},
        "store": {"path": str(folder / "store")},
        "decode": {"workers": 1},
    }
    if one.stage == "dpo":
        found["objective"] = {"terms": [{"kind": "dpo"}]}
    if one.stage == "grpo":
        found["rewards"] = [{"path": "reward/outcome.py:outcome", "name": "outcome"}]
        found["rollout"] = {"num_generations": 4, "max_completion_length": 8}
        found["watch"] = {"prove_rewards": False, "samples": 0}
    for key, change in one.changes.items():
        found[key] = {**found.get(key, {}), **change}
    return parse(stage(one.stage).config_class, found)


def forecast_of(config: Config) -> MemoryEstimate:
    found = run_check(config).memory
    assert found is not None
    return found


def measure(kind: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the second step of the stage needs."""
    plain, found = Trainer._step, [0]

    def step(self: Trainer, item: Any) -> None:
        if self.state.step == 1:
            found[0] = peak_bytes(lambda: plain(self, item)) + _held(self)
            raise _DoneError
        plain(self, item)

    with monkeypatch.context() as patch, contextlib.suppress(_DoneError):
        patch.setattr(Trainer, "_step", step)
        stage(kind).runner(config)
    return found[0]


class _DoneError(Exception):
    """There is nothing more to measure, and what would be saved is not needed."""


def _held(trainer: Trainer) -> int:
    """Bytes of the weights, the scales of quantized ones, the optimizer and a reference."""
    engine: Any = trainer.engine
    models = [engine.model]
    reference: Any = getattr(trainer.objective, "reference", None)
    models += [reference.model] if hasattr(reference, "model") else []
    tensors: dict[int, Any] = {}
    for model in models:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensors[id(tensor)] = tensor
            scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
            tensors |= {} if scales is None else {id(scales): scales}
    for state in engine.optimizer.state.values():
        tensors |= {id(x): x for x in state.values() if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())
