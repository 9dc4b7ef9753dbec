"""What the text alone would answer, and how a margin discounts it (text-prior debiasing, TPD).

    gap = log pi_text(chosen) - log pi_text(rejected)        without gradient
    margin -> margin + gamma * gap   (sign plus)   or   margin - gamma * gap   (sign minus)

B pairs. The gap has no gradient, so all that it does is to scale a pair's gradient, which is
proportional to sigmoid(-margin).

*The sign.* To maximise E[r - gamma log pi_text] - beta KL(pi || reference) is to have
r = beta log(pi / reference) + gamma log pi_text + const, so the derivation gives **plus**: a pair
whose rejected answer the text favours (gap < 0) has the smaller margin and is learnt from more,
which is what debiasing is for. The published equation has **minus**, which learns from such a pair
less. ``plus`` is the default; ``minus`` is the paper as printed.

*The size.* A summed gap grows with the answers' lengths: one of 20 nats times gamma 0.2 moves a
margin by 4, where a pair weighs 0.018 or 0.98 instead of 0.5, and a longer answer has the lower
sum whatever it says. So the gap is taken per token by default, and clamped.

Sources: AVEm-DPO, arXiv 2602.07054 (known second-hand: the equation, the stopped gradient, gamma);
MoD-DPO, arXiv 2603.03192 (pi_text is the reference). Normalisation, clamp and sign are ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    Needed,
    PreferenceLogps,
    RejectingTerm,
    lengths,
    token_sum,
)


class TextPriorTerm(RejectingTerm):
    """Base of the terms whose margin discounts what the text alone would answer."""

    gamma: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Strength of the discount. 0 leaves it out, and the text branch with it."""
    sign: Literal["plus", "minus"] = "plus"
    """``plus`` follows from the objective; ``minus`` is the published equation."""
    text_prior: Literal["policy", "reference"] = "policy"
    """Whose text-only answer is the prior: the policy's as it stands, or the reference's."""
    text_average: bool = True
    """Take the gap per token. False sums, as published."""
    text_clamp: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Largest size of the gap, nats. At gamma 0.2, 5 moves a margin by at most 1: a pair at margin
    0 then weighs 0.27 to 0.73, and none is silenced. None does not clamp."""

    def text_needs(self) -> tuple[Needed, ...]:
        """The answers after the text alone."""
        policy = self.text_prior == "policy"
        if not self.gamma:
            return ()
        return tuple(
            Needed("text", answer, grad=False, reference=not policy, policy=policy)
            for answer in self.answers()
        )

    def text_logp(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) log-probability of the answer from the text alone, nats (a token)."""
        place = ("text", answer)
        prior = logps.policy if self.text_prior == "policy" else logps.reference
        total = token_sum(logps, place, prior[place].detach())
        return total / lengths(logps, answer) if self.text_average else total

    def text_shift(self, gap: Tensor) -> Tensor:
        """(B,) what the gap (B,) of text log-probabilities adds to a margin."""
        if self.text_clamp is not None:
            gap = gap.clamp(-self.text_clamp, self.text_clamp)
        return (self.gamma if self.sign == "plus" else -self.gamma) * gap
