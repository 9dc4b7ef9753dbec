"""Models as shapes alone: their weights are on ``meta`` and take no memory."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, initialization

from mmemo.console import console
from mmemo.errors import ConfigError
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters import lora
from mmemo.models.backbones import BACKBONES
from mmemo.models.build import ModelConfig, set_trainable


def shapes_of(config: ModelConfig, trainable: list[str]) -> nn.Module:
    """The native model of ``config.path`` by its ``config.json``, with the adapter of ``config``
    and its trainable parts chosen. No weights are read, nor a tokenizer.

    Raises:
        ConfigError: the path names no native model.
    """
    path = config.path
    try:
        values: Any = {} if path is None else PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"'{path}' has no config.json that can be read ({line}); name a folder with one by "
            "--model.path"
        ) from error
    if path is not None and not values:
        raise ConfigError(f"'{path}' has no config.json; name a folder with one by --model.path")
    kind = BACKBONES.get(values.get("model_type", ""))
    if kind is None:
        raise ConfigError(
            f"--lengths takes the shapes from a native model's config.json, and model.path is "
            f"{path!r}; leave --lengths out, so that the model itself is loaded"
        )
    if config.face is not None:
        console.print("model.face is not counted, because its encoder is not read.", style="yellow")
    known: Any = kind.config_class.from_pretrained(str(path))  # pyright: ignore
    saved = known.dtype or known.get_text_config().dtype or torch.float32
    dtype = saved if config.dtype is None else getattr(torch, config.dtype)
    with torch.device("meta"), initialization.no_init_weights():
        model: Any = kind(known)
        model.to(dtype)
        # Of the tokenizer, only numbers would be read, none of which is a size.
        model.attach(_NoTokenizer(), config.sampling or SamplingConfig(), kind.settings_kind())
    return _prepared(model, config, trainable)


class _NoTokenizer(SimpleNamespace):
    pad_token_id = eos_token_id = 0

    def convert_tokens_to_ids(self, _: str) -> int:
        return 0


def _prepared(model: Any, config: ModelConfig, trainable: list[str]) -> nn.Module:
    if config.lora is not None:
        # Rows of single tokens are small, and only a tokenizer knows them.
        section = config.lora.model_copy(update={"trainable_tokens": None})
        with torch.device("meta"):
            model = lora.add_lora(model, lora.as_plain(model, section))
    set_trainable(model, trainable)
    return model


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model as shapes. What is trainable stays so."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            shape = nn.Parameter(shape, requires_grad=tensor.requires_grad)
            state: Any = getattr(tensor, "quant_state", None)
            if state is not None:  # the scales of 4-bit weights count as well
                setattr(shape, "quant_state", state)  # noqa: B010
        memo[id(tensor)] = shape
    return copy.deepcopy(model, memo)


def changed(model: nn.Module, config: ModelConfig, wanted: ModelConfig, parts: list[str]) -> Any:
    """A copy on ``meta`` of the model of ``config`` as that of ``wanted``, which may have another
    dtype, and an adapter where there was none."""
    found: Any = on_meta(model)
    if wanted.dtype != config.dtype and wanted.dtype is not None:
        found.to(getattr(torch, wanted.dtype))
    if wanted.lora is not None and config.lora is None:
        return _prepared(found, wanted, parts)
    return found
