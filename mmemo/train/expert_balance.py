"""What an objective adds and logs of a model's experts, after its forward passes.

Shapes: Y layers, N prompts, M media, K experts of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.losses.expert_balance import load_variation, weight_divergence
from mmemo.models.adapters.routing import Gates, Route, find_router
from mmemo.train.metrics import Ratio


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """``penalty``: () with gradient, its factors in it. ``metrics``: name -> (sum, count) over
    prompts: ``experts/weight/audio``, ``experts/load/audio/0`` and, where there is a penalty, its
    parts without their factors."""

    penalty: Tensor
    metrics: dict[str, Ratio]


def expert_terms(model: nn.Module, routes: Sequence[Route] | None = None) -> ExpertTerms | None:
    """Of the forward passes ``routes``, all prompts together; None: of the model's last one. A
    prompt that several rows repeat counts once. None for a model without experts, or with them off.

    Raises:
        ConfigError: the penalty has no way back to the gates.
    """
    router = find_router(model)
    if router is None:
        return None
    seen = ([] if router.last is None else [router.last]) if routes is None else routes
    seen = [route for route in seen if route.gates]
    if not seen:
        return None
    found = [_together(seen, place) for place in seen[0].gates]
    present = torch.cat([_own(route, route.present) for route in seen])
    metrics = _shares(router.media, present, found)
    config: Any = router.settings[next(iter(seen[0].gates))[1]]
    if config.variant != "mose":
        return ExpertTerms(torch.zeros((), device=present.device), metrics)
    weights = torch.stack([gates.weights for gates in found if gates.weights is not None])
    use = torch.stack([gates.use for gates in found if gates.use is not None])
    _check_gradient(model, weights)
    divergence = weight_divergence(weights, present)
    variation = load_variation(use, present)
    metrics["experts/weight_divergence"] = (divergence.detach(), 1)
    metrics["experts/load_variation"] = (variation.detach(), 1)
    return ExpertTerms(
        config.weight_penalty * divergence + config.load_penalty * variation, metrics
    )


def _own(route: Route, values: Tensor) -> Tensor:
    """Without the rows that repeat a prompt."""
    return values if route.distinct is None else values[route.distinct]


def _together(routes: Sequence[Route], place: tuple[str, str]) -> Gates:
    """One layer's choices in all passes."""
    chosen = [(route, route.gates[place]) for route in routes]
    weights = [_own(route, gates.weights) for route, gates in chosen if gates.weights is not None]
    use = [_own(route, gates.use) for route, gates in chosen if gates.use is not None]
    return Gates(torch.cat(weights) if weights else None, torch.cat(use) if use else None)


def _shares(media: Sequence[str], present: Tensor, found: Sequence[Gates]) -> dict[str, Ratio]:
    """Sums over prompts of the mean over layers; a prompt counts for the media that it has."""
    there = present.sum(0)  # (M,)
    metrics: dict[str, Ratio] = {}
    weights = [gates.weights.detach() for gates in found if gates.weights is not None]
    if weights:
        sums = torch.stack(weights).mean(0).sum(0)  # (1 + M,)
        metrics["experts/weight/text"] = (sums[0], len(present))
        for place, name in enumerate(media):
            metrics[f"experts/weight/{name}"] = (sums[1 + place], there[place])
    use = [gates.use.detach() for gates in found if gates.use is not None]
    if use:
        loads = torch.stack(use).mean(0).sum(0)  # (M, K)
        for place, name in enumerate(media):
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
