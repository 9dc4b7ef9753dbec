"""Conditional preference and the anchor: mDPO.

    L = -log sigmoid(beta * [rho(chosen | input) - rho(rejected | input)])
        - lambda_conditional * log sigmoid(beta * [rho(chosen | input) - rho(chosen | negative)])
        - lambda_anchor * log sigmoid(beta * rho(chosen | input) - delta)

B pairs. The second makes the answer depend on the clip; the third keeps the chosen answer's
reward from falling while the margin grows, which plain DPO allows. With two rejected answers the
first is the mean of the two losses.

Source: Wang et al., mDPO, arXiv 2406.11839, section 3. There the negative is a small crop of the
image; here it is the branch with the queried modality replaced.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    ByAnswer,
    Metrics,
    Needed,
    PreferenceLogps,
    PreferenceTerm,
    RejectingTerm,
    TermLoss,
    log_ratio,
    over,
    preference_loss,
    rejected_weights,
    reward_metrics,
    usable,
    weighted_loss,
)


def conditional(logps: PreferenceLogps, beta: float, counted: Tensor) -> tuple[Tensor, Metrics]:
    """(B,) loss that prefers the chosen answer's true clip over its negative, and metrics."""
    better = beta * log_ratio(logps, ("input", "chosen"))
    worse = beta * log_ratio(logps, ("negative", "chosen"))
    return preference_loss(better - worse), {
        "modality/rejected": over(worse, counted),
        "modality/margins": over(better - worse, counted),
        "modality/accuracies": over((better > worse).to(better.dtype), counted),
    }


class Anchor(PreferenceTerm):
    """The anchor alone, to stand beside any other term."""

    kind: Literal["anchor"] = "anchor"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference."""
    delta: float = Field(default=0.0, allow_inf_nan=False)
    """The reward that the chosen answer is to exceed, nats."""

    def needs(self) -> tuple[Needed, ...]:
        """The chosen answer after the clip."""
        return (Needed("input", "chosen"),)

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        counted = usable(logps, self.needs(), "chosen")
        reward = self.beta * log_ratio(logps, ("input", "chosen"))
        rows = preference_loss(reward - self.delta).masked_fill(~counted, 0.0)
        return TermLoss(rows, counted, {"rewards/chosen": over(reward, counted)})


class Mdpo(RejectingTerm):
    """mDPO: response preference, conditional preference and anchor."""

    kind: Literal["mdpo"] = "mdpo"
    lambda_conditional: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the conditional preference. 0 leaves it out, and its branch with it."""
    lambda_anchor: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the anchor."""
    delta: float = Field(default=0.0, allow_inf_nan=False)
    """The reward that the chosen answer is to exceed, nats."""

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip, and the chosen one after its negative."""
        answers = tuple(Needed("input", answer) for answer in self.answers())
        return answers + ((Needed("negative", "chosen"),) if self.lambda_conditional else ())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        rows = weighted_loss(rewards, weights)
        rows = rows + self.lambda_anchor * preference_loss(rewards["chosen"] - self.delta)
        if self.lambda_conditional:
            loss, more = conditional(logps, self.beta, counted)
            rows = rows + self.lambda_conditional * loss
            metrics |= more
        return TermLoss(rows.masked_fill(~counted, 0.0), counted, metrics)
