"""The reference model of DPO and GRPO: the model that training starts from.

A new adapter is disabled, which costs no memory (:func:`reference`). Where other weights learn, the
reference is a copy of them (:class:`FrozenCopy`): frozen weights are shared with the policy, so the
copy of a continued adapter is as small as the adapter, and that of full fine-tuning as large as the
language model.

DeepSpeed does not know the copy: each rank has a whole one, in stage 3 too, where it shares nothing
because the policy's frozen weights are sharded. ``copy_cpu`` keeps it in the CPU's memory, from
which it comes to the device while it scores.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Protocol

from peft import PeftModel
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import ModelConfig
from mmemo.models.composed.configuration import TOWER
from mmemo.models.qwen.native import NativeModel

ReferenceKind = Literal["adapter_off", "copy", "copy_cpu"]


class ReferenceModel(Protocol):
    """The model that training started from, whatever the policy has become since."""

    def at_start(self, model: nn.Module) -> None:
        """Called once, when the engine holds the policy ``model`` and no weight has changed."""
        ...

    def of(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """A context with the reference of the policy ``model``, in evaluation mode."""
        ...


class AdapterOff:
    """The policy with its adapter disabled."""

    def at_start(self, model: nn.Module) -> None:
        """There is nothing to do."""

    @contextmanager
    def of(self, model: nn.Module) -> Generator[nn.Module]:
        """The policy, which computes as its own reference inside the context."""
        training = model.training
        # Without dropout, even where the policy keeps its own.
        model.eval()
        try:
            with reference(model):
                yield model
        finally:
            model.train(training)


class FrozenCopy:
    """A copy of the weights that learn, around the frozen ones.

    Args:
        model: the policy before an engine holds it, on its device, with its trainable parameters
            chosen.
        offload: keep the copy in the CPU's memory between its uses.
        shared: share the frozen weights. An engine that shards these needs False.
    """

    def __init__(self, model: nn.Module, *, offload: bool = False, shared: bool = True) -> None:
        self.model = _copy(model, shared=shared).eval().requires_grad_(False)
        self.offload = offload
        self._homes: list[tuple[Tensor, Tensor]] = []

    def at_start(self, model: nn.Module) -> None:
        """Give the copy the engine's number types, so that it computes what the policy does."""
        policy: Any = model
        while not _same_names(self.model, policy):
            policy = policy.module
        kept = {id(p) for p in policy.parameters()}
        types = {name: p.dtype for name, p in policy.named_parameters()}
        types |= {name: b.dtype for name, b in policy.named_buffers()}
        own: list[Tensor] = []
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) not in kept:
                tensor.data = tensor.data.to(types.get(name, tensor.dtype))
                own.append(tensor)
        # Each with its storage in the CPU's memory, which stays there: a copy never changes.
        self._homes = [(tensor, tensor.data.cpu()) for tensor in own] if self.offload else []
        self._send_home()

    def _send_home(self) -> None:
        for tensor, home in self._homes:
            tensor.data = home

    @contextmanager
    def of(self, model: nn.Module) -> Generator[nn.Module]:
        """The copy, on the device of the policy ``model``."""
        device = next(p.device for p in model.parameters())
        for tensor, home in self._homes:
            tensor.data = home.to(device)
        try:
            yield self.model
        finally:
            self._send_home()


def starts_new_adapter(model: ModelConfig) -> bool:
    """Whether disabling the adapter gives the model that training starts from."""
    path = None if model.path is None else Path(model.path)
    has_adapter = path is not None and (path / "adapter_config.json").exists()
    return model.lora is not None and not (has_adapter and model.adapter == "continue")


def check_adapter_off(model: ModelConfig, field: str, instead: str) -> None:
    """Check that disabling the adapter gives the reference.

    Args:
        field: the config's field that asks for it.
        instead: the other values of the field.

    Raises:
        ConfigError: there is no new adapter.
    """
    if not starts_new_adapter(model):
        raise ConfigError(
            f"{field} is adapter_off, so the reference is the model without its adapter, but this "
            "model has no new adapter; set model.lora (with model.adapter=merge if model.path is "
            f"an adapter), or {field}={instead}"
        )


def make_reference(model: nn.Module, kind: ReferenceKind, *, zero_stage: int = 0) -> ReferenceModel:
    """The reference of a policy that no engine holds yet.

    Args:
        zero_stage: DeepSpeed's stage, 0 without it.
    """
    if kind == "adapter_off":
        return AdapterOff()
    return FrozenCopy(model, offload=kind == "copy_cpu", shared=zero_stage < 3)


def copied(model: nn.Module, *, shared: bool = True) -> list[nn.Parameter]:
    """The parameters that :class:`FrozenCopy` has twice."""
    inner: Any = unwrap(model)
    # A native model may have a face's encoder beside its own.
    own = inner.encoder_names if isinstance(inner, NativeModel) else ()
    encoders = {*TOWER.values(), *own}
    return [
        parameter
        for name, parameter in model.named_parameters()
        # Encoders never run in training, since their features are stored.
        if parameter.requires_grad or not (shared or encoders.intersection(name.split(".")))
    ]


def _copy(model: nn.Module, *, shared: bool) -> nn.Module:
    twice = {id(p) for p in copied(model, shared=shared)}
    # What deepcopy finds in the memo it takes as it is.
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in twice}
    return deepcopy(model, memo)


def _same_names(one: nn.Module, other: nn.Module) -> bool:
    return {n for n, _ in one.named_parameters()} == {n for n, _ in other.named_parameters()}


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
