"""Linear layers with their LoRA added to the weight, for computation without gradients."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional


def whole_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a linear layer with its adapter added, as a new tensor.

    Without an adapter the weight itself is returned. None for anything other than a plain linear
    layer with or without plain LoRA, such as DoRA, nf4 or an adapter with a bias.
    """
    # Subclasses, such as bitsandbytes' Linear4bit, may hold no plain weight.
    if type(layer) is nn.Linear:
        return layer.weight.detach(), layer.bias
    one: Any = layer
    if not isinstance(layer, LoraLinear) or type(one.base_layer) is not nn.Linear:
        return None
    base, names = one.base_layer, [] if one.disable_adapters or one.merged else one.active_adapters
    if one.disable_adapters and one.merged:  # the next forward would unmerge it
        return None
    # DoRA and other variants do more than add one product to the weight.
    if any(n not in one.lora_A or n in one.lora_variant or one.lora_bias[n] for n in names):
        return None
    weight = base.weight.detach()
    for name in names:
        weight = weight + one.get_delta_weight(name).detach().to(weight.dtype)
    return weight, base.bias


@contextmanager
def merged(model: nn.Module, *, linear: bool = True) -> Generator[None]:
    """Context in which every plain LoRA layer uses one weight, the sum of base and adapter, and
    trained tokens are in one copy of their embedding. ``linear=False``: only the latter.

    Only speed and rounding change. No weight is modified, because unmerging an adapter would leave
    rounding errors behind. It needs the memory of those weights again, and has no gradient.
    """
    changed: list[nn.Module] = []
    tables = _hold_tables(model)
    try:
        for layer in model.modules() if linear else ():
            # A forward that is replaced already, as in a nested context, stays.
            if isinstance(layer, LoraLinear) and "forward" not in vars(layer):
                found = whole_weight(layer)
                if found is not None:
                    changed.append(layer)
                    forward = partial(functional.linear, weight=found[0], bias=found[1])
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


def _held(table: Tensor, _: object) -> Tensor:
    return table
