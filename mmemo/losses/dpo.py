"""Direct preference optimisation, optionally with label smoothing for noisy preferences.

Shapes: B pairs.

    m = beta * [rho(chosen) - rho(rejected)],   l(m) = -log sigmoid(m)

    label_smoothing 0              L = l(m)
    sigmoid (cDPO)                 L = (1 - eps) l(m) + eps l(-m)
    robust  (rDPO)                 L = [(1 - eps) l(m) - eps l(-m)] / (1 - 2 eps)

``eps`` (``label_smoothing``) is the assumed probability that a pair's label is flipped. The two
variants draw opposite conclusions from it, as their derivatives show:

    cDPO:  dL/dm = -[sigmoid(-m) - eps]                     0 at m = log((1 - eps) / eps)
    rDPO:  dL/dm = -[sigmoid(-m) + eps / (1 - 2 eps)]       never 0

cDPO takes the label to be right with probability 1 - eps, so it stops at the margin of that
probability and then pushes back. rDPO is unbiased: if labels are flipped with probability eps, its
expectation is the DPO loss of the clean labels, (1 - eps) L(m) + eps L(-m) = l(m). That removes the
bias of the noise at the price of variance, and never lets a margin rest.

With two rejected answers the loss is the mean of the two losses, as two rows with the same chosen
answer would give.

Sources: Rafailov et al., arXiv 2305.18290, eq. 7 (DPO); Mitchell, "A note on DPO with noisy
preferences & relationship to IPO", 2023 (cDPO); Chowdhury et al., "Provably Robust DPO",
arXiv 2403.00409, section 3 (rDPO). The loss equals TRL 1.16's ``loss_type="sigmoid"`` without
smoothing and ``"robust"`` with it (``tests/losses/test_dpo_trl.py``). TRL's ``"sigmoid"`` ignores
``label_smoothing`` since it rewrote ``DPOTrainer``; its ``"aot"`` and its ``CPOTrainer`` still have
the cDPO form, which ours equals.
"""

from __future__ import annotations

from typing import Literal

from mmemo.losses.base import (
    ByAnswer,
    LogpRequest,
    PreferenceLogps,
    SigmoidTerm,
    TermLoss,
    log_ratio,
    rejected_weights,
    reward_metrics,
    weighted_loss,
)


class Dpo(SigmoidTerm):
    """DPO on the clip's own input."""

    kind: Literal["dpo"] = "dpo"  # pyright: ignore[reportIncompatibleVariableOverride]

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip."""
        return tuple(LogpRequest("input", answer) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {a: self.beta * log_ratio(logps, ("input", a)) for a in self.answers()}
        metrics = reward_metrics(rewards, weights)
        return TermLoss(weighted_loss(rewards, weights, self.margin_loss), counted, metrics)
