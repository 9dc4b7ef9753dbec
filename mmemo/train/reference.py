"""The reference model of DPO and GRPO: the policy with its adapter disabled."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn


@contextmanager
def reference(model: nn.Module) -> Generator[None]:
    """Inside, ``model`` is the one that training started from: its adapter, trained connectors
    included, is disabled.

    Raises:
        TypeError: the model has no adapter.
    """
    inner: Any = model
    while not isinstance(inner, PeftModel):
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise TypeError(f"{type(model).__name__} has no adapter to disable")
        inner = inner.module
    # PEFT makes every weight of the adapter trainable when it enables it again.
    trainable = {name: p.requires_grad for name, p in inner.named_parameters()}
    try:
        with inner.disable_adapter():
            yield
    finally:
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_(trainable[name])


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, including those inside attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        # Attention hands this number to its kernel, so there is no module to find.
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - not a declared name
