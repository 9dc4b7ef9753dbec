"""Supervised fine-tuning loss: cross-entropy of the answer's tokens only.

Shapes: B rows, L tokens of a row, K positions whose logits are computed, V vocabulary size.

The loss is returned as a sum and a count, because the mean over an optimizer step divides the sum
over all of its micro-batches and ranks by the count over all of them. The mean of per-micro-batch
means, which several trainers take, lets a token's weight depend on the length of the other answers
in its micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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


def count_answer_tokens(labels: Tensor) -> int:
    """The number of tokens of ``labels`` (B, L) that :func:`answer_loss` scores.

    The first token of a row is never scored, since no position before it could predict it.
    """
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def answer_positions(labels: Tensor) -> Tensor:
    """(K,) sorted positions whose logits predict an answer token in some row of ``labels`` (B, L).
    Passing them to the model avoids the vocabulary projection at all other positions."""
    # Of any row, because the model takes one list of positions for the whole batch.
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def answer_loss(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> AnswerLoss:
    """Next-token cross-entropy where ``labels`` is not -100.

    Args:
        logits: (B, L, V), or (B, K, V) at ``positions``.
        labels: (B, L) token ids, not shifted; -100 where no loss is taken.
        positions: (K,) positions of the logits, each below L - 1; None: all.
    """
    if positions is None:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels[:, positions + 1]
    scored = targets != IGNORE_INDEX  # (B, K)
    rows = scored.nonzero()[:, 0]
    # Selected before the conversion, so that only the scored positions are copied to float32.
    predicted, answer = logits[scored].float(), targets[scored]
    losses = functional.cross_entropy(predicted, answer, reduction="none")
    hits = (predicted.detach().argmax(dim=-1) == answer).to(losses.dtype)
    zeros = torch.zeros(labels.shape[0], dtype=losses.dtype, device=losses.device)
    return AnswerLoss(
        rows=zeros.index_add(0, rows, losses),
        tokens=scored.sum(dim=1),
        correct=zeros.index_add(0, rows, hits),
    )
