"""The loss of a preference step: computes what the terms ask for, and their weighted sum.

Shapes: B pairs, N answers scored in a forward pass, C tokens of the batch's longest answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.losses.objective import Answer, AnswerKey, BuiltTerm, LogpRequest, PreferenceLogps
from mmemo.models.adapters.routing import Route, last_route
from mmemo.train import runtime
from mmemo.train.dataloader import Batch, OptimizerStep
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.batch import ForwardPass
from mmemo.train.dpo.config import DpoLossConfig
from mmemo.train.engine import Engine
from mmemo.train.expert_balance import expert_terms
from mmemo.train.metrics import Ratio
from mmemo.train.reference import AdapterOff, ReferenceModel
from mmemo.train.router_balance import with_router_loss
from mmemo.train.trainer import Loss

_LOGGED: tuple[Answer, ...] = ("chosen", "spurious", "hallucinated")


class DpoObjective:
    """The weighted sum of the terms, each the mean over the step's pairs that it counts.

    A pair that lacks an answer or a branch of a term does not affect that term. The means are over
    all micro-batches and ranks of a step, so that the result does not depend on how it is split.
    """

    boundary = 1

    def __init__(
        self,
        terms: Sequence[BuiltTerm],
        requests: Sequence[LogpRequest],
        config: DpoLossConfig,
        ranks: Ranks,
        reference: ReferenceModel | None = None,
        *,
        max_logits: int | None = None,
        router_aux_loss_coef: float | None = None,
    ) -> None:
        """
        Args:
            reference: what computes the reference in every step; None: the policy with its adapter
                disabled.
            max_logits, router_aux_loss_coef: as in ``train``.
        """
        self.terms, self.requests, self.config, self.ranks = terms, requests, config, ranks
        self.reference = reference or AdapterOff()
        self.max_logits, self.router_aux_loss_coef = max_logits, router_aux_loss_coef
        self._log_shares = False

    def weight(self, batch: Batch) -> float:
        """The number of pairs."""
        return float(len(batch["sample_ids"]))

    def prepare(self, engine: Engine, item: OptimizerStep, step: int, total: int) -> OptimizerStep:
        """Give each micro-batch the number of pairs of the whole step that each term counts."""
        every = self.config.grad_share_steps
        self._log_shares = every is not None and (step + 1) % every == 0
        mine = [micro.batch for micro in item.micro_batches if not micro.padding]
        names = [term.name for term in self.terms]
        counts = [float(sum(batch["counted"][name] for batch in mine)) for name in names]
        pairs, *sums = self.ranks.sum([sum(map(self.weight, mine)), *counts])
        # The trainer divides the step's loss by its number of pairs; a term's mean is over fewer.
        scale = {name: pairs / max(count, 1.0) for name, count in zip(names, sums, strict=True)}
        micro_batches = [
            replace(micro, batch={**micro.batch, "scale": scale, "log_shares": self._log_shares})
            for micro in item.micro_batches
        ]
        return replace(item, micro_batches=micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a step depends only on its batch and the weights."""
        return {}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """There is nothing to restore."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch.

        In evaluation, the terms are means over the micro-batch's own pairs. In training, the load
        penalties of the model's experts, if it has any, are added for all prompts with gradient.
        """
        weight, coefficient = self.weight(batch), self.router_aux_loss_coef
        return with_router_loss(self._loss, model, batch, weight, coefficient, learning_only=True)

    def _loss(self, model: nn.Module, batch: Batch) -> Loss:
        routes: list[Route] = []
        logps = self.logps(model, batch, routes)
        scale: Mapping[str, float] | None = batch.get("scale")
        pairs = self.weight(batch)
        parts: dict[str, Tensor] = {}
        metrics = _mean_logps(logps)
        for name, weight, term in self.terms:
            out = term(logps)
            counted = out.counted.sum()
            metrics[f"{name}/loss"] = (out.rows.detach().sum(), counted)
            metrics[f"{name}/counted"] = (counted, pairs)
            metrics |= {f"{name}/{key}": value for key, value in out.metrics.items()}
            factor = pairs / counted.clamp(min=1) if scale is None else scale[name]
            # Left out, not multiplied by 0: a term that only observes may be NaN, and so then would
            # be the sum.
            if weight > 0:
                parts[name] = out.rows * (weight * factor)
        rows = torch.stack(list(parts.values())).sum(0)  # (B,)
        if not rows.requires_grad and torch.is_grad_enabled():
            # No term counts a pair of this batch, but sharded weights need a backward pass on every
            # rank: it gets zeros.
            with_grad = [x.sum() for x in logps.policy.values() if x.requires_grad]
            rows = rows + 0.0 * torch.stack(with_grad).sum()
        if batch.get("log_shares"):
            metrics |= grad_shares(parts, (p for p in model.parameters() if p.requires_grad))
        experts = expert_terms(model, routes, weight=pairs)
        if experts is None:
            return Loss(rows, metrics)
        rows = rows + experts.penalty / pairs if model.training else rows
        return Loss(rows, metrics | experts.metrics)

    def logps(
        self, model: nn.Module, batch: Batch, routes: list[Route] | None = None
    ) -> PreferenceLogps:
        """The log-probabilities that the terms read, of the policy and of the reference.

        Args:
            routes: the experts' choices in the forward passes with gradient are appended to it.
        """
        device = batch["attention_mask"].device
        size = (len(batch["sample_ids"]), next(iter(batch["mask"].values())).shape[1])
        # Before the policy, whose activations then need no room beside a copy of the weights.
        if "reference" in batch:
            stored: dict[AnswerKey, Tensor] = batch["reference"]
        else:
            stored = self.live_reference(model, batch) if batch["reference_passes"] else {}
        policy = self._score(model, batch["passes"], size, device, routes)
        present: dict[AnswerKey, Tensor] = batch["present"]
        zeros = torch.zeros(size, device=device)
        mask: dict[Answer, Tensor] = batch["mask"]
        changed: dict[Answer, Tensor] = batch["changed"]
        return PreferenceLogps(
            # An answer that was added to give a batch a gradient is read by no term, but kept for
            # that gradient.
            policy={p.key: policy.get(p.key, zeros) for p in self.requests if p.policy}
            | {key: x for key, x in policy.items() if x.requires_grad},
            reference={
                p.key: stored.get(p.key, zeros).to(device) for p in self.requests if p.reference
            },
            mask={answer: x.to(device) for answer, x in mask.items()},
            changed={answer: x.to(device) for answer, x in changed.items()},
            present={key: x.to(device) for key, x in present.items()},
            swapped=batch["swapped"].to(device) if "swapped" in batch else None,
        )

    @torch.no_grad()
    def reference_logps(self, model: nn.Module, batch: Batch) -> dict[AnswerKey, Tensor]:
        """(B, C) log-probabilities under ``model`` as it is, by (branch, answer) key."""
        size = (len(batch["sample_ids"]), next(iter(batch["mask"].values())).shape[1])
        return self._score(model, batch["reference_passes"], size, batch["attention_mask"].device)

    def live_reference(self, model: nn.Module, batch: Batch) -> dict[AnswerKey, Tensor]:
        """(B, C) log-probabilities under the reference of ``model``, by (branch, answer) key."""
        with self.reference.of(model) as start:
            return self.reference_logps(start, batch)

    def _score(
        self,
        model: nn.Module,
        passes: Sequence[ForwardPass],
        size: tuple[int, int],
        device: torch.device,
        routes: list[Route] | None = None,
    ) -> dict[AnswerKey, Tensor]:
        compute = packed_logps if self.config.shared_prefix else naive_logps
        found: dict[AnswerKey, Tensor] = {}
        for one in passes:
            with torch.set_grad_enabled(one.grad and torch.is_grad_enabled()):
                logps = compute(
                    model,
                    runtime.to_device(one.prompts, device),
                    one.ids.to(device, non_blocking=True),
                    one.mask.to(device, non_blocking=True),
                    one.prompt_index.to(device, non_blocking=True),
                    temperature=self.config.temperature,
                    max_logits=self.max_logits,
                ).logps
            if one.idle:
                continue
            found |= _by_key(one, logps, size)
            route = last_route(model)
            if routes is not None and route is not None and one.grad:
                routes.append(route)
        return found


def _by_key(one: ForwardPass, logps: Tensor, size: tuple[int, int]) -> dict[AnswerKey, Tensor]:
    """The log-probabilities (N, C) of a forward pass as (B, C) for each of its keys."""
    found: dict[AnswerKey, Tensor] = {}
    for key in dict.fromkeys(one.keys):
        # The places of this key's answers among the N; a pair has at most one.
        at = torch.tensor([i for i, k in enumerate(one.keys) if k == key], device=logps.device)
        rows = one.rows.to(logps.device)[at]
        found[key] = logps.new_zeros(size).index_copy(0, rows, logps[at])
    return found


def _mean_logps(logps: PreferenceLogps) -> dict[str, Ratio]:
    """The mean log-probability of each answer after the clip, under TRL's names."""
    found: dict[str, Ratio] = {}
    for answer in _LOGGED:
        key: AnswerKey = ("input", answer)
        if key in logps.policy and key in logps.present:
            here = logps.present[key]
            sums = (logps.policy[key].detach() * logps.mask[answer]).sum(1)
            found[f"logps/{answer}"] = (sums.masked_fill(~here, 0.0).sum(), here.sum())
    return found


def grad_shares(
    parts: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Ratio]:
    """Each term's share of the gradient norm, as (norm, sum of norms). ``.grad`` is not touched."""
    trainable = list(parameters)
    norms: dict[str, Tensor] = {}
    for name, rows in parts.items():
        if not rows.requires_grad:
            norms[name] = rows.new_zeros(())
            continue
        # The graph is kept for the other terms and for the backward pass of the step itself.
        found = torch.autograd.grad(rows.sum(), trainable, retain_graph=True, allow_unused=True)
        grads = cast("tuple[Tensor | None, ...]", found)
        squares = [g.float().square().sum() for g in grads if g is not None]
        norms[name] = torch.stack(squares).sum().sqrt() if squares else rows.new_zeros(())
    total = torch.stack(list(norms.values())).sum()
    return {f"{name}/grad_share": (norm.detach(), total.detach()) for name, norm in norms.items()}
