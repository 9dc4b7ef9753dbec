"""Identity preference optimisation: regresses the margin to a fixed target.

Shapes: B pairs.

    L = (rho(chosen) - rho(rejected) - 1 / (2 beta))^2

Unlike DPO's loss, which decreases without end as the margin grows, this one is least at the target.
With two rejected answers the loss is the mean of the two losses.

Sources: Azar et al., arXiv 2310.12036, eq. 17; TRL 1.16, ``loss_type="ipo"``, which divides each
rho by the answer's length (a choice that TRL says the authors confirmed) and which this loss equals
(``tests/losses/test_dpo_trl.py``).
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    ByAnswer,
    LogpRequest,
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

    kind: Literal["ipo"] = "ipo"  # pyright: ignore[reportIncompatibleVariableOverride]
    average: bool = True
    """Divide rho by the answer's number of tokens, as TRL does. False is the paper's equation."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip."""
        return tuple(LogpRequest("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rho: ByAnswer = {a: log_ratio(logps, ("input", a)) for a in self.answers()}
        rewards: ByAnswer = {a: self.beta * one for a, one in rho.items()}
        target = 1 / (2 * self.beta)
        # Only the loss sees averages: TRL's logged rewards are sums over the answer for IPO, too.
        if self.average:
            rho = {a: one / lengths(logps, a) for a, one in rho.items()}
        rows = weighted_loss(rho, weights, lambda margin: (margin - target).square())
        return TermLoss(rows, counted, reward_metrics(rewards, weights))
