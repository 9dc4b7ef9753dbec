"""The balance penalties and metrics of a model's experts.

The penalties are functions P(m) of means m over prompts (:mod:`mmemo.losses.expert_balance`). In
training, m is a running mean over the prompts of the optimizer steps so far, of all micro-batches
and ranks. Within a step it is constant, and prompt i of the step's N has the gradient

    dP/dm (running m) . dw_i / N

where w_i are its gates. It is linear in what a micro-batch adds, so that eight micro-batches of one
prompt have the gradient of one of eight, on any number of ranks; and one prompt may use one expert
alone, as long as the others of the last steps do not. The running mean lags the weights by about
1 / (1 - decay) steps, and the first step, before which there is none, has no penalty.

The exact mean of the running step is known only at its end. To have it, one would compute every
forward pass twice, or keep the graphs of all micro-batches; a running mean costs one sum of a few
numbers a layer over the ranks in each step. Balancing over more than the micro-batch follows Qiu et
al., 2025, arXiv 2501.11873, who also buffer the load over accumulation steps.

Shapes: Y layers, N prompts, M media, K experts of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.errors import CheckpointError, ConfigError
from mmemo.losses.expert_balance import (
    equal_weights,
    load_variation,
    mean_load_variation,
    mean_weight_divergence,
    weight_divergence,
)
from mmemo.models.adapters.expert_layers import ExpertsLinear
from mmemo.models.adapters.routing import Gates, Route, find_router
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks
from mmemo.train.metrics import Ratio


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """The penalties on a model's experts, and what is logged of them.

    ``penalty``: () with gradient, already multiplied by its weights, to be added once to the sum of
    the micro-batch's losses; it is then in the step's mean once. ``metrics``: name -> (sum, count)
    over prompts: ``experts/weight/audio``, ``experts/load/audio/0`` and, where the penalty is the
    micro-batch's own, its unweighted parts.
    """

    penalty: Tensor
    metrics: dict[str, Ratio]


class ExpertBalance:
    """The running mean that the penalties of a model's experts hold, over optimizer steps.

    Call :meth:`begin` before the first micro-batch of a step and :meth:`finish` after the update;
    between them, :func:`expert_terms` computes the penalties from the running mean, and each
    micro-batch is followed by :meth:`keep`.
    """

    def __init__(self, layers: int, media: int, config: Any) -> None:
        """
        Args:
            layers: Y.
            media: M.
            config: the :class:`~mmemo.models.adapters.expert_layers.ExpertsConfig`.
        """
        self.config, self.decay = config, float(config.penalty_decay)
        self.shapes = ((), (1 + media,), (media,), (layers, 1 + media))
        self.shapes = (*self.shapes, (layers, media, int(config.per_modality)))
        self._sizes = [torch.Size(shape).numel() for shape in self.shapes]
        # Decayed sums over prompts: their number, equal weights, present media, weights, use.
        self._running = torch.zeros(sum(self._sizes), dtype=torch.float64)
        self._step = self._micro = None
        self._scale, self._value = 0.0, 0.0
        self._slopes: tuple[Tensor, Tensor] | None = None

    @property
    def running(self) -> bool:
        """Whether a step is between :meth:`begin` and :meth:`finish`."""
        return self._step is not None

    def begin(self, weight: float, prompts: float) -> None:
        """Start a step.

        Args:
            weight: the sum of the weights of all of its micro-batches, over all ranks.
            prompts: the sum of their :func:`count_prompts`.
        """
        self._step, self._micro = torch.zeros_like(self._running), None
        self._scale, self._slopes = weight / max(prompts, 1.0), None
        if self._running[0] > 0:
            weights, use = (mean.requires_grad_() for mean in self._means()[2:])
            value = self._penalty(weights, use)
            self._value = float(value.detach())
            slopes = torch.autograd.grad(value, (weights, use))
            self._slopes = (slopes[0], slopes[1])

    def penalty(self, weights: Tensor, use: Tensor, present: Tensor) -> Tensor:
        """() what a micro-batch adds to the sum of its losses. Over the step, the values add up to
        the penalty of the running mean, and the gradients to that of the module's text.

        Args:
            weights: (Y, N, 1 + M).
            use: (Y, N, M, K).
            present: (N, M) bool.
        """
        mine = (weights.sum(1), use.sum(1))
        number = weights.new_tensor(len(present))
        sums = (number, equal_weights(present).sum(0), present.sum(0), *mine)
        self._micro = torch.cat([one.detach().double().flatten() for one in sums])
        if self._slopes is None:
            return torch.zeros((), device=weights.device)
        pulls = [(slope.to(one) * one).sum() for slope, one in zip(self._slopes, mine, strict=True)]
        pull = pulls[0] + pulls[1]
        return (self._value * len(present) + pull - pull.detach()) * self._scale

    def keep(self, counted: bool = True) -> None:
        """Add the micro-batch that has just been computed to the step, unless it is padding."""
        if self._micro is not None and self._step is not None and counted:
            self._step = self._step.to(self._micro.device) + self._micro
        self._micro = None

    def finish(self, applied: bool, ranks: Ranks | None = None) -> dict[str, Ratio]:
        """End a step: the running mean takes it in, unless its update was not ``applied``.

        Returns:
            The unweighted parts of the penalty at the new running mean, for the log.
        """
        step, self._step = self._step, None
        if step is None or not applied:
            return {}
        values = step.tolist()
        total = torch.tensor(values if ranks is None else ranks.sum(values), dtype=torch.float64)
        if total[0] > 0:
            self._running = self.decay * self._running + total
        if not self._running[0] > 0:
            return {}
        equal, present, weights, use = self._means()
        return {
            "experts/weight_divergence": (mean_weight_divergence(weights, equal), 1),
            "experts/load_variation": (mean_load_variation(use, present), 1),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the checkpoint."""
        return {"sums": self._running.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; an empty one is the start of a run.

        Raises:
            CheckpointError: it is of another model.
        """
        sums = state.get("sums", [0.0] * len(self._running))
        if len(sums) != len(self._running):
            raise CheckpointError(
                f"the checkpoint has a running mean of {len(sums)} values of the experts' gates, "
                f"this model one of {len(self._running)}; resume with the model of the checkpoint"
            )
        self._running = torch.tensor(sums, dtype=torch.float64)

    def _means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Equal weights (1 + M,), shares of prompts with a medium (M,), weights (Y, 1 + M) and use
        (Y, M, K)."""
        _, *sums = self._running.split(self._sizes)
        pairs = zip(sums, self.shapes[1:], strict=True)
        equal, present, weights, use = (one.view(shape) / self._running[0] for one, shape in pairs)
        return equal, present, weights, use

    def _penalty(self, weights: Tensor, use: Tensor) -> Tensor:
        equal, present, *_ = self._means()
        return self.config.weight_penalty * mean_weight_divergence(
            weights, equal
        ) + self.config.load_penalty * mean_load_variation(use, present)


def balance_of(model: nn.Module) -> ExpertBalance | None:
    """The model's balance over optimizer steps, made at the first call.

    Returns:
        None for a model without experts, for a variant without penalties, and where each
        micro-batch is penalised on its own (``penalty_decay: null``).
    """
    router = find_router(model)
    if router is None or not router.settings:
        return None
    config: Any = next(iter(router.settings.values()))
    if config.variant != "mose" or config.penalty_decay is None:
        return None
    if router.balance is None:
        layers = sum(isinstance(module, ExpertsLinear) for module in model.modules())
        router.balance = ExpertBalance(layers, len(router.media), config)
    return router.balance


def count_prompts(batch: Batch) -> int:
    """The number of prompts in the forward passes of a micro-batch that have a gradient."""
    if "passes" not in batch:  # only preference pairs are scored in several passes
        return len(batch["input_ids"])
    return sum(
        len(one.prompts["input_ids"]) for one in batch["passes"] if one.grad and not one.idle
    )


def expert_terms(
    model: nn.Module, routes: Sequence[Route] | None = None, *, weight: float = 1.0
) -> ExpertTerms | None:
    """The penalties and metrics of a micro-batch's forward passes, over all of their prompts.

    A prompt that several rows repeat counts once. Outside of the steps of an
    :class:`ExpertBalance`, the penalty is of the mean over these prompts alone.

    Args:
        routes: what the experts chose in the forward passes; None: in the model's last one.
        weight: the micro-batch's weight in the step's loss, by which its own mean's penalty is
            multiplied.

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
    balance: ExpertBalance | None = router.balance
    if balance is not None and balance.running and model.training:
        return ExpertTerms(balance.penalty(weights, use, present), metrics)
    divergence = weight_divergence(weights, present)
    variation = load_variation(use, present)
    metrics["experts/weight_divergence"] = (divergence.detach(), 1)
    metrics["experts/load_variation"] = (variation.detach(), 1)
    own = config.weight_penalty * divergence + config.load_penalty * variation
    return ExpertTerms(own * weight, metrics)


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
