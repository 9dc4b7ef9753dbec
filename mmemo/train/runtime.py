"""Process-wide settings of a run: threads, determinism, activation checkpointing, devices."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks


def prepare(train: TrainConfig, run: RunConfig, ranks: Ranks) -> None:
    """Set the CPU threads, deterministic kernels and TF32 of this process. It may be called again.

    Raises:
        ConfigError: ``train.tf32`` is set where there is no CUDA.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(run.threads or max(1, _threads_at_start() // here))
    # An operation without a deterministic kernel warns; an error would forbid such models.
    fixed = deterministic(train, ranks.device)
    torch.use_deterministic_algorithms(fixed, warn_only=True)
    # Filling fresh memory only helps to find reads of uninitialised memory, and slows down every
    # allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    if fixed and ranks.device.type == "cuda":
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False

    if train.tf32 is not None:
        if train.tf32 and ranks.device.type != "cuda":
            raise ConfigError("train.tf32 needs a CUDA device; leave it out")
        torch.backends.cuda.matmul.allow_tf32 = train.tf32
        torch.backends.cudnn.allow_tf32 = train.tf32


def deterministic(train: TrainConfig, device: torch.device) -> bool:
    """Whether a run on ``device`` uses deterministic kernels."""
    if train.full_determinism is None:
        return device.type != "cuda"
    return train.full_determinism


def kernels() -> dict[str, bool]:
    """How this process computes, for the run's log."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_gib``, the most memory that torch has held on this rank's GPU so far, in GiB;
    nothing without CUDA."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


@functools.cache
def _threads_at_start() -> int:
    """The threads before anything was set: preparing twice must not divide twice."""
    return torch.get_num_threads()


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Raises:
        ConfigError: the model does not support it.
    """
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(
            "this model does not support gradient checkpointing; unset train.gradient_checkpointing"
        )
    # Reentrant checkpointing keeps no graph in the forward pass, so that penalties on the experts'
    # gates would have no gradient.
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    if device.type == "cpu":
        return batch
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
