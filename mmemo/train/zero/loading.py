"""Loads a model for ZeRO-3 so that no rank ever holds all of its language model (``zero.Init``).

Without it every rank reads the whole model into its memory, which DeepSpeed then shards: eight
ranks of a 72B need 1.2 TB of CPU memory, and the model has to fit on one device. With it the main
rank alone reads the file, and each weight is shared out as soon as it has been read. Encoders are
made whole again, because clips are encoded before the engine has the model.

A DeepSpeed config of stage 3 decides by ``zero3_init_flag``, which is accelerate's name for it:
``"auto"``, the default, does so wherever it is possible, ``true`` refuses to start where it is not,
and ``false`` never does.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from mmemo import content
from mmemo.console import console
from mmemo.errors import ConfigError
from mmemo.models.adapters import lora
from mmemo.models.config import ModelConfig
from mmemo.models.saved import saved_branches, saved_dtype
from mmemo.train.config import RunConfig, TrainConfig, zero_stage
from mmemo.train.distributed import Ranks
from mmemo.train.zero.compat import is_sharded, join_ranks, load_deepspeed, whole

FLAG = "zero3_init_flag"
READS_WEIGHTS = frozenset(
    {
        *("use_dora", "experts", "modules_to_save", "trainable_tokens", "trainable_token_indices"),
        "target_parameters",
    }
)
"""Settings of an adapter for which weights under it are read when it is made."""


@contextmanager
def sharded_loading(
    model: ModelConfig, train: TrainConfig, run: RunConfig, ranks: Ranks, *, draws: bool
) -> Generator[bool]:
    """Inside, the weights of ``model`` are shared out while they are read, if they can be.

    Args:
        draws: whether the stage samples from the model, for which every rank gathers all of it.

    Yields:
        Whether they are; :func:`gather_encoders` has to follow.

    Raises:
        ConfigError: the DeepSpeed config asks for it, and it is not possible.
    """
    if zero_stage(run) != 3:
        yield False
        return
    assert run.deepspeed is not None
    values: dict[str, Any] = json.loads(content.find(run.deepspeed).read_text(encoding="utf-8"))
    asked: Any = values.get(FLAG, "auto")
    if asked not in ("auto", True, False):
        raise ConfigError(f'{run.deepspeed}: {FLAG} must be "auto", true or false, not {asked!r}')
    why = "each rank draws completions with all of the weights" if draws else obstacle(model, train)
    if asked is True and why is not None:
        raise ConfigError(f'{run.deepspeed}: {FLAG} is true, but {why}; set it to "auto"')
    if asked is False or why is not None or ranks.size == 1:
        yield False
        return
    if ranks.is_main:
        console.print(
            "the language model's weights are shared out among the ranks as they are read"
        )
    with _zero_init(values, saved_dtype(model), ranks):
        yield True


def obstacle(model: ModelConfig, train: TrainConfig) -> str | None:
    """Why the weights of a model cannot be shared out while they are read, completing a sentence;
    None if they can."""
    if model.path is None:
        return "the model is built from parts"
    folder = Path(model.path)
    adapted = (folder / "adapter_config.json").exists()
    record: dict[str, Any] = lora.read_record(folder) if adapted else {}
    if model.quantization or record.get("quantization"):
        return "quantized weights are made of whole ones"
    if model.new_tokens:
        return "new tokens change the whole embedding"
    if adapted and model.adapter == "merge":
        return "an adapter is merged into whole weights"
    if model.lora is not None and not adapted and not folder.exists():
        return f"'{model.path}' is no folder, and the base of a new adapter is copied from a hub"
    if adapted or model.lora is not None:
        reads = _reads_weights(folder, model)
        if reads is not None:
            return f"{reads} of the adapter computes with whole weights"
    if model.face is not None or model.fusion is not None or saved_branches(model):
        return "the model has branches beside its own"
    dtype = saved_dtype(model)
    if dtype is None:
        return f"'{model.path}' does not say its number type"
    if train.bf16 and dtype != torch.bfloat16:
        return "train.bf16 casts whole weights; set model.dtype=bfloat16"
    return None


def _reads_weights(folder: Path, model: ModelConfig) -> str | None:
    """What in an adapter computes with the weights under it when it is made."""
    saved = folder / "adapter_config.json"
    values: dict[str, Any] = {}
    if saved.exists():
        values = json.loads(saved.read_text(encoding="utf-8"))
        values["experts"] = lora.has_experts(folder)
    elif model.lora is not None:
        values = model.lora.model_dump()
    return next((name for name in sorted(READS_WEIGHTS) if values.get(name)), None)


@contextmanager
def _zero_init(values: dict[str, Any], dtype: Any, ranks: Ranks) -> Generator[None]:
    load_deepspeed(cpu=ranks.device.type == "cpu")
    join_ranks(ranks)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero = {
        name: value
        for name, value in values["zero_optimization"].items()
        if value != "auto"  # they are about the engine
    }
    # Weights are made in the number type that DeepSpeed's config names.
    held = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": zero,
        }
    )
    level = hf_logging.get_verbosity()
    # DeepSpeed wraps every class of modules, which transformers takes for classes of a user.
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        unset_hf_deepspeed_config()
        del held


def gather_encoders(model: nn.Module) -> None:
    """Make all weights whole again, in place, but those of the language model and its head. Every
    rank takes part."""
    backbone: Any = lora.unwrap(model)
    kept = {
        id(p) for part in (backbone.language_model, backbone.lm_head) for p in part.parameters()
    }
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in kept or not is_sharded(parameter):
                continue
            if id(parameter) not in made:  # a weight may have two places
                values = whole(parameter)
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
