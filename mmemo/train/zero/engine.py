"""The DeepSpeed engine: ZeRO shards the optimizer, the gradients and, in stage 3, the weights.

A step that is not finite is skipped as follows. The loop multiplies a loss that is not finite by
NaN, so its gradient is NaN. DeepSpeed sums the gradients over the ranks and takes their norm over
all shards before it touches a weight, and skips a step whose norm is NaN or infinite. Every rank
comes to the same decision without a message of our own. The limit: DeepSpeed takes the norm in the
precision that it reduces gradients in. With ``bf16``, a sum over very many ranks can overflow
although each rank's gradient is finite; such a step is skipped too.

GRPO generates completions with whole weights: in stage 3 every rank holds the whole model
meanwhile, so it must fit on its device. Log-probabilities and gradients are computed sharded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mmemo import content
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import in_adapter
from mmemo.train.config import TrainConfig
from mmemo.train.distributed import Ranks
from mmemo.train.engine import EngineKind, Update, adamw, checked_trainable
from mmemo.train.zero.compat import load_deepspeed, whole_weights

_TAG = "engine"


class DeepSpeedEngine:
    """A DeepSpeed engine around the model.

    Its checkpoints are shards that only the same number of ranks can read. DeepSpeed unpickles
    them, so they are read only after their manifest was verified.
    """

    kind: EngineKind = "deepspeed"
    in_step = True

    def __init__(
        self, model: nn.Module, config: TrainConfig, path: str, ranks: Ranks, width: int = 1024
    ) -> None:
        deepspeed = load_deepspeed(cpu=ranks.device.type == "cpu")
        self.ranks = ranks
        self.values = filled(path, config, ranks.size, width)
        self.stage = int(self.values["zero_optimization"]["stage"])
        if not dist.is_initialized():
            # DeepSpeed wants a process group even for one process; a store in memory opens no port.
            backend = "gloo" if ranks.device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parameters = checked_trainable(model, config)
        self._numbers = sum(p.numel() for p in parameters.values())
        engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=adamw(parameters, config),
            config=self.values,
            dist_init_required=False,
        )
        self._engine: Any = engine
        self.model: nn.Module = engine

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine holds the model in bfloat16

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stage < 3 else whole_weights(self._engine)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over the ranks, while the loop's shares are to be summed.
        # They are shares of the whole step, so accumulation does not divide them either.
        self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def update(self, learning_rate: float) -> Update:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return Update(
            float("nan") if norm is None else float(norm), bool(self._engine.was_step_applied())
        )

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        # Not strict: the frozen parameters were not saved.
        self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )

    def bytes_to_save(self) -> int:
        # Weights, their float32 copy and two moments (16 bytes); names, shapes and padding.
        return self._numbers * 16 + (1 << 20) * self.ranks.size

    def whole_state(self) -> dict[str, Tensor] | None:
        if self.stage < 3:
            return None  # every rank holds whole weights
        import deepspeed

        module: nn.Module = self._engine.module
        adapted = any(in_adapter(name) for name, _ in module.named_parameters())
        state: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if adapted and not (parameter.requires_grad or _is_saved(name)):
                continue
            # One at a time: the whole model is on no device, only in the main rank's CPU memory.
            with deepspeed.zero.GatheredParameters([parameter]):
                # Every rank takes part in gathering, though only one keeps what is gathered.
                if self.ranks.is_main:
                    state[name] = parameter.detach().cpu().clone()
        if self.ranks.is_main:
            state.update({name: buffer.cpu() for name, buffer in _saved_buffers(module).items()})
        return state


def _is_saved(name: str) -> bool:
    return in_adapter(name) or ".modules_to_save." in name


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    # state_dict() leaves out the buffers that are not to be saved.
    known = {name for name, _ in module.named_buffers()}
    return {name: value for name, value in module.state_dict().items() if name in known}


def filled(path: str, config: TrainConfig, ranks: int, width: int) -> dict[str, Any]:
    """The DeepSpeed config of a file, with each ``auto`` filled in from ``train``.

    Args:
        width: the language model's hidden size, which sets the bucket sizes of stage 3.

    Raises:
        ConfigError: the file is no DeepSpeed config, has a setting that is not supported, or
            contradicts ``train``.
    """
    file = content.find(path)
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        stage = int(values["zero_optimization"]["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: is not a DeepSpeed config with zero_optimization.stage ({error})"
        ) from error
    if values.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{file}: fp16 is not supported; use train.bf16")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{file}: zero_optimization.stage must be 1, 2 or 3, not {stage}")
    if "optimizer" in values or "scheduler" in values:
        raise ConfigError(f"{file}: remove 'optimizer' and 'scheduler'; train has their settings")
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    wanted = {
        "train_batch_size": micro * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": config.bf16,
    }
    sizes = {
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }
    for key, value in wanted.items():
        _put(values, key, value, file)
    for key, value in sizes.items():
        _put(values, key, value, file, only_auto=True)
    # A step may have any number of micro-batches (GRPO splits groups): the loop says where it ends.
    values["managed_gradient_accumulation"] = False
    if stage == 1 and values["zero_optimization"].get("overlap_comm"):
        raise ConfigError(
            f"{file}: stage 1 cannot overlap_comm here; set it to false, or use stage 2"
        )
    left = [key for key in _flat(values) if _flat(values)[key] == "auto"]
    if left:
        raise ConfigError(f"{file}: '{left[0]}' cannot be 'auto' here; give a value")
    return {"steps_per_print": 2**31 - 1, **values}


def _put(
    values: dict[str, Any], key: str, value: Any, file: Path, *, only_auto: bool = False
) -> None:
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
    given = target.get(last, "auto" if not only_auto else None)
    if given == "auto":
        target[last] = value
    elif not only_auto and given != value:
        raise ConfigError(f'{file}: {key} is {given} but train asks for {value}; write "auto"')


def _flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{place}{key}."))  # pyright: ignore[reportUnknownArgumentType]
        else:
            found[place + key] = value
    return found
