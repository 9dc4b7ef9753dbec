"""Linear layers with their LoRA added to the weight, for computation without gradients."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
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
def merged(model: nn.Module) -> Generator[None]:
    """Context in which every plain LoRA layer uses one weight, the sum of base and adapter.

    Only speed and rounding change. No weight is modified, because unmerging an adapter would leave
    rounding errors behind. It needs the memory of those weights again, and has no gradient.
    """
    changed: list[nn.Module] = []
    try:
        for layer in model.modules():
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
