"""Engines hold the weights and take optimizer steps; a step that is not finite changes nothing.

:class:`PlainEngine` is plain torch: replicated weights, AdamW, gradients summed over the ranks. The
engine in :mod:`mmemo.train.zero.engine` has the same methods. The optimizer's state is saved as
tensors, and the learning rate is a function of the step, so that neither needs pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from mmemo.errors import CheckpointError, ConfigError
from mmemo.models.transformers_compat import persistent_buffers
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.distributed import Ranks
from mmemo.train.zero.compat import whole_shape


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learnt_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training changes, such as running means: those of modules that have a trainable
    weight of their own."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for name, buffer in persistent_buffers(module).items()
    }


def adamw(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, without weight decay on biases, norms and other parameters of one dimension."""
    # By the whole shape: a weight that ZeRO-3 has sharded is itself empty, with one dimension.
    decayed = [p for p in parameters.values() if len(whole_shape(p)) > 1]
    plain = [p for p in parameters.values() if len(whole_shape(p)) <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def learning_rates(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 0 for the first.

    The schedules are those of transformers. Their state is not used: it would have to be saved.
    """
    # get_scheduler wants an optimizer, though only its function of the step is used.
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = config.warmup_steps
    schedule = cast(
        LambdaLR,
        get_scheduler(
            config.lr_scheduler_type,
            probe,
            num_warmup_steps=round(warmup if warmup >= 1 else warmup * steps),
            num_training_steps=steps,
        ),
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]

    def rate(step: int) -> float:
        return config.learning_rate * factor(step)

    return rate


def save_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path
) -> None:
    """Write the optimizer's tensors, named ``<entry>/<parameter>``.

    The rest of its state follows from the config, and the learning rate from the step.
    """
    tensors = {
        f"{entry}/{name}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, path)


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path
) -> None:
    """Read what :func:`save_state` wrote. Parameters that were never updated have no state.

    Raises:
        CheckpointError: the file names a parameter that the model does not train.
    """
    for key, value in load_file(path).items():
        entry, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(
                f"{path}: has optimizer state for '{name}', which is not trainable in this model; "
                "resume with the model and trainable parts of the checkpoint"
            )
        parameter = parameters[name]
        # AdamW keeps its step count as a float32 scalar, everything else like the weights.
        optimizer.state[parameter][entry] = value.to(parameter.device)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the trainable weights and learnt buffers."""
    # safetensors refuses tensors that are not contiguous.
    save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, path)


def load_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite the trainable weights and learnt buffers.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    tensors: dict[str, Tensor] = load_file(path)
    check_weights(weights, tensors, path)
    with torch.no_grad():
        for name, weight in weights.items():
            # In place: the model and the optimizer hold these very tensors.
            weight.copy_(tensors[name])


def check_weights(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that saved ``tensors`` are those of ``weights``.

    Raises:
        CheckpointError: names or shapes differ.
    """
    differ = sorted(set(tensors) ^ set(weights)) or [
        name for name, p in weights.items() if tensors[name].shape != p.shape
    ]
    if differ:
        raise CheckpointError(
            f"{path}: does not fit the model ('{differ[0]}' and {len(differ) - 1} more weights); "
            "resume with the model and trainable parts of the checkpoint"
        )


@dataclass(frozen=True, slots=True)
class Update:
    """The result of a step: the gradient ``norm`` before clipping, and whether the step was
    ``applied``, which is the same on every rank."""

    norm: float
    applied: bool


class Engine(Protocol):
    """What the training loop needs of the thing that holds the weights."""

    kind: EngineKind
    model: nn.Module
    """The model that objectives call."""
    in_step: bool
    """Whether all ranks must make the same number of forward and backward passes in a step."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """Inside, this rank holds all weights and may compute with the model's modules on its own,
        without calling :attr:`model`. Every rank must enter and leave it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (), which is this rank's share of the step's loss."""
        ...

    def update(self, learning_rate: float) -> Update:
        """Sum the gradients over the ranks, clip, step and clear. When the gradient norm is not
        finite, weights and optimizer state stay bit-identical."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state. Called on every rank."""
        ...

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, from a verified folder."""
        ...

    def bytes_to_save(self) -> int:
        """About how many bytes :meth:`save` will write, over all ranks."""
        ...

    def whole_state(self) -> dict[str, Tensor] | None:
        """All weights by name, on the main rank's CPU, for saving a model whose module does not
        hold them whole; None when it does. Called on every rank."""
        ...


EngineKind = Literal["torch", "deepspeed"]


def engine_kind(run: RunConfig) -> EngineKind:
    """The kind of engine that a run will have."""
    return "torch" if run.deepspeed is None else "deepspeed"


class PlainEngine:
    """AdamW on replicated weights. Trainable weights are float32, also when computing in bf16."""

    kind: EngineKind = "torch"
    in_step = False

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.model = model.to(ranks.device)
        self.parameters = checked_trainable(model, config)
        if config.bf16:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.float()
        self._list = list(self.parameters.values())
        self._state = {**self.parameters, **learnt_buffers(model)}
        # Once is enough: from here on all ranks apply the same gradients to the same weights.
        ranks.broadcast([weight.data for weight in self._state.values()])
        self.optimizer = adamw(self.parameters, config)

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
        # Clipped after the sum: the norm is that of the whole step, and the same on every rank.
        limit = self.config.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self._list, limit))
        applied = norm < float("inf")  # False for NaN too
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        # To None, by which sum_gradients tells unused parameters from those with a gradient of 0.
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def save(self, folder: Path) -> None:
        if self.ranks.is_main:
            save_weights(self._state, folder / "trainable.safetensors")
            save_state(self.optimizer, self.parameters, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        path = folder / "trainable.safetensors"
        for name in _frozen_before(self.parameters, path):
            self.parameters.pop(name).requires_grad_(False)
            del self._state[name]
        self._list = list(self.parameters.values())
        load_weights(self._state, path)
        load_state(self.optimizer, self.parameters, folder / "optimizer.safetensors")

    def bytes_to_save(self) -> int:
        # Weights and two moments, and a little for names and random states.
        return sum(3 * p.numel() * p.element_size() + 512 for p in self._list) + (1 << 16)

    def whole_state(self) -> dict[str, Tensor] | None:
        return None


def _frozen_before(names: Iterable[str], path: Path) -> list[str]:
    """Those of ``names`` that did not learn in the run whose weights ``path`` holds, because
    versions up to 0.3 took the picture side of the pre-fusion for an encoder. Such a run goes on as
    it began."""
    with safe_open(path, framework="pt") as saved:
        known = set(saved.keys())
    return [
        name for name in names if name not in known and {"fusion", "visual"} <= {*name.split(".")}
    ]


def checked_trainable(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The trainable parameters, when there are any and their precision can be trained.

    Raises:
        ConfigError: nothing is trainable, or half-precision weights would be updated directly.
    """
    parameters = trainable(model)
    if not parameters:
        raise ConfigError("no part of the model is trainable; name at least one in 'trainable'")
    half = [name for name, p in parameters.items() if p.dtype != torch.float32]
    # With bf16, either engine updates the trainable weights in float32.
    if half and not config.bf16:
        raise ConfigError(
            f"'{half[0]}' would be trained in {parameters[half[0]].dtype}, where small updates are "
            "lost; set train.bf16=true, or model.dtype=float32"
        )
    return parameters
