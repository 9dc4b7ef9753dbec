"""One step of preference optimisation: what the terms ask for, and their weighted sum.

B pairs, N answers scored in a pass, C tokens of the batch's longest answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.losses.objective import Answer, AnswerKey, BuiltTerm, Needed, PreferenceLogps
from mmemo.models.adapters.routing import Route, last_route
from mmemo.train import runtime
from mmemo.train.dataloader import Batch, OptimizerStep
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.batch import Pass
from mmemo.train.dpo.config import DpoLossConfig
from mmemo.train.engine import Engine
from mmemo.train.expert_balance import expert_terms
from mmemo.train.metrics import Ratio
from mmemo.train.reference import reference
from mmemo.train.trainer import Loss

_LOGGED: tuple[Answer, ...] = ("chosen", "spurious", "hallucinated")


class DpoObjective:
    """The weighted sum of the terms, each the mean over the pairs of the step that it counts.

    A pair that lacks a term's answer or branch changes nothing in that term. The means are over
    all micro-batches and ranks of a step, so that how it is split changes nothing.
    """

    boundary = 1

    def __init__(
        self,
        terms: Sequence[BuiltTerm],
        wanted: Sequence[Needed],
        section: DpoLossConfig,
        ranks: Ranks,
    ) -> None:
        self.terms, self.wanted, self.section, self.ranks = terms, wanted, section, ranks
        self._due = False

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return float(len(batch["sample_ids"]))

    def prepare(self, engine: Engine, item: OptimizerStep, step: int, total: int) -> OptimizerStep:
        """Tell each micro-batch how many pairs of the step each term counts."""
        every = self.section.grad_share_steps
        self._due = every is not None and (step + 1) % every == 0
        mine = [micro.batch for micro in item.micro_batches if not micro.padding]
        names = [term.name for term in self.terms]
        counts = [float(sum(batch["counted"][name] for batch in mine)) for name in names]
        pairs, *sums = self.ranks.sum([sum(map(self.weight, mine)), *counts])
        # The loop divides by all pairs.
        scale = {name: pairs / max(count, 1.0) for name, count in zip(names, sums, strict=True)}
        micro_batches = [
            replace(micro, batch={**micro.batch, "scale": scale, "due": self._due})
            for micro in item.micro_batches
        ]
        return replace(item, micro_batches=micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a step depends on nothing but its batch and the weights."""
        return {}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Nothing to go on with."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch; outside of training, means over its own pairs. In training,
        plus the penalties of the model's experts if it has some, on all prompts with gradient."""
        routes: list[Route] = []
        logps = self.logps(model, batch, routes)
        scale: Mapping[str, float] | None = batch.get("scale")
        pairs = self.weight(batch)
        parts: dict[str, Tensor] = {}
        metrics = _seen(logps)
        for name, weight, term in self.terms:
            out = term(logps)
            counted = out.counted.sum()
            metrics[f"{name}/loss"] = (out.rows.detach().sum(), counted)
            metrics[f"{name}/counted"] = (counted, pairs)
            metrics |= {f"{name}/{key}": value for key, value in out.metrics.items()}
            factor = pairs / counted.clamp(min=1) if scale is None else scale[name]
            if weight > 0:
                parts[name] = out.rows * (weight * factor)
        rows = torch.stack(list(parts.values())).sum(0)
        if not rows.requires_grad and torch.is_grad_enabled():
            # No pair here counts: the backward pass still reaches every weight, with zeros.
            learnt = [x.sum() for x in logps.policy.values() if x.requires_grad]
            rows = rows + 0.0 * torch.stack(learnt).sum()
        if batch.get("due"):
            metrics |= grad_shares(parts, (p for p in model.parameters() if p.requires_grad))
        experts = expert_terms(model, routes)
        if experts is None:
            return Loss(rows, metrics)
        # A pair counts 1 in the step's mean, which then has the penalty once.
        rows = rows + experts.penalty if model.training else rows
        return Loss(rows, metrics | experts.metrics)

    def logps(
        self, model: nn.Module, batch: Batch, routes: list[Route] | None = None
    ) -> PreferenceLogps:
        """All that the terms read, of the policy and of the reference. Adds to ``routes`` what the
        experts chose in the passes that are learnt from."""
        device = batch["attention_mask"].device
        size = (len(batch["sample_ids"]), next(iter(batch["mask"].values())).shape[1])
        policy = self._score(model, batch["passes"], size, device, routes)
        if "reference" in batch:
            known: dict[AnswerKey, Tensor] = batch["reference"]
        else:
            known = self.live_reference(model, batch, device) if batch["reference_passes"] else {}
        present: dict[AnswerKey, Tensor] = batch["present"]
        zeros = torch.zeros(size, device=device)
        mask: dict[Answer, Tensor] = batch["mask"]
        changed: dict[Answer, Tensor] = batch["changed"]
        return PreferenceLogps(
            policy={p.place: policy.get(p.place, zeros) for p in self.wanted if p.policy}
            | {place: x for place, x in policy.items() if x.requires_grad},
            reference={
                p.place: known.get(p.place, zeros).to(device) for p in self.wanted if p.reference
            },
            mask={answer: x.to(device) for answer, x in mask.items()},
            changed={answer: x.to(device) for answer, x in changed.items()},
            present={place: x.to(device) for place, x in present.items()},
        )

    @torch.no_grad()
    def reference_logps(self, model: nn.Module, batch: Batch) -> dict[AnswerKey, Tensor]:
        """(B, C) by place, of ``model`` as it is."""
        size = (len(batch["sample_ids"]), next(iter(batch["mask"].values())).shape[1])
        return self._score(model, batch["reference_passes"], size, batch["attention_mask"].device)

    def live_reference(
        self, model: nn.Module, batch: Batch, device: torch.device
    ) -> dict[AnswerKey, Tensor]:
        """(B, C) by place, of the model with its adapter switched off."""
        training = model.training
        model.eval()
        with reference(model):
            found = self.reference_logps(model, batch)
        model.train(training)
        return found

    def _score(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        size: tuple[int, int],
        device: torch.device,
        routes: list[Route] | None = None,
    ) -> dict[AnswerKey, Tensor]:
        way = packed_logps if self.section.shared_prefix else naive_logps
        found: dict[AnswerKey, Tensor] = {}
        for one in passes:
            with torch.set_grad_enabled(one.grad and torch.is_grad_enabled()):
                logps = way(
                    model,
                    runtime.to_device(one.prompts, device),
                    one.ids.to(device),
                    one.mask.to(device),
                    one.prompt_index.to(device),
                    temperature=self.section.temperature,
                ).logps
            if one.idle:
                continue
            found |= _by_place(one, logps, size)
            route = last_route(model)
            if routes is not None and route is not None and one.grad:
                routes.append(route)
        return found


def _by_place(one: Pass, logps: Tensor, size: tuple[int, int]) -> dict[AnswerKey, Tensor]:
    """The (N, C) log-probabilities of a pass as (B, C) for each of its places."""
    found: dict[AnswerKey, Tensor] = {}
    for place in dict.fromkeys(one.places):
        at = torch.tensor([i for i, p in enumerate(one.places) if p == place], device=logps.device)
        rows = one.rows.to(logps.device)[at]
        found[place] = logps.new_zeros(size).index_copy(0, rows, logps[at])
    return found


def _seen(logps: PreferenceLogps) -> dict[str, Ratio]:
    """Mean log-probability of each answer after the clip, as TRL logs it."""
    found: dict[str, Ratio] = {}
    for answer in _LOGGED:
        place: AnswerKey = ("input", answer)
        if place in logps.policy and place in logps.present:
            here = logps.present[place]
            sums = (logps.policy[place].detach() * logps.mask[answer]).sum(1)
            found[f"logps/{answer}"] = (sums.masked_fill(~here, 0.0).sum(), here.sum())
    return found


def grad_shares(
    parts: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Ratio]:
    """Each term's share of the gradients' norms, (norm, sum of norms). Leaves ``.grad`` alone."""
    learnt = list(parameters)
    norms: dict[str, Tensor] = {}
    for name, rows in parts.items():
        if not rows.requires_grad:
            norms[name] = rows.new_zeros(())
            continue
        found = torch.autograd.grad(rows.sum(), learnt, retain_graph=True, allow_unused=True)
        grads = cast("tuple[Tensor | None, ...]", found)
        squares = [g.float().square().sum() for g in grads if g is not None]
        norms[name] = torch.stack(squares).sum().sqrt() if squares else rows.new_zeros(())
    total = torch.stack(list(norms.values())).sum()
    return {f"{name}/grad_share": (norm.detach(), total.detach()) for name, norm in norms.items()}
