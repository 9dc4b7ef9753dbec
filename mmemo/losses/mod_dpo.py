"""MoD-DPO: invariant to the irrelevant modality, sensitive to the relevant one.

    m = tau * l(input) - beta * l_ref(input) - beta_inv * l(irrelevant) + beta_sens * l(negative)
        + gamma * l_text                               tau = beta + beta_inv - beta_sens
    L = -log sigmoid(m)                                l = log p(chosen) - log p(rejected)

B pairs. It is what follows from maximising E[r] - beta KL(pi || reference)
- beta_inv KL(pi || pi with the irrelevant modality replaced)
+ beta_sens KL(pi || pi with the relevant one replaced) - gamma E[log pi_text]; the two replaced
policies and the text are without gradient. The sign of the last is discussed in
:mod:`mmemo.losses.text_prior`.

The margin of an untrained policy is not 0 by design: it is
beta_inv [l(input) - l(irrelevant)] - beta_sens [l(input) - l(negative)], and 0 where replacing a
modality changes nothing. Joint questions have no irrelevant modality and are not counted unless
``beta_inv`` is 0: the method is not for questions that need both. With two rejected answers (the
paper has one) it is the mean of the two losses.

Source: MoD-DPO, arXiv 2603.03192 (CVPR 2026), known second-hand: a digest and an independent
reimplementation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    AnswerKey,
    Branch,
    ByAnswer,
    Needed,
    PreferenceLogps,
    TermLoss,
    log_ratio,
    over,
    preference_loss,
    rejected_weights,
    reward_metrics,
    token_sum,
)
from mmemo.losses.text_prior import TextPriorTerm


class ModDpo(TextPriorTerm):
    """MoD-DPO with the published hyper-parameters."""

    kind: Literal["mod_dpo"] = "mod_dpo"
    beta_inv: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Pull to the policy that sees the irrelevant modality replaced. 0 leaves the branch out."""
    beta_sens: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Push from the policy that sees the relevant modality replaced. 0 leaves the branch out."""
    gamma: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Strength of the discount of the text prior. 0 leaves it out, and the text branch with it."""
    text_prior: Literal["policy", "reference"] = "reference"
    """Whose text-only answer is the prior; the paper's is the reference's."""

    @model_validator(mode="after")
    def _tau_is_positive(self) -> ModDpo:
        if self.tau <= 0:
            raise ValueError(
                "beta + beta_inv - beta_sens must be above 0, or the chosen answer is unlearnt; "
                "lower beta_sens"
            )
        return self

    @property
    def tau(self) -> float:
        """What the policy's own log-probabilities weigh."""
        return self.beta + self.beta_inv - self.beta_sens

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip, with either modality replaced, and after the text."""
        found = [Needed("input", answer) for answer in self.answers()]
        for branch, _ in self._replaced():
            found += [Needed(branch, a, grad=False, reference=False) for a in self.answers()]
        return (*found, *self.text_needs())

    def _replaced(self) -> list[tuple[Branch, float]]:
        """The branches with a modality replaced, and what each weighs in the margin."""
        both: list[tuple[Branch, float]] = [
            ("irrelevant", -self.beta_inv),
            ("negative", self.beta_sens),
        ]
        return [one for one in both if one[1]]

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        score: ByAnswer = {a: self._score(logps, a) for a in self.answers()}
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        losses: list[Tensor] = []
        margins: list[Tensor] = []
        for answer, weight in weights.items():
            margin = score["chosen"] - score[answer]
            if self.gamma:
                gap = self.text_logp(logps, "chosen") - self.text_logp(logps, answer)
                margin = margin + self.text_shift(gap)
            margins.append(weight * margin)
            losses.append(weight * preference_loss(margin))
        metrics["margin"] = over(torch.stack(margins).sum(dim=0), counted)
        return TermLoss(torch.stack(losses).sum(dim=0), counted, metrics)

    def _score(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) what an answer brings to the margin, but for the text prior."""
        place: AnswerKey = ("input", answer)
        policy, reference = logps.policy[place], logps.reference[place].detach()
        total = token_sum(logps, place, self.tau * policy - self.beta * reference)
        for branch, factor in self._replaced():
            other: AnswerKey = (branch, answer)
            total = total + factor * token_sum(logps, other, logps.policy[other].detach())
        return total
