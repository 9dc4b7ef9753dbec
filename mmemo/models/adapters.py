"""LoRA, DoRA and QLoRA on the language model, saved and loaded as plain PEFT folders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmemo.errors import ConfigError
from mmemo.models.config import LoraSection
from mmemo.models.modeling import MmemoForConditionalGeneration
from mmemo.models.processing import MmemoProcessor

_NF4_BLOCK = 64
"""Values that share a scale. bitsandbytes 0.50 decodes wrongly on the CPU, without an error, when
a block goes over the end of a row."""


def unwrap(model: nn.Module) -> MmemoForConditionalGeneration:
    """The composed model inside PEFT, DeepSpeed or DDP wrappers."""
    inner: Any = model
    # Wrappers come first: PEFT's and DeepSpeed's pass attributes of the model inside through.
    while True:
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif hasattr(inner, "feature_fingerprint"):
            return inner
        else:
            raise TypeError(f"there is no mmemo model inside {type(model).__name__}")


def default_targets(model: MmemoForConditionalGeneration) -> str:
    """Regular expression of the LM's linear layers, so that encoders are never hit."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return rf".*\.language_model\..*\.({'|'.join(sorted(map(re.escape, names)))})"


def add_lora(model: MmemoForConditionalGeneration, section: LoraSection) -> PeftModel:
    """Put new adapters on the language model; connectors and fusion are saved with them."""
    saved = ["connectors"] if model.modalities else []
    saved += ["fusion"] if model.model.fusion is not None else []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.lora_alpha,  # pyright: ignore[reportArgumentType] - a float works
        lora_dropout=section.lora_dropout,
        target_modules=section.target_modules or default_targets(model),
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        modules_to_save=saved or None,
    )
    try:
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType, reportArgumentType]
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def quantize(model: MmemoForConditionalGeneration, compute_dtype: torch.dtype) -> None:
    """Hold the LM's linear layers as nf4 (QLoRA), in place. Head and embedding stay as they are.

    Works on CPU and CUDA. The encoders stay whole: what they give is stored.

    Raises:
        ConfigError: a layer's width does not fit nf4's blocks.
    """
    import bitsandbytes as bnb

    lm = model.language_model
    for name, module in list(lm.named_modules()):
        if type(module) is not nn.Linear:
            continue
        linear: Any = module
        if linear.in_features % _NF4_BLOCK:
            raise ConfigError(
                f"quantization: nf4 needs layers that read a multiple of {_NF4_BLOCK} values, but "
                f"'{name}' reads {linear.in_features}; leave quantization out"
            )
        small: Any = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
        )
        device = linear.weight.device
        weight: Any = bnb.nn.Params4bit
        small.weight = weight(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        small.bias = linear.bias
        # In eval mode on some CPUs the layer would repack its weights for good, round its scales
        # to bfloat16 and answer otherwise than in training. One way of computing everywhere.
        small.support_avx512bf16_for_cpu = False
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, small.to(device))
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010 - what PEFT asks for


def base_of(folder: Path) -> Path | str:
    """The model that an adapter sits on: a folder, or a hub id.

    A relative path is taken from the adapter's own folder, so that a run can be moved.
    """
    named = _adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{folder / 'adapter_config.json'} names no base model; set one")
    beside = (folder / named).resolve()
    if (beside / "config.json").exists():
        return beside
    if named.startswith((".", "/")):
        raise ConfigError(
            f"{folder}: the adapter's base model '{named}' is not there; move the adapter together "
            "with it"
        )
    return str(named)


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read; is the folder whole?") from error


def load(model: MmemoForConditionalGeneration, folder: Path, *, trainable: bool) -> PeftModel:
    """The adapter of ``folder`` on its base."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def check_same(section: LoraSection, folder: Path) -> None:
    """Refuse a ``lora`` section that is not the one of the adapter that training goes on with."""
    saved = _adapter_config(folder)
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if key in saved and saved[key] != getattr(section, key):
            raise ConfigError(
                f"lora.{key} is {getattr(section, key)} but the adapter {folder} has {saved[key]}; "
                "make them equal, or set adapter: merge"
            )


def save_full(
    model: MmemoForConditionalGeneration, processor: MmemoProcessor, folder: Path
) -> None:
    """Write a whole model, safetensors, with its processor."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(
    model: nn.Module,
    processor: MmemoProcessor,
    folder: Path,
    *,
    base: Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a plain model whole, or an adapter as a PEFT folder that names ``base`` by a
    relative path. ``state_dict`` stands in for gathered weights, as DeepSpeed gives them.

    Raises:
        ConfigError: an adapter without a saved base.
    """
    inner: Any = model
    while not isinstance(inner, MmemoForConditionalGeneration | PeftModel):
        inner = inner.module
    if isinstance(inner, MmemoForConditionalGeneration):
        inner.save_pretrained(folder, state_dict=state_dict)
    else:
        if base is None:
            raise ConfigError(
                "an adapter needs a saved base model; pass base_dir when loading the model"
            )
        inner.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
        name_base(folder, base)
    processor.save_pretrained(folder)


def name_base(folder: Path, base: Path) -> None:
    """Write the relative path from an adapter folder to its base into ``adapter_config.json``."""
    values = _adapter_config(folder)
    values["base_model_name_or_path"] = os.path.relpath(base.resolve(), folder.resolve())
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
