"""Quantized linear layers of the language model: nf4 (QLoRA) and int8, by bitsandbytes.

Head and embedding stay, and so do the encoders, because their features are stored and reused. Where
there is CUDA, each layer is quantized there, which for the language model of a 7B takes seconds
instead of the minutes of one CPU thread, and goes back to where it was. A machine does so once for
the same weights (:mod:`mmemo.models.adapters.quantized_cache`).

Sources: Dettmers et al., QLoRA, arXiv 2305.14314 (nf4); LLM.int8(), arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.models.adapters.quantized_cache import made_once

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
    lm = model.language_model
    linears = {name: one for name, one in lm.named_modules() if type(one) is nn.Linear}
    if not linears:
        family = model.config.get_text_config().model_type
        raise ConfigError(
            f"quantization: {kind} holds linear layers, but a '{family}' language model has none; "
            "leave quantization out"
        )
    if kind == "nf4":
        _check_widths(linears)

    def make() -> dict[str, nn.Module]:
        # bitsandbytes quantizes a weight when it is moved, on the device that it is moved to.
        return {
            name: _layer(linear, kind).to(_fastest()).to(linear.weight.device)
            for name, linear in linears.items()
        }

    made = made_once(linears, _how(kind), make, partial(_restored, kind))
    for name, small in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, small)
    setattr(model, _FLAGS[kind], True)


def _how(kind: Quantization) -> str:
    """What else decides a quantized weight. Devices may round to different sides."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{kind} bitsandbytes {version('bitsandbytes')} {device}"


def _fastest() -> torch.device:
    """The device of this process, which every rank has set; the CPU without CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _check_widths(linears: Mapping[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if linear.in_features % _NF4_BLOCK:
            raise ConfigError(
                f"quantization: nf4 needs layers that read a multiple of {_NF4_BLOCK} values, but "
                f"'{name}' reads {linear.in_features}; leave quantization out"
            )


def _layer(linear: Any, kind: Quantization, weight: Any = None) -> Any:
    """A quantized layer in place of a plain one. ``weight``: its own, if it is quantized already;
    None: the plain one's, to be quantized when the layer is moved."""
    import bitsandbytes as bnb

    small: Any
    sizes = (linear.in_features, linear.out_features)
    if kind == "nf4":
        small = bnb.nn.Linear4bit(
            *sizes,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
        )
        plain: Any = bnb.nn.Params4bit
        made = {"quant_type": "nf4"}
        # On some CPUs, eval mode would repack the weights for good and round their scales to
        # bfloat16, so that the model answers differently than in training. Keep one code path.
        small.support_avx512bf16_for_cpu = False
    else:
        small = bnb.nn.Linear8bitLt(
            *sizes, bias=linear.bias is not None, has_fp16_weights=False, threshold=_OUTLIER
        )
        plain = bnb.nn.Int8Params
        made = {"has_fp16_weights": False}
    if weight is None:
        weight = plain(linear.weight.data.cpu(), requires_grad=False, **made)
    small.weight, small.bias = weight, linear.bias
    return small


def _restored(kind: Quantization, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A quantized layer of the tensors of its ``state_dict``."""
    import bitsandbytes as bnb

    device, packed = linear.weight.device, tensors["weight"]
    if kind == "nf4":
        stats = {
            name.removeprefix("weight."): one
            for name, one in tensors.items()
            if name.startswith("weight.")
        }
        made: Any = bnb.nn.Params4bit
        return _layer(linear, kind, made.from_prequantized(packed, stats, device=device))
    whole: Any = bnb.nn.Int8Params
    packed, scales = packed.to(device), tensors["SCB"].to(device)
    weight = whole(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    return _layer(linear, kind, weight)


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
