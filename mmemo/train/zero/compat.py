"""What mmemo uses of DeepSpeed that DeepSpeed does not promise to keep.

DeepSpeed itself is imported when it is needed: that takes seconds, and looks for accelerators.
``tests/test_compat.py`` fails by name when a release changes one of these.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmemo.train.distributed import Ranks

_ZERO2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "deepspeed.ops.__compatible_ops__": (),
    "deepspeed.zero.GatheredParameters": (
        "self",
        "params",
        "modifier_rank",
        "fwd_module",
        "enabled",
    ),
    "deepspeed.utils.safe_get_full_fp32_param": ("param",),
    "deepspeed.utils.safe_get_full_optimizer_state": ("param", "optim_state_key"),
    "deepspeed.utils.safe_set_full_fp32_param": ("param", "value"),
    "deepspeed.utils.safe_set_full_optimizer_state": ("param", "value", "optim_state_key"),
    "deepspeed.utils.safe_get_local_fp32_param": ("param",),
    "deepspeed.utils.safe_set_local_fp32_param": ("param", "value"),
    "deepspeed.utils.safe_set_local_optimizer_state": ("param", "value", "optim_state_key"),
    f"{_ZERO2}._lazy_init_hp_params_optimizer_state": ("self",),
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module": (
        *("self", "module", "count"),
    ),
}
"""Dotted name -> its parameters; () for what is no function."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        *("parameter_offload", "fp32_partitioned_groups_flat", "optimizer"),
    ),
    _ZERO2: (*("single_partition_of_fp32_groups", "optimizer", "_hp_optimizer_states_linked"),),
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload": (
        *("module", "forward_hooks", "backward_hooks"),
    ),
    "deepspeed.runtime.zero.partition_parameters.Init": (
        *("ds_shape", "ds_numel", "ds_active_sub_modules"),
    ),
}
"""Dotted name of a class -> attributes that it gives its instances or its parameters."""


def load_deepspeed(*, cpu: bool) -> Any:
    """The library, quiet, and on a CPU without the collectives that it would compile first.

    Its shared-memory kernels serve inference only. Compiling them takes minutes, and a rank that
    is killed meanwhile leaves a lock behind on which every later run waits forever.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if cpu:
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - not a declared name
    return deepspeed


def join_ranks(ranks: Ranks) -> None:
    """Make the process group that DeepSpeed takes, if there is none, and let it know of it."""
    import deepspeed

    backend = "gloo" if ranks.device.type == "cpu" else "nccl"
    if not dist.is_initialized():
        # DeepSpeed wants a process group even for one process; a store in memory opens no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds this rank's share of a parameter instead of all of it."""
    return hasattr(parameter, "ds_id")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All values of a parameter or buffer; where ZeRO-3 shards it, every rank takes part."""
    if not is_sharded(parameter):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also under ZeRO-3, where the tensor itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, also under ZeRO-3."""
    return getattr(parameter, "ds_numel", parameter.numel())


def link_state(optimizer: Any) -> None:
    """Let the parameters of ZeRO-1 and ZeRO-2 see the optimizer's state, which may have been made
    since. DeepSpeed does so after the step of the first group, when the others have none yet."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def set_whole(parameter: nn.Parameter, value: torch.Tensor, entry: str | None, rank: int) -> None:
    """Set this rank's part of a parameter's float32 weight, or of an entry of its optimizer state.

    DeepSpeed's own function for whole values under ZeRO-3 fails where the last rank's part is
    padded.
    """
    from deepspeed import utils

    if not is_sharded(parameter):
        if entry is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, entry)
        return
    size = utils.safe_get_local_fp32_param(parameter).numel()
    flat = value.flatten()[size * rank : size * (rank + 1)]
    part = torch.nn.functional.pad(flat, (0, size - flat.numel()))
    if entry is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, entry)


@contextmanager
def whole_weights(engine: Any) -> Generator[None]:
    """Inside, every rank of a ZeRO-3 ``engine`` holds all weights and may compute by itself.

    DeepSpeed's ``unwrap_model_for_generation`` does the same, but an exception inside it leaves the
    model without its hooks, and it keeps the notes of which modules are using a parameter, with
    which the next forward pass would not gather it.
    """
    import deepspeed

    offload, module = engine.optimizer.parameter_offload, engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        # Else each module would gather and free its weights, together with all other ranks,
        # which generate other numbers of tokens.
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in module.parameters():
            parameter.ds_active_sub_modules.clear()
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
