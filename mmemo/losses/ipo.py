"""Identity preference optimisation: the margin is drawn to a fixed size, not driven without end.

    L = (rho(chosen) - rho(rejected) - 1 / (2 beta))^2

B pairs. With two rejected answers it is the mean of the two losses.

Sources: Azar et al., arXiv 2310.12036, eq. 17; TRL 1.16, ``loss_type="ipo"``, which divides each
rho by the answer's length (confirmed, it says, by the authors) and which it equals
(``tests/losses/test_trl_equal.py``).
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    ByAnswer,
    Needed,
    PreferenceLogps,
    RejectingTerm,
    TermLoss,
    lengths,
    log_ratio,
    rejected_weights,
    reward_metrics,
    weighted_loss,
)


class Ipo(RejectingTerm):
    """IPO on the clip's own input. ``beta`` is the paper's tau."""

    kind: Literal["ipo"] = "ipo"
    average: bool = True
    """Divide rho by the answer's tokens, as TRL. False is the paper's equation."""

    def needs(self) -> tuple[Needed, ...]:
        """The answers after the clip."""
        return tuple(Needed("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rho: ByAnswer = {a: log_ratio(logps, ("input", a)) for a in self.answers()}
        rewards: ByAnswer = {a: self.beta * one for a, one in rho.items()}
        target = 1 / (2 * self.beta)
        if self.average:
            rho = {a: one / lengths(logps, a) for a, one in rho.items()}
        rows = weighted_loss(rho, weights, lambda margin: (margin - target).square())
        return TermLoss(rows, counted, reward_metrics(rewards, weights))
