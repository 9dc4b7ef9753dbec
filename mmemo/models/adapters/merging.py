"""Linear layers with their adapters added in, for what is computed without a gradient."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional


def whole_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a linear layer, with its adapter added in: a new tensor if there
    is one. None for anything that is no plain linear layer, with plain LoRA or without: DoRA, nf4,
    a bias in the adapter."""
    if type(layer) is nn.Linear:
        return layer.weight.detach(), layer.bias
    one: Any = layer
    if not isinstance(layer, LoraLinear) or type(one.base_layer) is not nn.Linear:
        return None
    base, names = one.base_layer, [] if one.disable_adapters or one.merged else one.active_adapters
    if one.disable_adapters and one.merged:  # which the next call would undo
        return None
    if any(n not in one.lora_A or n in one.lora_variant or one.lora_bias[n] for n in names):
        return None
    weight = base.weight.detach()
    for name in names:
        weight = weight + one.get_delta_weight(name).detach().to(weight.dtype)
    return weight, base.bias


@contextmanager
def merged(model: nn.Module) -> Generator[None]:
    """Inside, every plain LoRA layer computes with one weight, its base's and the adapter's sum.

    Nothing but speed and rounding changes, and no weight is touched: taking a merged adapter off
    again would leave rounding behind. Needs those weights' memory once more; has no gradient.
    """
    changed: list[nn.Module] = []
    try:
        for layer in model.modules():
            if isinstance(layer, LoraLinear) and "forward" not in vars(layer):
                found = whole_weight(layer)
                if found is not None:
                    changed.append(layer)
                    forward = partial(functional.linear, weight=found[0], bias=found[1])
                    setattr(layer, "forward", forward)  # noqa: B010 - not a method of the class
        yield
    finally:
        for layer in changed:
            delattr(layer, "forward")
