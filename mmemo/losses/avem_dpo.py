"""AVEm-DPO: preference optimisation against spurious cues, hallucinated cues and the text prior.

Shapes: B pairs.

    L   = L_y + lambda_av * L_av
    L_y = -log sigmoid(beta * [rho(chosen) - beta_vr * rho(spurious) - beta_er * rho(hallucinated)]
                       + gamma * gap)                                     beta_vr + beta_er = 1
    L_av = -log sigmoid(beta * [rho(chosen | input) - rho(chosen | negative)])

L_y is the emotion response preference (ERP) with text-prior debiasing (TPD; its sign is derived in
:mod:`mmemo.losses.text_prior`). L_av is the prompt-based modality preference (PMP): it compares the
same answer after the clip and after the clip with the queried modality replaced. ``gap`` weighs the
rejected answers as rho does. If a pair has only one rejected answer, that answer's weight is 1. The
reference is weighted exactly as the policy is, so the margin starts at 0. A pair without a negative
has no L_av: its loss is L_y, and it counts in the mean (``dpo.missing_negative`` can fill it in).

Ablations: ``lambda_av: 0`` is -PMP, ``gamma: 0`` is -TPD, and ``rejected: first`` is -ERP, which
uses one rejected answer per pair (the spurious one if there is one).

Source: AVEm-DPO, arXiv 2602.07054 (ICLR 2026), known second-hand; the authors' loss is not
released. Reconstructed here: how two rejected answers enter the gap, what replaces ERP in the
ablation, and that the text prior is the policy's (stopping the gradient is only meaningful there).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mmemo.losses.base import (
    ByAnswer,
    LogpRequest,
    PreferenceLogps,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    sum_and_count,
)
from mmemo.losses.mdpo import conditional_preference
from mmemo.losses.text_prior import TextPriorTerm


class AvemDpo(TextPriorTerm):
    """AVEm-DPO with the published hyper-parameters."""

    kind: Literal["avem_dpo"] = "avem_dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    lambda_av: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the modality preference. 0 removes it and skips the negative branch."""
    beta_vr: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the spurious answer; the hallucinated answer's weight, beta_er, is 1 - beta_vr. To
    use only one of them, set ``rejected``."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip and after the text, and the chosen one after the negative."""
        answers = tuple(LogpRequest("input", answer) for answer in self.answers())
        negative = (LogpRequest("negative", "chosen"),) if self.lambda_av else ()
        return answers + negative + self.text_needs()

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        shares = (self.beta_vr, 1 - self.beta_vr)
        response = [one for one in self.needs() if one.branch != "negative"]
        weights, counted = rejected_weights(logps, response, self.rejected, shares)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        # As published, the two rejected answers are mixed inside one sigmoid; the other methods
        # here take the mean of two losses.
        mixed = torch.stack([w * rewards[a] for a, w in weights.items()]).sum(dim=0)
        margin = rewards["chosen"] - mixed
        # After the reward metrics, which keep the meaning that TRL gives them.
        if self.gamma:
            prior = [w * self.text_logp(logps, a) for a, w in weights.items()]
            gap = self.text_logp(logps, "chosen") - torch.stack(prior).sum(dim=0)
            margin = margin + self.text_shift(gap)
            metrics["text_prior/gap"] = sum_and_count(gap, counted)
        rows = self.margin_loss(margin, logps.swapped)
        metrics["response/loss"] = sum_and_count(rows, counted)
        if self.lambda_av:
            loss, modality_metrics = conditional_preference(logps, self.beta, counted)
            metrics |= modality_metrics
            rows = rows + self.lambda_av * loss
        # The loss of a pair that is not counted is not 0 by itself: at margin 0 it is log 2.
        return TermLoss(rows.masked_fill(~counted, 0.0), counted, metrics)
