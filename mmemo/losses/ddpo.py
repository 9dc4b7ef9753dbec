"""Dense DPO: tokens on which the two answers differ weigh more than tokens they share.

Shapes: B pairs, C tokens of the longest answer.

    score(y) = sum over tokens of w * [log policy - log reference]    w = changed_weight or 1
    L = -log sigmoid(beta * [score(chosen) - score(rejected)])

The reference is weighted as the policy is. With two rejected answers the loss is the mean of the
two losses.

Source: Yu et al., RLHF-V, arXiv 2312.00849, eq. 5 and 6. The paper also divides by the sum of the
weights (``average``); the released training command uses weight 1.1 and beta 0.1 and does not
divide, and these are the defaults here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    AnswerKey,
    ByAnswer,
    LogpRequest,
    PreferenceLogps,
    SigmoidTerm,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    token_sum,
    weighted_loss,
)


class Ddpo(SigmoidTerm):
    """DPO with weighted tokens on the clip's own input."""

    kind: Literal["ddpo"] = "ddpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    changed_weight: float = Field(default=1.1, gt=0, allow_inf_nan=False)
    """Weight of a token in a changed span; all other tokens weigh 1."""
    average: bool = False
    """Divide each score by the sum of its token weights. The margin then does not grow with the
    answer's length and needs a larger ``beta`` (the paper uses 0.5, with weight 3)."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip."""
        return tuple(LogpRequest("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * self._score(logps, a) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        return TermLoss(weighted_loss(rewards, weights, self.margin_loss), counted, metrics)

    def _score(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) log-ratio with weighted tokens."""
        key: AnswerKey = ("input", answer)
        weights = 1.0 + (self.changed_weight - 1.0) * logps.changed[answer].float()
        score = log_ratio(logps, key, weights)
        # A pair that lacks the answer has a sum of weights of 0.
        return score / token_sum(logps, key, weights).clamp(min=1.0) if self.average else score
