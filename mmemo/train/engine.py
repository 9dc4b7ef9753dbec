"""One optimizer step: gradients in, weights changed or, if anything is not finite, left alone.

The plain engine is torch's: replicated weights, gradients summed over the ranks. The DeepSpeed
engine in ``zero.py`` has the same methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.train import optim
from mmemo.train.config import TrainConfig
from mmemo.train.distributed import Ranks


@dataclass(frozen=True, slots=True)
class Update:
    """What became of a step. ``applied`` is the same on every rank; ``norm`` is before clipping."""

    norm: float
    applied: bool


class Engine(Protocol):
    """What the loop needs of an optimizer."""

    kind: str
    model: nn.Module
    """What objectives call."""
    in_step: bool
    """Whether all ranks must make as many forward and backward passes in a step."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """Inside, this rank holds all weights and may compute with the model's modules by itself,
        without :attr:`model` being called. Entered and left on every rank."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (), which is already this rank's share of the step's."""
        ...

    def update(self, learning_rate: float) -> Update:
        """Sum over the ranks, clip, step, clear. Skips when the gradient norm is not finite, and
        then leaves weights and optimizer state as they were, to the bit."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; called on every rank."""
        ...

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, from a folder that was verified."""
        ...

    def bytes_to_save(self) -> int:
        """About how much all ranks' :meth:`save` will write."""
        ...

    def whole_state(self) -> dict[str, Tensor] | None:
        """Weights by name for saving the model, when the module itself does not hold them whole;
        they are on the main rank's CPU. None when it does. Called on every rank."""
        ...


class PlainEngine:
    """AdamW on replicated weights. Trainable weights are float32, also when computing in bf16."""

    kind = "torch"
    in_step = False

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.model = model.to(ranks.device)
        self.parameters = checked_trainable(model, config)
        if config.bf16:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.float()
        self._list = list(self.parameters.values())
        self._state = {**self.parameters, **optim.learnt_buffers(model)}
        ranks.broadcast([weight.data for weight in self._state.values()])
        self.optimizer = optim.adamw(self.parameters, config)

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.config.bf16:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, learning_rate: float) -> Update:
        self.ranks.sum_gradients(self._list)
        limit = self.config.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self._list, limit))
        applied = norm < float("inf")  # False for NaN too
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def save(self, folder: Path) -> None:
        if self.ranks.is_main:
            optim.save_weights(self._state, folder / "trainable.safetensors")
            optim.save_state(self.optimizer, self.parameters, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        optim.load_weights(self._state, folder / "trainable.safetensors")
        optim.load_state(self.optimizer, self.parameters, folder / "optimizer.safetensors")

    def bytes_to_save(self) -> int:
        # Weights and two moments, and a little for names and random states.
        return sum(3 * p.numel() * p.element_size() + 512 for p in self._list) + (1 << 16)

    def whole_state(self) -> dict[str, Tensor] | None:
        return None


def checked_trainable(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The trainable parameters, when there are any and their precision can be trained.

    Raises:
        ConfigError: nothing is trainable, or half-precision weights would be updated directly.
    """
    parameters = optim.trainable(model)
    if not parameters:
        raise ConfigError("no part of the model is trainable; name one in 'trainable'")
    half = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if half and not config.bf16:
        raise ConfigError(
            f"'{half[0]}' is trained in {parameters[half[0]].dtype}, where small updates are "
            "lost; set train.bf16=true, or model.dtype=float32"
        )
    return parameters
