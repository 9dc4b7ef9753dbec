"""The balance penalties and metrics of a model's experts, computed after its forward passes.

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
    """The penalties on a model's experts, and what is logged of them.

    ``penalty``: () with gradient, already multiplied by its weights. ``metrics``: name -> (sum,
    count) over prompts: ``experts/weight/audio``, ``experts/load/audio/0`` and, where there is a
    penalty, its unweighted parts.
    """

    penalty: Tensor
    metrics: dict[str, Ratio]


def expert_terms(model: nn.Module, routes: Sequence[Route] | None = None) -> ExpertTerms | None:
    """The penalties and metrics of some forward passes, over all of their prompts together.

    A prompt that several rows repeat counts once.

    Args:
        routes: what the experts chose in the forward passes; None: in the model's last one.

    Returns:
        None for a model without experts, or with its experts disabled.

    Raises:
        ConfigError: the gradient of the penalty cannot reach the gates.
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
    """The values without those of rows that repeat a prompt."""
    return values if route.distinct is None else values[route.distinct]


def _together(routes: Sequence[Route], place: tuple[str, str]) -> Gates:
    """The choices of one layer in all passes."""
    chosen = [(route, route.gates[place]) for route in routes]
    weights = [_own(route, gates.weights) for route, gates in chosen if gates.weights is not None]
    use = [_own(route, gates.use) for route, gates in chosen if gates.use is not None]
    return Gates(torch.cat(weights) if weights else None, torch.cat(use) if use else None)


def _shares(media: Sequence[str], present: Tensor, found: Sequence[Gates]) -> dict[str, Ratio]:
    """Mean over layers, summed over prompts; a prompt counts for the modalities that it has."""
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
            "with reentrant gradient checkpointing, penalties on experts do not reach the gates; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
