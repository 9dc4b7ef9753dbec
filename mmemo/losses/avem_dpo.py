"""AVEm-DPO: against spurious cues, hallucinated cues and the text prior.

    L   = L_y + lambda_av * L_av
    L_y = -log sigmoid(beta * [rho(chosen) - beta_vr * rho(spurious) - beta_er * rho(hallucinated)]
                       + gamma * gap)                                     beta_vr + beta_er = 1
    L_av = -log sigmoid(beta * [rho(chosen | input) - rho(chosen | negative)])

B pairs. L_y is the emotion response preference (ERP) with text-prior debiasing
(:mod:`mmemo.losses.text_prior`, where its sign is discussed), L_av the prompt-based modality
preference (PMP): the same answer after the clip, and after the clip with the queried modality
replaced. ``gap`` weighs the rejected answers as rho does. Where a pair has only one rejected
answer, its weight is 1. The reference is weighted exactly as the policy, so the margin starts at 0.

Ablations: ``lambda_av: 0`` is -PMP; ``gamma: 0`` is -TPD; ``rejected: first`` is -ERP, one
rejected answer a pair: the spurious one where there is one.

Source: AVEm-DPO, arXiv 2602.07054 (ICLR 2026), known second-hand; the authors' loss is not
released. Reconstructed: how two rejected answers enter the gap; what replaces ERP in the ablation;
whose text prior it is (a stopped gradient only means something for the policy's).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mmemo.losses.base import (
    ByAnswer,
    Needed,
    PreferenceLogps,
    TermLoss,
    log_ratio,
    over,
    preference_loss,
    rejected_weights,
    reward_metrics,
)
from mmemo.losses.mdpo import conditional
from mmemo.losses.text_prior import TextPriorTerm


class AvemDpo(TextPriorTerm):
    """AVEm-DPO with the published hyper-parameters."""

    kind: Literal["avem_dpo"] = "avem_dpo"
    lambda_av: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the modality preference. 0 leaves it out, and its branch with it."""
    beta_vr: float = Field(default=0.5, gt=0, lt=1)
    """Share of the spurious answer; the hallucinated one's, beta_er, is the rest. For all of one,
    set ``rejected``."""

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip and the text, and the chosen one after its negative."""
        answers = tuple(Needed("input", answer) for answer in self.answers())
        negative = (Needed("negative", "chosen"),) if self.lambda_av else ()
        return answers + negative + self.text_needs()

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        shares = (self.beta_vr, 1 - self.beta_vr)
        weights, counted = rejected_weights(logps, self.needs(), self.rejected, shares)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        mixed = torch.stack([w * rewards[a] for a, w in weights.items()]).sum(dim=0)
        margin = rewards["chosen"] - mixed
        if self.gamma:
            prior = [w * self.text_logp(logps, a) for a, w in weights.items()]
            gap = self.text_logp(logps, "chosen") - torch.stack(prior).sum(dim=0)
            margin = margin + self.text_shift(gap)
            metrics["text_prior/gap"] = over(gap, counted)
        rows = preference_loss(margin)
        metrics["response/loss"] = over(rows, counted)
        if self.lambda_av:
            loss, more = conditional(logps, self.beta, counted)
            metrics |= {**more, "modality/loss": over(loss, counted)}
            rows = rows + self.lambda_av * loss
        return TermLoss(rows.masked_fill(~counted, 0.0), counted, metrics)
