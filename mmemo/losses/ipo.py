"""Identity preference optimisation: the margin is drawn to a fixed size, not driven without end.

    L = (rho(chosen) - rho(rejected) - 1 / (2 beta))^2

B pairs. With two rejected answers it is the mean of the two losses.

Sources: Azar et al., arXiv 2310.12036, eq. 17; TRL 1.16, ``loss_type="ipo"``, which divides each
rho by the answer's length (confirmed, it says, by the authors) and which it equals
(``tests/losses/test_trl_equal.py``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmemo.losses.preference_terms import (
    Answer,
    Needed,
    PreferenceLogps,
    RejectingTerm,
    TermLoss,
    lengths,
    log_ratio,
    rejected_weights,
    reward_metrics,
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
        rho = {a: log_ratio(logps, ("input", a)) for a in self.answers()}
        score = {a: self._score(logps, a, one) for a, one in rho.items()}
        target = 1 / (2 * self.beta)
        rows = [w * (score["chosen"] - score[a] - target).square() for a, w in weights.items()]
        rewards = {a: self.beta * rho[a] for a in weights}
        metrics = reward_metrics(self.beta * rho["chosen"], rewards, weights)
        return TermLoss(torch.stack(rows).sum(dim=0), counted, metrics)

    def _score(self, logps: PreferenceLogps, answer: Answer, rho: Tensor) -> Tensor:
        return rho / lengths(logps, answer) if self.average else rho
