"""What every preference loss is made of: log-probabilities of answers, and terms over them.

B pairs, C tokens of the longest answer.

A pair has a clip, a question and two or three answers: one grounded in the clip (``chosen``), one
that leans on a cue that is there and does not matter (``spurious``), one that cites a cue that is
not there (``hallucinated``). Either of the last two may be absent. Each answer can be scored after
several versions of the prompt, its *branches*:

    input       the clip itself
    negative    the queried modality (both, for joint questions) replaced
    irrelevant  the other modality replaced, the queried one intact
    text        the prompt without any media

With rho(answer | branch) = log policy - log reference, summed over the answer's tokens: a term
says by :meth:`Term.needs` what it reads, and turns that into one loss a pair. A pair that lacks a
branch or an answer is left out of the term and not counted; it never changes the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmemo.config import Config
from mmemo.data.preference import Answer

Branch = Literal["input", "negative", "irrelevant", "text"]
AnswerKey = tuple[Branch, Answer]
Rejected = Literal["both", "first", "spurious", "hallucinated"]
Metrics = dict[str, tuple[Tensor, Tensor]]
ByAnswer = dict[Answer, Tensor]

REJECTED: tuple[Answer, Answer] = ("spurious", "hallucinated")


@dataclass(frozen=True, slots=True)
class Needed:
    """The log-probabilities of one answer after one branch, which a term asks the trainer for."""

    branch: Branch
    answer: Answer
    grad: bool = True
    """False: the policy's may be computed without gradient."""
    reference: bool = True
    """The reference's too."""
    policy: bool = True
    """False: only the reference's is read."""

    @property
    def place(self) -> AnswerKey:
        """The key under which :class:`PreferenceLogps` has it."""
        return self.branch, self.answer


@dataclass(frozen=True, slots=True)
class PreferenceLogps:
    """Token log-probabilities of B pairs, in nats. What padding, and a pair that lacks the place,
    hold is never read."""

    policy: Mapping[AnswerKey, Tensor]
    """(B, C)."""
    reference: Mapping[AnswerKey, Tensor]
    """(B, C), without gradient."""
    mask: Mapping[Answer, Tensor]
    """(B, C) bool: the answer's tokens."""
    changed: Mapping[Answer, Tensor]
    """(B, C) bool: tokens in spans that differ from the other answer. Only ``ddpo`` reads it."""
    present: Mapping[AnswerKey, Tensor]
    """(B,) bool: the pair has that branch and that answer."""


@dataclass(frozen=True, slots=True)
class TermLoss:
    """What one term says of B pairs; the term's loss is ``rows.sum() / counted.sum()``."""

    rows: Tensor
    """(B,) with gradient; 0 for pairs that lack what the term needs."""
    counted: Tensor
    """(B,) bool: pairs that it could be computed for."""
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    """name -> (sum, count) over the counted pairs, without gradient; TRL's names where it has
    one."""


class Term(Protocol):
    """A loss over pairs."""

    def needs(self) -> tuple[Needed, ...]:
        """What it reads."""
        ...

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        ...


class PreferenceTerm(Config, ABC):
    """Base of the terms: the settings of a term are the term."""

    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Its factor in the loss. 0 only observes: it is logged and changes nothing."""
    name: str | None = Field(default=None, min_length=1)
    """What logs call it; its ``kind`` unless given."""

    @abstractmethod
    def needs(self) -> tuple[Needed, ...]:
        """What it reads."""

    @abstractmethod
    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""


class RejectingTerm(PreferenceTerm, ABC):
    """Base of the terms that hold the chosen answer against rejected ones."""

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference."""
    rejected: Rejected = "both"
    """``spurious``, ``hallucinated``, ``both``, or ``first``: the spurious answer where there is
    one, else the hallucinated one. With ``both``, the only one that a pair has gets all the
    weight."""

    def answers(self) -> tuple[Answer, ...]:
        """The chosen answer and the rejected ones it may read."""
        return ("chosen", *rejected_answers(self.rejected))


def rejected_answers(rejected: Rejected) -> tuple[Answer, ...]:
    """The rejected answers that the setting lets in."""
    return (rejected,) if rejected in ("spurious", "hallucinated") else REJECTED


def usable(logps: PreferenceLogps, needs: Sequence[Needed], answer: Answer) -> Tensor:
    """(B,) bool: pairs with ``answer`` after every branch that ``needs`` lists it with."""
    found = [logps.present[one.place] for one in needs if one.answer == answer]
    return torch.stack(found).all(dim=0)


def rejected_weights(
    logps: PreferenceLogps,
    needs: Sequence[Needed],
    rejected: Rejected,
    shares: tuple[float, float] = (0.5, 0.5),
) -> tuple[ByAnswer, Tensor]:
    """How much each rejected answer of a pair weighs.

    Args:
        shares: of the spurious and of the hallucinated answer where a pair has both; above 0.

    Returns:
        (B,) weights by answer, which sum to 1 in counted pairs and are 0 elsewhere; and (B,) bool,
        the counted pairs: those with the chosen answer and at least one rejected one.
    """
    have: ByAnswer = {a: usable(logps, needs, a) for a in rejected_answers(rejected)}
    if rejected == "first":
        have["hallucinated"] = have["hallucinated"] & ~have["spurious"]
    counted = usable(logps, needs, "chosen") & torch.stack(list(have.values())).any(dim=0)
    raw: ByAnswer = {a: shares[REJECTED.index(a)] * (has & counted) for a, has in have.items()}
    total = torch.stack(list(raw.values())).sum(dim=0)
    safe = torch.where(counted, total, torch.ones_like(total))
    weights: ByAnswer = {answer: share / safe for answer, share in raw.items()}
    return weights, counted


def token_sum(logps: PreferenceLogps, place: AnswerKey, values: Tensor) -> Tensor:
    """(B,) sum of ``values`` (B, C) over the answer's tokens, in float32 or wider; 0 for pairs
    without the place, whatever stands there."""
    here = logps.mask[place[1]] & logps.present[place][:, None]
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.masked_fill(~here, 0.0).sum(dim=1, dtype=wide)


def lengths(logps: PreferenceLogps, answer: Answer) -> Tensor:
    """(B,) tokens of the answer, at least 1."""
    return logps.mask[answer].sum(dim=1).clamp(min=1)


def log_ratio(
    logps: PreferenceLogps, place: AnswerKey, token_weights: Tensor | None = None
) -> Tensor:
    """(B,) rho of a place: log policy - log reference over the answer, in nats.

    The reference passes through the same sum as the policy, weights included, so that rho is 0
    where the two are one.

    Args:
        token_weights: (B, C).
    """
    difference = logps.policy[place] - logps.reference[place].detach()
    return token_sum(
        logps, place, difference if token_weights is None else difference * token_weights
    )


def preference_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(margin): Bradley-Terry, nats."""
    return -logsigmoid(margin)


def over(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the sum of ``values`` (B,) over the pairs in ``where`` (B,), and their number."""
    return values.detach().masked_fill(~where, 0.0).sum(), where.sum()


def weighted_loss(
    scores: Mapping[Answer, Tensor],
    weights: Mapping[Answer, Tensor],
    loss: Callable[[Tensor], Tensor] = preference_loss,
) -> Tensor:
    """(B,) mean, by ``weights``, of the loss of the chosen answer against each rejected one.

    Args:
        scores: (B,) of each answer; a margin is the chosen one's less the rejected one's.
        weights: (B,) of each rejected answer.
    """
    losses = [weights[a] * loss(scores["chosen"] - scores[a]) for a in weights]
    return torch.stack(losses).sum(dim=0)


def reward_metrics(rewards: Mapping[Answer, Tensor], weights: Mapping[Answer, Tensor]) -> Metrics:
    """Rewards under TRL's names, over the pairs whose ``weights`` are not all 0.

    With two rejected answers ``rejected`` is their weighted mean and ``accuracies`` the weight of
    those that the chosen answer beats; each alone is ``rewards/spurious``,
    ``rewards/hallucinated``.

    Args:
        rewards: (B,) of each answer. weights: (B,) of each rejected one.
    """
    chosen = rewards["chosen"]
    counted = torch.stack([weight > 0 for weight in weights.values()]).any(dim=0)
    mixed = torch.stack([w * rewards[a] for a, w in weights.items()]).sum(dim=0)
    beaten = torch.stack([w * (chosen > rewards[a]) for a, w in weights.items()]).sum(dim=0)
    return {
        "rewards/chosen": over(chosen, counted),
        "rewards/rejected": over(mixed, counted),
        "rewards/margins": over(chosen - mixed, counted),
        "rewards/accuracies": over(beaten, counted),
        **{f"rewards/{a}": over(rewards[a], w > 0) for a, w in weights.items()},
    }
