"""Supervised fine-tuning loss: cross-entropy of the answer's tokens only.

Shapes: B rows, L tokens of a row, K answer tokens.

The loss is returned as a sum and a count, because the mean over an optimizer step divides the sum
over all of its micro-batches and ranks by the count over all of them. The mean of per-micro-batch
means, which several trainers take, lets a token's weight depend on the length of the other answers
in its micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmemo.data.collate import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """The loss of B rows, to be summed."""

    rows: Tensor
    """(B,) negative log-likelihood of each answer, the sum over its tokens, nats, with gradient."""
    tokens: Tensor
    """(B,) number of answer tokens."""
    correct: Tensor
    """(B,) number of answer tokens that greedy decoding would have produced."""


def answer_positions(labels: Tensor) -> Tensor:
    """(K,) sorted positions whose logits predict an answer token in some row of ``labels`` (B, L).
    Passing them to the model avoids the vocabulary projection at all other positions."""
    # Of any row, because the model takes one list of positions for the whole batch.
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """The K answer tokens of ``labels`` (B, L), row by row.

    ``rows``: (K,) the row of each. ``predictors``: (K,) the position in the flattened (B, L) that
    predicts it. ``targets``: (K,) its id.
    """

    rows: Tensor
    predictors: Tensor
    targets: Tensor


def answer_tokens(labels: Tensor) -> AnswerTokens:
    """The tokens where ``labels`` (B, L), not shifted, is not -100.

    The first token of a row is never scored, since no position before it could predict it.
    """
    rows, before = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return AnswerTokens(rows, rows * labels.shape[1] + before, labels[rows, before + 1])


def answer_loss(logps: Tensor, correct: Tensor, rows: Tensor, count: int) -> AnswerLoss:
    """Next-token cross-entropy of the answers.

    Args:
        logps: (K,) log-probability of each answer token, in nats.
        correct: (K,) 1 where it is the most likely token.
        rows: (K,) the row that it belongs to.
        count: B.
    """
    zeros = torch.zeros(count, dtype=logps.dtype, device=logps.device)
    return AnswerLoss(
        rows=zeros.index_add(0, rows, -logps),
        tokens=zeros.long().index_add(0, rows, torch.ones_like(rows)),
        correct=zeros.index_add(0, rows, correct.to(zeros.dtype)),
    )
