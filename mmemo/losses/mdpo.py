"""mDPO: response preference, conditional preference and an anchor on the chosen reward.

Shapes: B pairs.

    L = -log sigmoid(beta * [rho(chosen | input) - rho(rejected | input)])
        - lambda_conditional * log sigmoid(beta * [rho(chosen | input) - rho(chosen | negative)])
        - lambda_anchor * log sigmoid(beta * rho(chosen | input) - delta)

The second term makes the answer depend on the clip. The third keeps the chosen answer's reward from
falling while the margin grows, which plain DPO allows. With two rejected answers the first term is
the mean of the two losses. A pair without a negative lacks the second term alone: its loss is the
sum of the other two, and it counts in the mean.

Source: Wang et al., mDPO, arXiv 2406.11839, section 3. There the negative is a small crop of the
image; here it is the clip with the queried modality replaced.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    ByAnswer,
    LogpRequest,
    Metrics,
    PreferenceLogps,
    PreferenceTerm,
    SigmoidTerm,
    TermLoss,
    log_ratio,
    preference_loss,
    rejected_weights,
    reward_metrics,
    sum_and_count,
    usable,
    weighted_loss,
)


def conditional_preference(
    logps: PreferenceLogps, beta: float, counted: Tensor
) -> tuple[Tensor, Metrics]:
    """The loss of preferring the true clip over its negative, for the chosen answer.

    Args:
        counted: (B,) bool, the pairs that the term counts. Those without a negative have no such
            preference.

    Returns:
        (B,) losses, 0 for pairs that are not counted or have no negative; and metrics over the
        pairs that have one, ``modality/counted`` being their share of the counted pairs.
    """
    true = beta * log_ratio(logps, ("input", "chosen"))
    negative = beta * log_ratio(logps, ("negative", "chosen"))
    here = counted & logps.present["negative", "chosen"]
    # Without a negative the loss would be that of the chosen reward alone, not 0.
    loss = preference_loss(true - negative).masked_fill(~here, 0.0)
    return loss, {
        "modality/counted": sum_and_count(here.to(true.dtype), counted),
        "modality/loss": sum_and_count(loss, here),
        "modality/rejected": sum_and_count(negative, here),
        "modality/margins": sum_and_count(true - negative, here),
        "modality/accuracies": sum_and_count((true > negative).to(true.dtype), here),
    }


class Anchor(PreferenceTerm):
    """The anchor alone, to be combined with any other term."""

    kind: Literal["anchor"] = "anchor"  # pyright: ignore[reportIncompatibleVariableOverride]
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the regularisation towards the reference model."""
    delta: float = Field(default=0.0, allow_inf_nan=False)
    """Reward that the chosen answer should exceed, in nats."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The chosen answer after the clip."""
        return (LogpRequest("input", "chosen"),)

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        counted = usable(logps, self.needs(), "chosen")
        reward = self.beta * log_ratio(logps, ("input", "chosen"))
        rows = preference_loss(reward - self.delta).masked_fill(~counted, 0.0)
        return TermLoss(rows, counted, {"rewards/chosen": sum_and_count(reward, counted)})


class Mdpo(SigmoidTerm):
    """mDPO: response preference, conditional preference and anchor."""

    kind: Literal["mdpo"] = "mdpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    lambda_conditional: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the conditional preference. 0 removes it and skips the negative branch."""
    lambda_anchor: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the anchor."""
    delta: float = Field(default=0.0, allow_inf_nan=False)
    """Reward that the chosen answer should exceed, in nats."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip, and the chosen one after the negative."""
        answers = tuple(LogpRequest("input", answer) for answer in self.answers())
        return answers + ((LogpRequest("negative", "chosen"),) if self.lambda_conditional else ())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        response = [one for one in self.needs() if one.branch == "input"]
        weights, counted = rejected_weights(logps, response, self.rejected)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        rows = weighted_loss(rewards, weights, self.margin_loss)
        rows = rows + self.lambda_anchor * preference_loss(rewards["chosen"] - self.delta)
        if self.lambda_conditional:
            loss, modality_metrics = conditional_preference(logps, self.beta, counted)
            rows = rows + self.lambda_conditional * loss
            metrics |= modality_metrics
        # The anchor of a pair that is not counted would not be 0: at reward 0 it is log 2.
        return TermLoss(rows.masked_fill(~counted, 0.0), counted, metrics)
