"""Quantized linear layers of the language model: nf4 (QLoRA) and int8, by bitsandbytes.

Head and embedding stay, and so do the encoders, because their features are stored and reused. Where
there is CUDA, each layer is quantized there, which for the language model of a 7B takes seconds
instead of the minutes of one CPU thread, and goes back to where it was.

Sources: Dettmers et al., QLoRA, arXiv 2305.14314 (nf4); LLM.int8(), arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from mmemo.errors import ConfigError

Quantization = Literal["nf4", "int8"]

_FLAGS: dict[Quantization, str] = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""Attributes of the model that PEFT asks for."""
_NF4_BLOCK = 64
"""Number of values that share a scale. bitsandbytes 0.50 decodes wrongly on the CPU, without an
error, when a block crosses the end of a row, so every row must be a multiple of this."""
_OUTLIER = 6.0
"""Inputs of int8 layers beyond this are multiplied apart, in half precision; as in transformers."""


def quantize(model: Any, kind: Quantization = "nf4") -> None:
    """Replace the LM's linear layers by quantized ones, in place; head and embedding stay.

    Works on CPU and CUDA. nf4 computes in the layers' own dtype.

    Raises:
        ConfigError: a layer's width does not fit nf4's blocks, or there is no linear layer.
    """
    lm, packed = model.language_model, False
    make: Callable[[Any, str], Any] = _nf4 if kind == "nf4" else _int8
    for name, module in list(lm.named_modules()):
        if type(module) is not nn.Linear:
            continue
        device = module.weight.device
        small = make(module, name)
        # bitsandbytes quantizes a weight when it is moved, on the device that it is moved to.
        small = small.to(_fastest()).to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, small)
        packed = True
    if not packed:
        family = model.config.get_text_config().model_type
        raise ConfigError(
            f"quantization: {kind} holds linear layers, but a '{family}' language model has none; "
            "leave quantization out"
        )
    setattr(model, _FLAGS[kind], True)


def _fastest() -> torch.device:
    """The device of this process, which every rank has set; the CPU without CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _nf4(linear: Any, name: str) -> Any:
    import bitsandbytes as bnb

    if linear.in_features % _NF4_BLOCK:
        raise ConfigError(
            f"quantization: nf4 needs layers that read a multiple of {_NF4_BLOCK} values, but "
            f"'{name}' reads {linear.in_features}; leave quantization out"
        )
    small: Any = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    weight: Any = bnb.nn.Params4bit
    small.weight = weight(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    # On some CPUs, eval mode would repack the weights for good and round their scales to
    # bfloat16, so that the model answers differently than in training. Keep one code path.
    small.support_avx512bf16_for_cpu = False
    return small


def _int8(linear: Any, name: str) -> Any:
    import bitsandbytes as bnb

    small: Any = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIER,
    )
    weight: Any = bnb.nn.Int8Params
    small.weight = weight(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    small.bias = linear.bias
    return small


def dequantize(model: Any) -> None:
    """Turn quantized layers back into plain linear layers, in place, keeping the rounded values."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    lm: Any = model.language_model
    dtype = lm.get_input_embeddings().weight.dtype
    for name, module in list(lm.named_modules()):
        small: Any = module
        if isinstance(module, bnb.nn.Linear4bit):
            values: Any = dequantize_4bit(small.weight.data, small.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # The first pass moves the scales from the weight to the layer's state.
            scales = small.weight.SCB if small.state.SCB is None else small.state.SCB
            values = int8_vectorwise_dequant(small.weight.data, scales).to(dtype)
        else:
            continue
        # The layer takes no memory on meta, and its weight is replaced at once.
        with torch.device("meta"):
            plain = nn.Linear(small.in_features, small.out_features, small.bias is not None)
        plain.weight, plain.bias = nn.Parameter(values), small.bias
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, plain)
    for flag in _FLAGS.values():
        setattr(model, flag, False)


def quantization_of(model: Any) -> Quantization | None:
    """How a model, without wrappers around it, is quantized (:func:`quantize`)."""
    return next((kind for kind, flag in _FLAGS.items() if getattr(model, flag, False)), None)
