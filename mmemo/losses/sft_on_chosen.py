"""Supervised cross-entropy of the chosen answer, to accompany a preference loss.

Shapes: B pairs.

    L = -mean over the chosen answer's tokens of log policy

A preference loss only widens a difference and may make both answers less likely; this term keeps
the policy from degenerating that way. Each pair has the same weight, whatever its answer's length.

Sources: video-SALMONN 2, arXiv 2506.15220 (weight 0.1, on a separate answer instead of the chosen
one); HA-DPO, arXiv 2311.16839 (weight 0.5).
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    LogpRequest,
    PreferenceLogps,
    PreferenceTerm,
    TermLoss,
    lengths,
    sum_and_count,
    token_sum,
    usable,
)


class SftOnChosen(PreferenceTerm):
    """Supervised loss of the chosen answer after the clip."""

    kind: Literal["sft"] = "sft"  # pyright: ignore[reportIncompatibleVariableOverride]

    def needs(self) -> tuple[LogpRequest, ...]:
        """The chosen answer after the clip, without the reference."""
        return (LogpRequest("input", "chosen", reference=False),)

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair, in nats per token."""
        key = self.needs()[0].key
        counted = usable(logps, self.needs(), "chosen")
        rows = -token_sum(logps, key, logps.policy[key]) / lengths(logps, "chosen")
        return TermLoss(rows, counted, {"nll": sum_and_count(rows, counted)})
