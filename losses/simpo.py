"""SimPO: preference optimisation without a reference model, on length-normalised log-probabilities.

Shapes: B pairs.

    L = -log sigmoid(beta / |y_w| * log pi(y_w | x) - beta / |y_l| * log pi(y_l | x) - gamma)

y_w is the chosen answer, y_l a rejected one, |y| the number of tokens. The implicit reward of an
answer is beta times its mean log-probability per token, which is also what decoding ranks answers
by: a reference model plays no part in decoding, so none plays a part in the reward. Without the
division by length, a longer answer would have a lower reward whatever it says, and the policy would
have to push up long chosen answers for their length alone. ``gamma`` is a target margin: a pair
whose chosen answer is ahead by exactly gamma still has a loss of log 2.

Nothing holds the policy near the model it started from but the learning rate and the number of
steps. The authors use learning rates of 3e-7 to 1e-6 for 7B to 9B models; a supervised term
(``kind: sft``) beside this one guards against both answers becoming less likely.

With two rejected answers the loss is the mean of the two losses.

Use it in a preference config:

    objective:
      terms:
        - {kind: losses/simpo.py:Simpo, beta: 2.0, gamma: 1.0}

Source: Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
NeurIPS 2024, https://arxiv.org/abs/2405.14734, eq. 6. TRL's ``CPOTrainer`` has it as
``loss_type="simpo"`` with ``simpo_gamma``, and this loss equals that one
(``tests/content/test_simpo.py``).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mmemo.losses.base import (
    Answer,
    AnswerKey,
    ByAnswer,
    LogpRequest,
    PreferenceLogps,
    SigmoidTerm,
    TermLoss,
    lengths,
    rejected_weights,
    reward_metrics,
    token_sum,
    weighted_loss,
)


class Simpo(SigmoidTerm):
    """SimPO on the clip's own input. Its fields are its parameters in the config."""

    beta: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Scale of the reward. Log-probabilities per token are small, so it is larger than DPO's: 2.0
    to 2.5 in the paper."""
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Target margin between the two rewards, in nats; 0.3 to 1.6 in the paper."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The answers after the clip. No reference is asked for, so none is computed."""
        return tuple(LogpRequest("input", answer, reference=False) for answer in self.answers())

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        weights, counted = rejected_weights(logps, self.needs(), self.rejected)
        rewards: ByAnswer = {answer: self._reward(logps, answer) for answer in self.answers()}
        rows = weighted_loss(rewards, weights, lambda m: self.margin_loss(m - self.gamma))
        return TermLoss(rows, counted, reward_metrics(rewards, weights))

    def _reward(self, logps: PreferenceLogps, answer: Answer) -> Tensor:
        """(B,) beta times the mean log-probability of the answer's tokens."""
        key: AnswerKey = ("input", answer)
        return self.beta * token_sum(logps, key, logps.policy[key]) / lengths(logps, answer)
