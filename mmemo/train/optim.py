"""AdamW, its state as tensors, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from mmemo.errors import CheckpointError
from mmemo.train.config import TrainConfig


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learnt_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training changes, such as running means: those beside a trainable weight."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }


def adamw(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and other vectors."""
    decayed = [p for p in parameters.values() if _dimensions(p) > 1]
    plain = [p for p in parameters.values() if _dimensions(p) <= 1]
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


def _dimensions(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 the tensor itself is empty and its shape is kept beside it.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape)


def learning_rates(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Step (0 for the first) to learning rate: transformers' schedules, without their state."""
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

    The rest of its state is the config, and the learning rate follows from the step.
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
    """Read what :func:`save_state` wrote. A parameter that was never updated has no state.

    Raises:
        CheckpointError: the file names a parameter that the model does not train.
    """
    for key, value in load_file(path).items():
        entry, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(
                f"{path}: has state of '{name}', which this model does not train; resume with "
                "the model and trainable parts of the checkpoint"
            )
        parameter = parameters[name]
        # AdamW keeps its step count as a float32 scalar, everything else like the weights.
        optimizer.state[parameter][entry] = value.to(parameter.device)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the trainable weights and learnt buffers."""
    save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, path)


def load_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite the trainable weights and learnt buffers.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    tensors: dict[str, Tensor] = load_file(path)
    differ = sorted(set(tensors) ^ set(weights)) or [
        name for name, p in weights.items() if tensors[name].shape != p.shape
    ]
    if differ:
        raise CheckpointError(
            f"{path}: does not fit the model ('{differ[0]}' and {len(differ) - 1} more weights); "
            "resume with the model and trainable parts of the checkpoint"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
