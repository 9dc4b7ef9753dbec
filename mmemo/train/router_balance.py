"""The balance of a mixture of experts while it is trained: the load-balancing loss of its routers.

Shapes: B rows, L tokens, X experts of a layer.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.transformers_compat import find_routers
from mmemo.train.dataloader import Batch
from mmemo.train.trainer import Loss, Objective


class RouterBalanced:
    """An objective with the load-balancing loss of a mixture of experts added in training.

    The loss is that of transformers, over the real tokens of a micro-batch and all layers. It is 1
    where every expert gets an equal share, and is added to the mean loss, times ``coefficient``.

    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6.
    """

    def __init__(self, objective: Objective, coefficient: float) -> None:
        self.objective, self.coefficient = objective, coefficient

    def weight(self, batch: Batch) -> float:
        return self.objective.weight(batch)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """As the objective; ``router_aux_loss`` is the unweighted loss.

        Raises:
            ConfigError: the model has no routers.
        """
        with router_logits(model) as logits:
            loss = self.objective(model, batch)
        config: Any = unwrap(model).language_model.config
        mask: Tensor | None = batch.get("attention_mask")
        if mask is not None and mask.numel() != len(logits[0]):
            mask = None  # a packed sequence, which has no padding
        layers: Any = tuple(logits)
        added = load_balancing_loss_func(
            layers, config.num_experts, config.num_experts_per_tok, mask
        )
        assert isinstance(added, Tensor)
        weight = self.weight(batch)
        metrics = {**loss.metrics, "router_aux_loss": (added.detach() * weight, weight)}
        rows = loss.rows
        if model.training:
            rows = rows + self.coefficient * added * weight / len(rows)
        return replace(loss, rows=rows, metrics=metrics)


@contextmanager
def router_logits(model: nn.Module) -> Generator[list[Tensor]]:
    """A list to which every router's logits, (B * L, X) with gradient, are added in forward passes.

    Raises:
        ConfigError: the language model is no mixture of experts.
    """
    found: list[Tensor] = []
    routers = find_routers(unwrap(model).language_model)
    if not routers:
        raise ConfigError("the model is no mixture of experts; set router_aux_loss_coef to 0")

    def keep(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        found.append(output[0])

    handles = [one.register_forward_hook(keep) for one in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
