"""Text-prior debiasing (TPD): discounts a margin by what the text alone would answer.

Shapes: B pairs.

    gap = log pi_text(chosen) - log pi_text(rejected)        without gradient
    margin -> margin + gamma * gap   (sign plus)   or   margin - gamma * gap   (sign minus)

The gap has no gradient, so its only effect is to scale a pair's gradient, which is proportional to
sigmoid(-margin).

*The sign.* The policy that maximises E[r - gamma log pi_text] - beta KL(pi || reference) satisfies
r = beta log(pi / reference) + gamma log pi_text + const, so the derivation gives **plus**: a pair
whose rejected answer is favoured by the text (gap < 0) gets a smaller margin and a larger gradient,
which is the purpose of debiasing. The published equation has **minus**, which gives such a pair a
smaller gradient. ``plus`` is the default; ``minus`` is the paper as printed.

*The size.* A summed gap grows with the answers' lengths: a gap of 20 nats times gamma 0.2 moves a
margin by 4, where a pair's gradient weight is 0.018 or 0.98 instead of 0.5, and a longer answer has
a lower sum whatever it says. By default the gap is therefore taken per token, and clamped.

Sources: AVEm-DPO, arXiv 2602.07054 (known second-hand: the equation, the stopped gradient, gamma);
MoD-DPO, arXiv 2603.03192 (pi_text is the reference). Normalisation, clamp and sign are ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    LogpRequest,
    PreferenceLogps,
    SigmoidTerm,
    lengths,
    token_sum,
)


class TextPriorTerm(SigmoidTerm):
    """Base class of the terms with text-prior debiasing."""

    gamma: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Strength of the text-prior discount. 0 removes it and skips the text branch."""
    sign: Literal["plus", "minus"] = "plus"
    """Sign of the discount: ``plus`` follows from the objective, ``minus`` is the published
    equation."""
    text_prior: Literal["policy", "reference"] = "policy"
    """Model whose text-only log-probabilities are the prior: the current policy, without gradient,
    or the reference."""
    text_average: bool = True
    """Average the prior over the answer's tokens. False sums over them, as published."""
    text_clamp: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Largest absolute gap, in nats; None does not clamp. At gamma 0.2, a clamp of 5 moves a margin
    by at most 1: the gradient weight of a pair at margin 0 stays within 0.27 and 0.73, so that no
    pair is silenced."""

    def text_needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the text alone."""
        policy = self.text_prior == "policy"
        if not self.gamma:
            return ()
        return tuple(
            LogpRequest("text", answer, grad=False, reference=not policy, policy=policy)
            for answer in self.answers()
        )

    def text_logp(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) log-probability of the answer given the text alone, in nats or nats per token."""
        key = ("text", answer)
        prior = logps.policy if self.text_prior == "policy" else logps.reference
        # Detached, since another term may have asked for a gradient of the same key.
        total = token_sum(logps, key, prior[key].detach())
        return total / lengths(logps, answer) if self.text_average else total

    def text_shift(self, gap: Tensor) -> Tensor:
        """(B,) shift of the margin for a gap (B,) of text-only log-probabilities."""
        if self.text_clamp is not None:
            gap = gap.clamp(-self.text_clamp, self.text_clamp)
        return (self.gamma if self.sign == "plus" else -self.gamma) * gap
