"""What an objective adds and logs of a model's experts, after each forward pass.

Shapes: Y layers, N prompts, M media, K experts of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.losses.experts import load_variation, weight_divergence
from mmemo.models.routing import Gates, Route, here_in
from mmemo.train.meter import Ratio


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """``penalty``: () with gradient, its factors in it. ``metrics``: name -> (sum, count) over
    prompts: ``experts/weight/audio``, ``experts/load/audio/0`` and, where there is a penalty, its
    parts without their factors."""

    penalty: Tensor
    metrics: dict[str, Ratio]


def expert_terms(model: nn.Module) -> ExpertTerms | None:
    """Of the model's last forward pass; None for a model without experts, or with them off.

    Raises:
        ConfigError: the penalty has no way back to the gates.
    """
    here = here_in(model)
    if here is None or here.last is None or not here.last.gates:
        return None
    route, found = here.last, list(here.last.gates.values())
    name = next(iter(route.gates))[1]
    metrics = _shares(route, found)
    config: Any = here.settings[name]
    if config.variant != "mose":
        return ExpertTerms(torch.zeros((), device=route.slots.device), metrics)
    weights, use = _stacked(found)
    _check_gradient(model, weights)
    divergence = weight_divergence(weights, route.present)
    variation = load_variation(use, route.present)
    metrics["experts/weight_divergence"] = (divergence.detach(), 1)
    metrics["experts/load_variation"] = (variation.detach(), 1)
    return ExpertTerms(
        config.weight_penalty * divergence + config.load_penalty * variation, metrics
    )


def _stacked(found: list[Gates]) -> tuple[Tensor, Tensor]:
    """(Y, N, 1 + M) and (Y, N, M, K)."""
    weights = [gates.weights for gates in found if gates.weights is not None]
    use = [gates.use for gates in found if gates.use is not None]
    return torch.stack(weights), torch.stack(use)


def _shares(route: Route, found: list[Gates]) -> dict[str, Ratio]:
    """Sums over prompts of the mean over layers; a prompt counts for the media that it has."""
    there = route.present.sum(0)  # (M,)
    metrics: dict[str, Ratio] = {}
    weights = [gates.weights.detach() for gates in found if gates.weights is not None]
    if weights:
        sums = torch.stack(weights).mean(0).sum(0)  # (1 + M,)
        metrics["experts/weight/text"] = (sums[0], len(route.slots))
        for place, name in enumerate(route.media):
            metrics[f"experts/weight/{name}"] = (sums[1 + place], there[place])
    use = [gates.use.detach() for gates in found if gates.use is not None]
    if use:
        loads = torch.stack(use).mean(0).sum(0)  # (M, K)
        for place, name in enumerate(route.media):
            for number, load in enumerate(loads[place]):
                metrics[f"experts/load/{name}/{number}"] = (load, there[place])
    return metrics


def _check_gradient(model: nn.Module, weights: Tensor) -> None:
    if not (model.training and torch.is_grad_enabled()) or weights.requires_grad:
        return
    if any(".experts_weigh." in n and p.requires_grad for n, p in model.named_parameters()):
        raise ConfigError(
            "with reentrant gradient checkpointing the penalties on experts reach no gate; use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
