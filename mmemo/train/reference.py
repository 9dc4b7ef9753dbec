"""The model that training started from, and what makes the present one comparable with it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn


@contextmanager
def reference(model: nn.Module) -> Generator[None]:
    """The model that training started from: its adapter, connectors included, switched off.

    Raises:
        TypeError: the model has no adapter.
    """
    inner: Any = model
    while not isinstance(inner, PeftModel):
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise TypeError(f"{type(model).__name__} has no adapter to switch off")
        inner = inner.module
    # PEFT lets everything in the adapter learn when it is switched on again.
    learns = {name: p.requires_grad for name, p in inner.named_parameters()}
    try:
        with inner.disable_adapter():
            yield
    finally:
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_(learns[name])


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, those inside attention too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - not a declared name
