"""Cross-entropy of the chosen answer, beside a preference loss.

    L = -mean over the chosen answer's tokens of log policy

B pairs. It keeps a policy from degenerating: a preference loss only widens a difference, and may
make both answers less likely. Each pair weighs the same, however long its answer.

Sources: video-SALMONN 2, arXiv 2506.15220 (weight 0.1, on an answer of its own; here it is the
chosen one); HA-DPO, arXiv 2311.16839 (weight 0.5).
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    Needed,
    PreferenceLogps,
    PreferenceTerm,
    TermLoss,
    lengths,
    over,
    token_sum,
    usable,
)


class SftOnChosen(PreferenceTerm):
    """Supervised loss of the chosen answer after the clip."""

    kind: Literal["sft"] = "sft"

    def needs(self) -> tuple[Needed, ...]:
        """The chosen answer after the clip; no reference."""
        return (Needed("input", "chosen", reference=False),)

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair, nats a token."""
        place = self.needs()[0].place
        counted = usable(logps, self.needs(), "chosen")
        rows = -token_sum(logps, place, logps.policy[place]) / lengths(logps, "chosen")
        return TermLoss(rows, counted, {"nll": over(rows, counted)})
