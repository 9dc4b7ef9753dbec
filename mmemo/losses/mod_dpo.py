"""MoD-DPO: invariance to the irrelevant modality, sensitivity to the relevant one. MoD-DPO++ adds
language-prior debiasing.

Shapes: B pairs, C tokens of the longest answer.

    m = tau * l(input) - beta * l_ref(input) - beta_inv * l(irrelevant) + beta_sens * l(negative)
    m = ... + gamma * l_text                           MoD-DPO++ only
    L = -log sigmoid(m)                                l = log p(chosen) - log p(rejected)
                                                       tau = beta + beta_inv - beta_sens

The margin follows from maximising E[r] - beta KL(pi || reference)
- beta_inv KL(pi || pi with the irrelevant modality replaced)
+ beta_sens KL(pi || pi with the relevant one replaced), and for MoD-DPO++ - gamma E[log pi_text],
where the two policies with a replaced modality and the text-only one have no gradient. The sign of
the text term is derived in :mod:`mmemo.losses.text_prior`.

The margin of an untrained policy is not 0 by design: it is
beta_inv [l(input) - l(irrelevant)] - beta_sens [l(input) - l(negative)], which is 0 only if
replacing a modality changes nothing. Joint questions have no irrelevant modality, so they are not
counted unless ``beta_inv`` is 0: the method does not apply to questions that need both modalities.
Nor is a pair that lacks one of the two replaced clips (``dpo.missing_negative`` can fill it in).
With two rejected answers (the paper has one) the loss is the mean of the two losses.

Source: MoD-DPO, arXiv 2603.03192 (CVPR 2026), known second-hand: a digest and an independent
reimplementation. The authors call the method with its language-prior debiasing MoD-DPO++.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    AnswerKey,
    Branch,
    ByAnswer,
    LogpRequest,
    PreferenceLogps,
    SigmoidTerm,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    sum_and_count,
    token_sum,
)
from mmemo.losses.text_prior import TextPriorTerm


class ModDpo(SigmoidTerm):
    """MoD-DPO with the published hyper-parameters."""

    kind: Literal["mod_dpo"] = "mod_dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    beta_inv: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Strength of the pull towards the policy that sees the irrelevant modality replaced. 0 skips
    the branch."""
    beta_sens: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Strength of the push away from the policy that sees the relevant modality replaced. 0 skips
    the branch."""

    @model_validator(mode="after")
    def _tau_is_positive(self) -> Self:
        if self.tau <= 0:
            raise ValueError(
                "beta + beta_inv - beta_sens must be above 0, or the chosen answer is unlearned; "
                "lower beta_sens"
            )
        return self

    @property
    def tau(self) -> float:
        """Weight of the policy's own log-probabilities in the margin."""
        return self.beta + self.beta_inv - self.beta_sens

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip, and after it with a modality replaced."""
        answers = self.answers()
        requests = [LogpRequest("input", answer) for answer in answers]
        for branch, _ in self._replaced():
            # In the derivation these are other policies, held constant; the reference is compared
            # only after the true clip.
            requests += [LogpRequest(branch, a, grad=False, reference=False) for a in answers]
        return tuple(requests)

    def _replaced(self) -> list[tuple[Branch, float]]:
        """The branches with a modality replaced that are used, and their weights in the margin."""
        branches: list[tuple[Branch, float]] = [
            ("irrelevant", -self.beta_inv),
            ("negative", self.beta_sens),
        ]
        return [(branch, weight) for branch, weight in branches if weight]

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        losses: list[Tensor] = []
        margins: list[Tensor] = []
        for answer, weight in weights.items():
            margin = self._margin(logps, answer)
            margins.append(weight * margin)
            losses.append(weight * self.margin_loss(margin))
        metrics["margin"] = sum_and_count(torch.stack(margins).sum(dim=0), counted)
        return TermLoss(torch.stack(losses).sum(dim=0), counted, metrics)

    def _margin(self, logps: PreferenceLogps, rejected: Answer) -> Tensor:
        """(B,) margin of the chosen answer over a rejected one."""
        return self._score(logps, "chosen") - self._score(logps, rejected)

    def _score(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) an answer's contribution to the margin, without a text prior."""
        key: AnswerKey = ("input", answer)
        policy, reference = logps.policy[key], logps.reference[key].detach()
        # The reference has beta and not tau: the other two divergences are between policies.
        total = token_sum(logps, key, self.tau * policy - self.beta * reference)
        for branch, weight in self._replaced():
            replaced: AnswerKey = (branch, answer)
            # Detached, since another term may have asked for a gradient of the same key.
            total = total + weight * token_sum(logps, replaced, logps.policy[replaced].detach())
        return total


class ModDpoPlusPlus(ModDpo, TextPriorTerm):
    """MoD-DPO++: MoD-DPO with language-prior debiasing, with the published hyper-parameters."""

    kind: Literal["mod_dpo_plus_plus"] = "mod_dpo_plus_plus"  # pyright: ignore[reportIncompatibleVariableOverride]
    gamma: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Strength of the text-prior discount, above 0: MoD-DPO is the method without it."""
    text_prior: Literal["policy", "reference"] = "reference"
    """Model whose text-only log-probabilities are the prior; the paper uses the reference's."""

    @model_validator(mode="after")
    def _has_a_text_term(self) -> Self:
        if self.gamma == 0:
            raise ValueError(
                "MoD-DPO++ with gamma 0 is MoD-DPO; give kind: mod_dpo and leave gamma out"
            )
        return self

    def needs(self) -> tuple[LogpRequest, ...]:
        """What MoD-DPO needs, and the answers after the text."""
        return (*super().needs(), *self.text_needs())

    def _margin(self, logps: PreferenceLogps, rejected: Answer) -> Tensor:
        gap = self.text_logp(logps, "chosen") - self.text_logp(logps, rejected)
        return super()._margin(logps, rejected) + self.text_shift(gap)


_TEXT_SETTINGS = frozenset(TextPriorTerm.model_fields) - frozenset(ModDpo.model_fields)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A term's values under today's names.

    ``mod_dpo`` had the text term until version 0.3, with a ``gamma`` of 0.05 unless it was given.
    Values that set anything about the text are read as MoD-DPO++, or with ``gamma: 0`` as MoD-DPO.
    """
    old = {**values}
    if old.get("kind") != "mod_dpo" or not _TEXT_SETTINGS & old.keys():
        return old
    if old.get("gamma", 0.05) == 0:
        return {key: value for key, value in old.items() if key not in _TEXT_SETTINGS}
    return {**old, "kind": "mod_dpo_plus_plus"}
