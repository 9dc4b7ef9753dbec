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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmemo import content
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import in_adapter
from mmemo.train.config import TrainConfig
from mmemo.train.distributed import Ranks
from mmemo.train.engine import (
    EngineKind,
    Update,
    adamw,
    check_weights,
    checked_trainable,
    learnt_buffers,
    save_weights,
)
from mmemo.train.zero.compat import (
    is_sharded,
    join_ranks,
    link_state,
    load_deepspeed,
    set_whole,
    whole_shape,
    whole_weights,
)

_TAG = "engine"
"""The folder of DeepSpeed's own shards in a checkpoint of mmemo 0.4."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """A DeepSpeed engine around the model.

    Its checkpoints are those of the plain engine: weights and optimizer state by the parameters'
    names, as safetensors. So a run goes on with another number of ranks, another ZeRO stage or
    without DeepSpeed. Up to 0.4 they were DeepSpeed's own shards, which it unpickles and which only
    as many ranks can read; these are still read, after their manifest was verified.
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
        join_ranks(ranks)
        self.parameters = parameters = checked_trainable(model, config)
        self._buffers = learnt_buffers(model)
        self._numbers = sum(p.numel() for p in parameters.values())
        if config.bf16 and any(is_sharded(p) for p in model.parameters()):
            # DeepSpeed takes it that all weights were shared out, and casts none.
            for parameter in model.parameters():
                if not is_sharded(parameter):
                    parameter.data = parameter.data.bfloat16()
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
        if self.stage < 3:
            link_state(self._engine.optimizer)
        weights = {name: self._gather(p) for name, p in self.parameters.items()}
        moments = {
            f"{entry}/{name}": self._gather(p, entry)
            for name, p in self.parameters.items()
            for entry in self._moments()
        }
        if not self.ranks.is_main:
            return
        save_weights({**_present(weights), **self._buffers}, folder / "trainable.safetensors")
        state = _present(moments)
        if state:
            steps = torch.tensor(self._steps(), dtype=torch.float32)
            state |= {f"step/{name}": steps.clone() for name in self.parameters}
        save_file(state, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        if (folder / _TAG).exists():
            # Not strict: the frozen parameters were not saved.
            self._engine.load_checkpoint(
                str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
            )
            return
        weights = load_file(folder / "trainable.safetensors")
        check_weights({**self._shapes(), **self._buffers}, weights, folder)
        moments = load_file(folder / "optimizer.safetensors")
        steps = max((float(x) for key, x in moments.items() if key.startswith("step/")), default=0)
        if steps:
            self._begin_state(steps)
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(weights[name])
            for name, parameter in self.parameters.items():
                self._scatter(parameter, weights[name])
                for entry in _MOMENTS if steps else ():
                    # A parameter that no step has used has none, which are zeros here.
                    self._scatter(parameter, moments.get(f"{entry}/{name}"), entry)

    def _gather(self, parameter: nn.Parameter, entry: str | None = None) -> Tensor | None:
        """A whole float32 weight, or an entry of its optimizer state, on the main rank's CPU. Every
        rank takes part, with one parameter at a time."""
        from deepspeed import utils

        if entry is None:
            whole: Any = utils.safe_get_full_fp32_param(parameter)
        else:
            whole = utils.safe_get_full_optimizer_state(parameter, entry)
        return whole.detach().cpu().contiguous() if self.ranks.is_main else None

    def _scatter(
        self, parameter: nn.Parameter, value: Tensor | None, entry: str | None = None
    ) -> None:
        """Set this rank's part of a weight, or of an entry of its optimizer state (None: zeros)."""
        if value is None:
            value = torch.zeros(whole_shape(parameter), dtype=torch.float32)
        value = value.to(self.ranks.device, torch.float32)
        set_whole(parameter, value, entry, self.ranks.rank)
        if entry is not None:
            return
        # The weights that the model computes with are others than those that are updated.
        if self.stage < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _partitions(self) -> list[Tensor]:
        """This rank's flat parts, for which the inner optimizer keeps its state."""
        optimizer = self._engine.optimizer
        if self.stage < 3:
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_partitioned_groups_flat)

    def _moments(self) -> tuple[str, ...]:
        """The entries of the optimizer's state that are like the weights; none before a step."""
        state = self._engine.optimizer.optimizer.state
        return _MOMENTS if any(state.get(part) for part in self._partitions()) else ()

    def _steps(self) -> float:
        state = self._engine.optimizer.optimizer.state
        return max(float(state[part]["step"]) for part in self._partitions() if state.get(part))

    def _begin_state(self, steps: float) -> None:
        """What the first step would make: state for this rank's parts, and the parameters' views of
        it."""
        optimizer = self._engine.optimizer
        for part in self._partitions():
            state = optimizer.optimizer.state[part]
            state["step"] = torch.tensor(steps, dtype=torch.float32, device=part.device)
            for entry in _MOMENTS:
                state[entry] = torch.zeros_like(part)
        if self.stage < 3:
            link_state(optimizer)

    def _shapes(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(whole_shape(p), device="meta") for name, p in self.parameters.items()
        }

    def bytes_to_save(self) -> int:
        # Weights and two moments in float32, and a little for names and shapes.
        return self._numbers * 12 + 512 * len(self.parameters) + (1 << 16)

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


def _present(found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if value is not None}


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
        values.pop("zero3_init_flag", None)  # see loading.py
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
