"""The balance of a mixture of experts while it is trained: the load-balancing loss of its routers.

The loss is that of transformers, over the real tokens of a micro-batch's forward passes and all
layers. It is 1 where every expert gets an equal share, and is added to the mean loss, times
``train.router_aux_loss_coef``.

Source: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6.

Shapes: B rows, L tokens, X experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

from mmemo.errors import ConfigError
from mmemo.generation.packing import REAL
from mmemo.models.adapters.lora import unwrap
from mmemo.models.transformers_compat import find_routers
from mmemo.train.dataloader import Batch
from mmemo.train.trainer import Loss, Objective


@dataclass
class RouterPasses:
    """What the routers said in some forward passes.

    ``logits``: for each layer those of each pass, (B * L, X). ``masks``: for each pass its real
    tokens (B * L,), or None if all are.
    """

    logits: list[list[Tensor]]
    masks: list[Tensor | None] = field(default_factory=list[Tensor | None])

    def loss(self, experts: int, top: int) -> Tensor:
        """The load-balancing loss, a scalar."""
        sizes = [len(x) for x in self.logits[0]]
        mask: Tensor | None = None
        if any(one is not None for one in self.masks):
            like = self.logits[0][0]
            every = [
                like.new_ones(size, dtype=torch.long) if one is None else one.to(like.device)
                for one, size in zip(self.masks, sizes, strict=True)
            ]
            mask = torch.cat(every)[None]
        layers: Any = tuple(torch.cat(layer) for layer in self.logits)
        found = load_balancing_loss_func(layers, experts, top, mask)
        assert isinstance(found, Tensor)
        return found


class RouterBalanced:
    """An objective with the routers' loss added in training (:func:`with_router_loss`)."""

    def __init__(self, objective: Objective, coefficient: float) -> None:
        self.objective, self.coefficient = objective, coefficient

    def weight(self, batch: Batch) -> float:
        return self.objective.weight(batch)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """As the objective.

        Raises:
            ConfigError: the model has no routers.
        """
        weight = self.weight(batch)
        return with_router_loss(self.objective, model, batch, weight, self.coefficient)


def with_router_loss(
    compute: Callable[[nn.Module, Batch], Loss],
    model: nn.Module,
    batch: Batch,
    weight: float,
    coefficient: float | None,
    *,
    learning_only: bool = False,
) -> Loss:
    """The loss of a micro-batch with that of the routers, which ``router_aux_loss`` logs
    unweighted. In evaluation it is only logged.

    Args:
        weight: what the micro-batch adds to the step's normaliser.
        coefficient: None and 0 leave everything out.
        learning_only: count passes with gradient alone, for an objective that computes a reference
            as well; without any, in evaluation, there is nothing to log.

    Raises:
        ConfigError: the model has no routers.
    """
    if not coefficient or (learning_only and not torch.is_grad_enabled()):
        return compute(model, batch)
    with router_passes(model, learning_only=learning_only) as passes:
        loss = compute(model, batch)
    if not passes.logits[0]:  # an objective that had nothing to learn from
        return loss
    config: Any = unwrap(model).language_model.config
    added = passes.loss(config.num_experts, config.num_experts_per_tok)
    metrics = {**loss.metrics, "router_aux_loss": (added.detach() * weight, weight)}
    rows = loss.rows
    if model.training:
        rows = rows + coefficient * added * weight / len(rows)
    return replace(loss, rows=rows, metrics=metrics)


def check_routers(model: nn.Module, coefficient: float | None) -> None:
    """Check that a model has routers, if their loss is asked for.

    Raises:
        ConfigError: it has none.
    """
    if coefficient:
        _routers(model)


def _routers(model: nn.Module) -> list[nn.Module]:
    found = find_routers(unwrap(model).language_model)
    if not found:
        raise ConfigError("the model is no mixture of experts; set train.router_aux_loss_coef to 0")
    return found


@contextmanager
def router_passes(model: nn.Module, *, learning_only: bool = False) -> Generator[RouterPasses]:
    """What the routers say in forward passes inside, with gradient.

    Raises:
        ConfigError: the language model is no mixture of experts.
    """
    routers, lm = _routers(model), unwrap(model).language_model
    found = RouterPasses([[] for _ in routers])

    def counts() -> bool:
        return torch.is_grad_enabled() or not learning_only

    def begin(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        if counts():
            shape, mask = given["inputs_embeds"].shape[:2], given.get("attention_mask")
            # Any other mask is that of a packed sequence, whose prompts may be padded.
            if not isinstance(mask, Tensor) or mask.shape != shape:
                mask = REAL.get()
            found.masks.append(None if mask is None else mask.reshape(-1).long())

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            if counts():
                found.logits[layer].append(output[0])

        return hook

    handles = [lm.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [one.register_forward_hook(keep(layer)) for layer, one in enumerate(routers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
