"""The building blocks of preference losses: log-probabilities of answers, and terms over them.

Shapes: B pairs, C tokens of the longest answer.

A preference pair has a clip, a question and two or three answers. ``chosen`` is grounded in the
clip, ``spurious`` relies on a cue that is present but irrelevant, and ``hallucinated`` cites a cue
that is absent. A pair may lack one of the two rejected answers. Each answer can be scored after
several versions of the prompt, its *branches*:

    input       the clip itself
    negative    the queried modality (both of them for joint questions) is replaced
    irrelevant  the other modality is replaced, the queried one is intact
    text        the prompt without any media

A (branch, answer) pair is an :data:`AnswerKey`. Its log-ratio
rho(answer | branch) = log policy - log reference is summed over the answer's tokens.

A *term* declares in :meth:`PreferenceTerm.needs` which log-probabilities it reads, and maps them to
one loss per pair. The trainer computes what the terms ask for and nothing else: a term that asks
for no reference costs no reference pass. A pair that lacks a branch or an answer is skipped by the
terms that need it, is not counted in their mean, and never changes another pair's loss. A part of a
term may need more than the rest: a pair without a negative then only lacks that part.

To add a term, write a subclass of :class:`PreferenceTerm` in a content file and name it by path,
``kind: losses/simpo.py:Simpo``; :mod:`mmemo.losses.objective` loads it. The fields of the class are
its parameters in the config.
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
from mmemo.data.preference import REJECTED, Answer

Branch = Literal["input", "negative", "irrelevant", "text"]
AnswerKey = tuple[Branch, Answer]
"""An answer after a branch: the key of its log-probabilities."""
Rejected = Literal["both", "first", "spurious", "hallucinated"]
Metrics = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count)."""
ByAnswer = dict[Answer, Tensor]


@dataclass(frozen=True, slots=True)
class LogpRequest:
    """A term's request for the token log-probabilities of one answer after one branch."""

    branch: Branch
    answer: Answer
    grad: bool = True
    """Whether the policy's log-probabilities need a gradient."""
    reference: bool = True
    """Whether the reference model's log-probabilities are needed."""
    policy: bool = True
    """Whether the policy's log-probabilities are needed. False asks for the reference's alone."""

    @property
    def key(self) -> AnswerKey:
        """The key of these log-probabilities in :class:`PreferenceLogps`."""
        return self.branch, self.answer


@dataclass(frozen=True, slots=True)
class PreferenceLogps:
    """Token log-probabilities of B pairs, in nats.

    Values at padding, and rows of pairs that lack the key, are arbitrary and must not be read.
    """

    policy: Mapping[AnswerKey, Tensor]
    """(B, C)."""
    reference: Mapping[AnswerKey, Tensor]
    """(B, C), without gradient."""
    mask: Mapping[Answer, Tensor]
    """(B, C) bool: True at the answer's tokens."""
    changed: Mapping[Answer, Tensor]
    """(B, C) bool: True at tokens in spans that differ from the other answer (for ``ddpo``)."""
    present: Mapping[AnswerKey, Tensor]
    """(B,) bool: whether the pair has that branch and that answer."""


@dataclass(frozen=True, slots=True)
class TermLoss:
    """A term's losses of B pairs. The term's mean is ``rows.sum() / counted.sum()``."""

    rows: Tensor
    """(B,) loss of each pair, with gradient; 0 for pairs that lack what the term needs."""
    counted: Tensor
    """(B,) bool: the pairs that the loss could be computed for."""
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    """name -> (sum, count) over the counted pairs, without gradient, under TRL's names where TRL
    logs the same quantity."""


class Term(Protocol):
    """A loss over preference pairs."""

    def needs(self) -> tuple[LogpRequest, ...]:
        """The log-probabilities that the term reads, each key once."""
        ...

    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""
        ...


class PreferenceTerm(Config, ABC):
    """Base class of the terms. A term is its own config: its fields are its parameters."""

    # The built-in terms narrow the type to their own name. Configs are frozen, so that is safe, but
    # pyright only knows the fields as mutable and has to be told.
    kind: str = ""
    """A built-in loss (``dpo``, ``avem_dpo``, ...), or the class of one's own in a content file,
    ``losses/simpo.py:Simpo``."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the term in the loss. With 0 the term is only logged and changes no gradient."""
    name: str | None = Field(default=None, min_length=1)
    """Prefix of the term's metrics. Defaults to ``kind``, or to the file's name for a path."""

    @property
    def title(self) -> str:
        """The name under which the term is logged."""
        file = self.kind.rpartition(":")[0]
        short = file.rpartition("/")[2].removesuffix(".py") if file else self.kind
        return self.name or short or type(self).__name__.lower()

    @abstractmethod
    def needs(self) -> tuple[LogpRequest, ...]:
        """The log-probabilities that the term reads, each key once."""

    @abstractmethod
    def __call__(self, logps: PreferenceLogps) -> TermLoss:
        """The loss of each pair."""


class RejectingTerm(PreferenceTerm, ABC):
    """Base class of the terms that compare the chosen answer with rejected ones."""

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the regularisation towards the reference model."""
    rejected: Rejected = "both"
    """Rejected answers to compare with: ``spurious``, ``hallucinated``, ``both``, or ``first`` (the
    spurious one if the pair has it, else the hallucinated one). With ``both``, a pair that has only
    one rejected answer gives it the full weight."""

    def answers(self) -> tuple[Answer, ...]:
        """The chosen answer and the rejected ones that the term may read."""
        return ("chosen", *rejected_answers(self.rejected))


class SigmoidTerm(RejectingTerm, ABC):
    """Base class of the terms whose loss of a margin is -log sigmoid, with label smoothing.

    The smoothing is of the comparison of *answers*, which a judge or a rule may get wrong. It is
    not applied to the comparison of a clip with its negative (PMP, mDPO's conditional preference):
    which of the two is the true clip is known. :mod:`mmemo.losses.dpo` has the formulas and their
    sources.
    """

    loss_type: Literal["sigmoid", "robust"] = "sigmoid"
    """How ``label_smoothing`` enters the loss: ``sigmoid`` is conservative DPO (cDPO), ``robust``
    the unbiased estimate of the loss of the clean labels (rDPO). Both are the plain loss without
    smoothing."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, allow_inf_nan=False)
    """Probability that the chosen and the rejected answer of a pair are swapped, below 0.5, as in
    pairs that a model judged. 0 trusts every label."""

    def margin_loss(self, margin: Tensor) -> Tensor:
        """(B,) loss of each margin (B,) between answers."""
        clean = preference_loss(margin)
        eps = self.label_smoothing
        if eps == 0:  # the plain loss to the bit, at half the cost
            return clean
        flipped = preference_loss(-margin)
        if self.loss_type == "robust":
            return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)
        return (1 - eps) * clean + eps * flipped


def rejected_answers(rejected: Rejected) -> tuple[Answer, ...]:
    """The rejected answers that the setting selects from."""
    return (rejected,) if rejected in ("spurious", "hallucinated") else REJECTED


def usable(logps: PreferenceLogps, needs: Sequence[LogpRequest], answer: Answer) -> Tensor:
    """(B,) bool: pairs that have ``answer`` after every branch that ``needs`` lists it with."""
    present = [logps.present[request.key] for request in needs if request.answer == answer]
    return torch.stack(present).all(dim=0)


def rejected_weights(
    logps: PreferenceLogps,
    needs: Sequence[LogpRequest],
    rejected: Rejected,
    shares: tuple[float, float] = (0.5, 0.5),
) -> tuple[ByAnswer, Tensor]:
    """The weight of each rejected answer in a pair's loss.

    Args:
        shares: weights of the spurious and of the hallucinated answer in pairs that have both;
            both must be above 0.

    Returns:
        (B,) weights by answer, which sum to 1 in counted pairs and are 0 elsewhere; and (B,) bool,
        the counted pairs: those with the chosen answer and at least one rejected answer.
    """
    have: ByAnswer = {a: usable(logps, needs, a) for a in rejected_answers(rejected)}
    if rejected == "first":
        have["hallucinated"] = have["hallucinated"] & ~have["spurious"]
    counted = usable(logps, needs, "chosen") & torch.stack(list(have.values())).any(dim=0)
    raw: ByAnswer = {a: shares[REJECTED.index(a)] * (has & counted) for a, has in have.items()}
    total = torch.stack(list(raw.values())).sum(dim=0)
    safe = torch.where(counted, total, torch.ones_like(total))  # no division by 0, nor its gradient
    weights: ByAnswer = {answer: share / safe for answer, share in raw.items()}
    return weights, counted


def token_sum(logps: PreferenceLogps, key: AnswerKey, values: Tensor) -> Tensor:
    """(B,) sum of ``values`` (B, C) over the answer's tokens, in float32 or wider.

    The sum is 0 for pairs that lack the key, whatever their row holds.
    """
    here = logps.mask[key[1]] & logps.present[key][:, None]
    # bfloat16 has 8 significant bits, too few for the sum over an answer. float64, in which
    # gradients are tested, stays float64.
    wide = torch.promote_types(values.dtype, torch.float32)
    # Filled, not multiplied by 0: padding and absent rows may hold NaN.
    return values.masked_fill(~here, 0.0).sum(dim=1, dtype=wide)


def lengths(logps: PreferenceLogps, answer: Answer) -> Tensor:
    """(B,) number of tokens of the answer, at least 1."""
    # A pair without the answer has no tokens, and a mean over them would be NaN.
    return logps.mask[answer].sum(dim=1).clamp(min=1)


def log_ratio(
    logps: PreferenceLogps, key: AnswerKey, token_weights: Tensor | None = None
) -> Tensor:
    """(B,) rho of a key: log policy - log reference, summed over the answer, in nats.

    The reference is summed exactly as the policy is, weights included, so that rho is 0 where both
    models are the same.

    Args:
        token_weights: (B, C) weight of each token; None weighs all tokens 1.
    """
    difference = logps.policy[key] - logps.reference[key].detach()
    return token_sum(
        logps, key, difference if token_weights is None else difference * token_weights
    )


def preference_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(margin): the Bradley-Terry negative log-likelihood, in nats."""
    # Not log(sigmoid()): sigmoid underflows to 0 at very negative margins.
    return -logsigmoid(margin)


def sum_and_count(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """A metric: the sum of ``values`` (B,) over the pairs in ``where`` (B,), and their number."""
    return values.detach().masked_fill(~where, 0.0).sum(), where.sum()


def weighted_loss(
    scores: Mapping[Answer, Tensor],
    weights: Mapping[Answer, Tensor],
    loss: Callable[[Tensor], Tensor] = preference_loss,
) -> Tensor:
    """(B,) weighted mean of the loss of the chosen answer against each rejected answer.

    Args:
        scores: (B,) score of each answer; a margin is the chosen answer's score minus the rejected
            answer's.
        weights: (B,) weight of each rejected answer.
        loss: maps (B,) margins to (B,) losses.
    """
    # The weight of 0 removes an absent answer, because token_sum gives it a finite score of 0.
    losses = [weights[a] * loss(scores["chosen"] - scores[a]) for a in weights]
    return torch.stack(losses).sum(dim=0)


def reward_metrics(rewards: Mapping[Answer, Tensor], weights: Mapping[Answer, Tensor]) -> Metrics:
    """Reward metrics under TRL's names, over the pairs whose ``weights`` are not all 0.

    With two rejected answers, ``rewards/rejected`` is their weighted mean and
    ``rewards/accuracies`` is the weight of those with a lower reward than the chosen answer.
    ``rewards/spurious`` and ``rewards/hallucinated`` report each of them separately.

    Args:
        rewards: (B,) implicit reward of each answer.
        weights: (B,) weight of each rejected answer.
    """
    chosen = rewards["chosen"]
    counted = torch.stack([weight > 0 for weight in weights.values()]).any(dim=0)
    mixed = torch.stack([w * rewards[a] for a, w in weights.items()]).sum(dim=0)
    # As in TRL, a tie is no win, so an untrained policy has an accuracy of 0.
    beaten = torch.stack([w * (chosen > rewards[a]) for a, w in weights.items()]).sum(dim=0)
    return {
        "rewards/chosen": sum_and_count(chosen, counted),
        "rewards/rejected": sum_and_count(mixed, counted),
        "rewards/margins": sum_and_count(chosen - mixed, counted),
        "rewards/accuracies": sum_and_count(beaten, counted),
        **{f"rewards/{a}": sum_and_count(rewards[a], w > 0) for a, w in weights.items()},
    }
