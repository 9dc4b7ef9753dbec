"""Models read back from a folder: whole, undamaged and as they were saved, or refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig

from mmemo import checkpoint
from mmemo.config import dump
from mmemo.errors import CheckpointError, ConfigError
from mmemo.models import adapters
from mmemo.models.config import ModelConfig
from mmemo.models.configuration import MmemoConfig
from mmemo.models.modeling import MmemoForConditionalGeneration
from mmemo.models.processing import MmemoProcessor

_BASE_RECORD = "mmemo_base.json"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to use. ``base`` is the saved model under the adapter, if there is one."""

    model: MmemoForConditionalGeneration | PeftModel
    processor: MmemoProcessor
    base: Path | None = None


def from_saved(
    config: ModelConfig, path: str, dtype: str | None
) -> tuple[MmemoForConditionalGeneration, MmemoProcessor]:
    """A saved full model and its processor. ``dtype`` None is what the folder says.

    Raises:
        ConfigError: it is no mmemo model, or differs from ``config``.
        CheckpointError: weights are damaged or missing.
    """
    _verify(Path(path))
    try:
        found = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{path}' is neither a saved mmemo model nor an adapter folder; check the path"
        ) from error
    if not isinstance(found, MmemoConfig):
        raise ConfigError(
            f"'{path}' is a '{found.model_type}' model, not a saved mmemo model; name it as text "
            "and give branches"
        )
    model = _weights(path, getattr(torch, dtype) if dtype else "auto")
    processor = MmemoProcessor.from_pretrained(path)
    _check_pair(model, processor, path)
    if config.sampling is not None and config.sampling != model.sampling:
        raise ConfigError(
            f"sampling differs from what '{path}' was trained with; leave model.sampling out"
        )
    return model, processor


def _verify(folder: Path) -> None:
    """Against its manifest, where there is one; files added beside the listed ones are let be."""
    if (folder / checkpoint.MANIFEST).exists():
        checkpoint.verify(folder, extra_ok=True)


def _weights(path: str, dtype: Any) -> MmemoForConditionalGeneration:
    """The model, no weight of which was made up: transformers only warns of missing ones."""
    kind: Any = MmemoForConditionalGeneration
    try:
        model, info = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: its weights cannot be loaded ({_first_line(error)}); save or fetch it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: lacks the weights of {missing[0]} ({len(missing)} in all); save or fetch it "
            "again"
        )
    return model


def _check_pair(
    model: MmemoForConditionalGeneration, processor: MmemoProcessor, path: Path | str
) -> None:
    counts = model.config.token_counts
    if processor.sampling != model.sampling or processor.token_counts != counts:
        raise ConfigError(
            f"{path}: config.json and processor_config.json disagree about sampling or tokens; "
            "save the model and its processor together"
        )


def from_adapter(config: ModelConfig, folder: Path) -> Loaded:
    """An adapter on its base: as a PeftModel, or merged into a plain model.

    Number type and quantization are those it was trained with, unless ``config`` says otherwise.

    Raises:
        ConfigError: the base is not there, or ``config.lora`` is not the adapter's.
        CheckpointError: weights of the adapter or its base are damaged or missing.
    """
    _verify(folder)
    record = adapters.read_record(folder)
    base = adapters.base_of(folder)
    model, processor = from_saved(config, str(base), config.dtype or record["dtype"])
    if (folder / "processor_config.json").exists():
        processor = MmemoProcessor.from_pretrained(folder)
        _check_pair(model, processor, folder)
    if config.adapter == "merge":
        if adapters.has_experts(folder):
            raise ConfigError(
                f"{folder} has experts, which are chosen anew for every prompt and cannot be "
                "merged; use adapter: continue, or export the adapter"
            )
        if config.quantization is not None and config.lora is None:
            raise ConfigError("adapter: merge with quantization needs lora, or use continue")
        if record["quantization"] is not None:
            # What it was trained on: the rounded weights, whole again.
            adapters.quantize(model)
            adapters.dequantize(model)
        return Loaded(adapters.load(model, folder, trainable=False).merge_and_unload(), processor)
    if config.lora is not None:
        adapters.check_same(model, config.lora, folder)
    if config.quantization or record["quantization"]:
        adapters.quantize(model)
    local = base if isinstance(base, Path) else None
    return Loaded(adapters.load(model, folder, trainable=True), processor, local)


def keep_base(
    config: ModelConfig, model: MmemoForConditionalGeneration, processor: MmemoProcessor, base: Path
) -> Path:
    """Save the model under the adapter once; several ranks may come here at the same time.

    Raises:
        ConfigError: the folder holds a base with other settings or parts.
        CheckpointError: it could not be written, or is damaged.
    """
    digest = xxhash.xxh3_128(processor.tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    record = json.dumps({"config": dump(config), "weights": digest.hexdigest()}, sort_keys=True)

    def write(staged: Path) -> None:
        adapters.save_full(model, processor, staged)
        (staged / _BASE_RECORD).write_text(record, encoding="utf-8")

    if not base.exists():
        try:
            checkpoint.save(base, write)
        except CheckpointError:
            if not base.exists():  # else another rank was faster
                raise
    kept = base / _BASE_RECORD
    if not kept.exists() or kept.read_text(encoding="utf-8") != record:
        raise ConfigError(
            f"{base} holds a base model that was made with other settings or parts; delete it or "
            "use another output_dir"
        )
    _verify(base)
    return base


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
