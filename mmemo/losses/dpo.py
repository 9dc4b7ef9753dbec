"""Direct preference optimisation.

    L = -log sigmoid(beta * [rho(chosen) - rho(rejected)])

B pairs. With two rejected answers it is the mean of the two losses: what two rows with the same
chosen answer would give.

Sources: Rafailov et al., arXiv 2305.18290, eq. 7; TRL 1.16, ``loss_type="sigmoid"``, which it
equals (``tests/losses/test_trl_equal.py``).
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    ByAnswer,
    Needed,
    PreferenceLogps,
    RejectingTerm,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    weighted_loss,
)


class Dpo(RejectingTerm):
    """Plain DPO on the clip's own input."""

    kind: Literal["dpo"] = "dpo"

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip."""
        return tuple(Needed("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        return TermLoss(weighted_loss(rewards, weights), counted, metrics)
