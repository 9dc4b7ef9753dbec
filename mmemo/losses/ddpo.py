"""Dense DPO: tokens where the two answers differ weigh more than those they share.

    score(y) = sum over tokens of w * [log policy - log reference]    w = changed_weight or 1
    L = -log sigmoid(beta * [score(chosen) - score(rejected)])

B pairs, C tokens. The reference is weighted as the policy is. With two rejected answers it is the
mean of the two losses.

Sources: Yu et al., RLHF-V, arXiv 2312.00849, eq. 5 and 6, which also divide by the sum of the
weights (``average``); their released command has weight 1.1, beta 0.1 and does not divide: the
defaults here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    AnswerKey,
    ByAnswer,
    Needed,
    PreferenceLogps,
    RejectingTerm,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    token_sum,
    weighted_loss,
)


class Ddpo(RejectingTerm):
    """DPO with weighted tokens on the clip's own input."""

    kind: Literal["ddpo"] = "ddpo"
    changed_weight: float = Field(default=1.1, gt=0, allow_inf_nan=False)
    """Weight of a token in a changed span; the others' is 1."""
    average: bool = False
    """Divide by the sum of the weights. The margin then no longer grows with length, and wants a
    larger ``beta`` (0.5 in the paper, with weight 3)."""

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip."""
        return tuple(Needed("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * self._score(logps, a) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        return TermLoss(weighted_loss(rewards, weights), counted, metrics)

    def _score(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) weighted log-ratio."""
        place: AnswerKey = ("input", answer)
        weights = 1.0 + (self.changed_weight - 1.0) * logps.changed[answer].float()
        score = log_ratio(logps, place, weights)
        return score / token_sum(logps, place, weights).clamp(min=1.0) if self.average else score
