"""Linear layers with their LoRA added to the weight, for computation without gradients."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional


def whole_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a linear layer with its adapter added, as a new tensor.

    Without an adapter, the weight of a plain layer itself is returned. Layers may be quantized to
    four bits, and adapters may be plain LoRA or a single DoRA (arXiv 2402.09353, eq. 5). None for
    any other, such as an adapter with a bias.
    """
    if (plain := _plain_weight(layer)) is not None:
        return plain
    one: Any = layer
    if not isinstance(layer, LoraLayer) or (plain := _plain_weight(one.base_layer)) is None:
        return None
    names = [] if one.disable_adapters or one.merged else one.active_adapters
    if one.disable_adapters and one.merged:  # the next forward would unmerge it
        return None
    names = [name for name in names if name in one.lora_A]
    kinds = [type(one.lora_variant[name]) for name in names if name in one.lora_variant]
    if any(one.lora_bias[name] for name in names):
        return None
    # Other variants do more than change the weight, and DoRA scales what comes before it.
    if kinds and (len(names) > 1 or kinds != [DoraLinearVariant]):
        return None
    weight, bias = plain
    for name in names:
        change = one.get_delta_weight(name).detach().to(weight.dtype)
        if kinds:
            dora = one.lora_magnitude_vector[name]
            norm = dora.get_weight_norm(weight, change, scaling=1)
            weight = (dora.weight.detach() / norm)[:, None] * (weight + change)
            weight = weight.to(change.dtype)
        else:
            weight = weight + change
    return weight, bias


def _plain_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer without an adapter; None for any other module."""
    one: Any = layer
    if type(layer) is nn.Linear:
        return layer.weight.detach(), layer.bias
    # By name: bitsandbytes is imported only where a model is quantized.
    if type(layer).__name__ != "Linear4bit" or not type(layer).__module__.startswith(
        "bitsandbytes"
    ):
        return None
    from bitsandbytes.functional import dequantize_4bit

    state = one.weight.quant_state
    # The layer quantizes when it moves to its device; and repacked weights cannot be read here.
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    found: Any = dequantize_4bit(one.weight.data, state)
    found = found if one.compute_dtype is None else found.to(one.compute_dtype)
    return found, None if one.bias is None else one.bias.detach().to(found.dtype)


def merged_bytes(lm: nn.Module) -> int:
    """Size in bytes of a copy of all linear layers' weights of ``lm`` with adapters added."""
    size = 0
    for name, module in lm.named_modules():
        one: Any = module
        # Adapters are added into the weights, so that their own layers are not copied.
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            # A four-bit layer has no values in the type that it computes in.
            kind: torch.dtype = getattr(one, "compute_dtype", None) or one.weight.dtype
            size += one.in_features * one.out_features * kind.itemsize
    return size


@contextmanager
def merged(model: nn.Module, *, linear: bool = True) -> Generator[None]:
    """Context in which every linear layer with LoRA or DoRA uses one weight, made of base and
    adapter, and trained tokens are in one copy of their embedding. ``linear=False``: only the
    latter.

    Only speed and rounding change. No weight is modified, because unmerging an adapter would leave
    rounding errors behind. It needs the memory of those weights again, and has no gradient.
    """
    changed: list[nn.Module] = []
    tables = _hold_tables(model)
    try:
        for layer in model.modules() if linear else ():
            # A forward that is replaced already, as in a nested context, stays.
            if isinstance(layer, LoraLayer) and "forward" not in vars(layer):
                found = whole_weight(layer)
                if found is not None:
                    changed.append(layer)
                    base: Any = layer.base_layer
                    function = functional.linear if type(base) is nn.Linear else _forward
                    forward = partial(function, weight=found[0], bias=found[1])
                    setattr(layer, "forward", forward)  # noqa: B010 - an attribute, not a method of the class
        yield
    finally:
        for layer in changed:
            delattr(layer, "forward")
        for layer in tables:
            delattr(layer, "get_merged_weights")


def _hold_tables(model: nn.Module) -> list[nn.Module]:
    """Have PEFT's layers of trained tokens, which copy their whole table in every forward pass,
    copy it once. Tied layers share the copy. Returns the layers that were changed."""
    held: dict[int, Tensor] = {}
    changed: list[nn.Module] = []
    for layer in model.modules():
        one: Any = layer
        if not isinstance(layer, TrainableTokensLayer) or "get_merged_weights" in vars(layer):
            continue
        if one.disable_adapters or one.merged:
            continue
        key = id(one.base_layer.weight)
        if key not in held:
            held[key] = one.get_merged_weights(one.active_adapters).detach()
        setattr(layer, "get_merged_weights", partial(_held, held[key]))  # noqa: B010
        changed.append(layer)
    return changed


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A four-bit layer computes in a dtype of its own, and gives back that of its input.
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _held(table: Tensor, _: object) -> Tensor:
    return table
