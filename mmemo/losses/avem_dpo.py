"""AVEm-DPO: preference optimisation against spurious cues, hallucinated cues and the text prior.

Shapes: B pairs.

    L   = L_y + lambda_av * L_av
    L_y = -log sigmoid(beta * [rho(chosen) - beta_vr * rho(spurious) - beta_er * rho(hallucinated)]
                       + gamma * gap)                                     beta_vr + beta_er = 1
    L_av = -log sigmoid(beta * [rho(chosen | input) - rho(chosen | negative)])

L_y is the emotion response preference (ERP) with text-prior debiasing (TPD; its sign is derived in
:mod:`mmemo.losses.text_prior`). L_av is the prompt-based modality preference (PMP): it compares the
same answer after the clip and after the clip with the queried modality replaced. ``gap`` weighs the
rejected answers as rho does. If a pair has only one rejected answer, its weight is 1, unless
``single_rejected`` says otherwise. The reference is weighted exactly as the policy is, so the
margin starts at 0. A pair without a negative has no L_av: its loss is L_y, and it counts in the
mean (``dpo.missing_negative`` can fill it in).

Ablations: ``lambda_av: 0`` is -PMP, ``gamma: 0`` is -TPD, and ``rejected: first`` is -ERP, which
uses one rejected answer per pair (the spurious one if there is one).

The paper as printed: ``sign: minus``, ``text_average: false``, ``text_clamp: null``.

Source: AVEm-DPO, arXiv 2602.07054 (ICLR 2026), known second-hand; the authors' loss is not
released. Reconstructed here: how two rejected answers enter the gap, what replaces ERP in the
ablation, and that the text prior is the policy's (stopping the gradient is only meaningful there).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmemo.losses.base import (
    Answer,
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

SingleRejected = Literal["full_weight", "own_weight", "leave_out"]


class AvemDpo(TextPriorTerm):
    """AVEm-DPO with the published hyper-parameters."""

    kind: Literal["avem_dpo"] = "avem_dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    lambda_av: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the modality preference. 0 removes it and skips the negative branch."""
    beta_vr: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the spurious answer; the hallucinated answer's weight, beta_er, is 1 - beta_vr. To
    use only one of them, set ``rejected``."""
    single_rejected: SingleRejected = "full_weight"
    """With ``rejected: both``, a pair that has only one rejected answer: ``full_weight`` gives it
    the weight 1; ``own_weight`` leaves it its own, beta_vr or beta_er, as if the other had a rho
    and a gap of 0; ``leave_out`` does not count the pair. Every pair of the authors has two: their
    loader fails without ``rejected_2``."""

    @model_validator(mode="after")
    def _both_may_be_one(self) -> AvemDpo:
        if self.single_rejected != "full_weight" and self.rejected != "both":
            raise ValueError(
                f"single_rejected has no effect with rejected: {self.rejected}; leave it out"
            )
        return self

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
        if self.single_rejected == "leave_out":
            single = counted & _single(weights)
            kept: ByAnswer = {a: w.masked_fill(single, 0.0) for a, w in weights.items()}
            weights = kept
            counted = counted & ~single
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        # As published, the two rejected answers are mixed inside one sigmoid; the other methods
        # here take the mean of two losses.
        weights = self._own_weights(weights)
        mixed = torch.stack([w * rewards[a] for a, w in weights.items()]).sum(dim=0)
        margin = rewards["chosen"] - mixed
        # After the reward metrics, which keep the meaning that TRL gives them.
        if self.gamma:
            prior = [w * self.text_logp(logps, a) for a, w in weights.items()]
            gap = self.text_logp(logps, "chosen") - torch.stack(prior).sum(dim=0)
            margin = margin + self.text_shift(gap)
            metrics["text_prior/gap"] = sum_and_count(gap, counted)
        rows = self.margin_loss(margin)
        metrics["response/loss"] = sum_and_count(rows, counted)
        if self.lambda_av:
            loss, modality_metrics = conditional_preference(logps, self.beta, counted)
            metrics |= modality_metrics
            rows = rows + self.lambda_av * loss
        # The loss of a pair that is not counted is not 0 by itself: at margin 0 it is log 2.
        return TermLoss(rows.masked_fill(~counted, 0.0), counted, metrics)

    def _own_weights(self, weights: ByAnswer) -> ByAnswer:
        """The weights in the margin, of which those of a pair with one rejected answer may not
        add up to 1."""
        if self.single_rejected != "own_weight":
            return weights
        shares: dict[Answer, float] = {"spurious": self.beta_vr, "hallucinated": 1 - self.beta_vr}
        single = _single(weights)
        return {a: torch.where(single, w * shares[a], w) for a, w in weights.items()}


def _single(weights: ByAnswer) -> Tensor:
    """(B,) bool: pairs with exactly one rejected answer."""
    return torch.stack([w > 0 for w in weights.values()]).sum(dim=0) == 1
