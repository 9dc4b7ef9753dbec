"""Supervised fine-tuning loss: cross-entropy of the answer's tokens, and of nothing else.

B rows, L tokens of a row, K positions whose logits are computed, V vocabulary.

The loss is returned as a sum with its count: the mean over a *step* divides the sum over all its
micro-batches and ranks by the count over all of them. The mean of per-micro-batch means, which
several trainers take, weighs a token by how long its neighbours' answers are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmemo.data.collate import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """``rows``: (B,) summed negative log-likelihoods in nats, with gradient. ``tokens``: (B,)
    answer tokens. ``correct``: (B,) answer tokens that greedy decoding would have produced."""

    rows: Tensor
    tokens: Tensor
    correct: Tensor


def count_answer_tokens(labels: Tensor) -> int:
    """Tokens that :func:`answer_loss` scores. ``labels``: (B, L). The first token of a row is
    never scored: nothing stands before it to predict it from."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def answer_positions(labels: Tensor) -> Tensor:
    """(K,) sorted positions whose logits predict an answer token in some row of ``labels``
    (B, L). Handing them to the model spares the vocabulary projection everywhere else."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def answer_loss(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> AnswerLoss:
    """Cross-entropy of next tokens where ``labels`` is not -100.

    Args:
        logits: (B, L, V), or (B, K, V) at ``positions``.
        labels: (B, L) token ids, -100 where not learnt; not shifted.
        positions: (K,) positions of the logits, each below L - 1.
    """
    if positions is None:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels[:, positions + 1]
    scored = targets != IGNORE_INDEX  # (B, K)
    rows = scored.nonzero()[:, 0]
    chosen, wanted = logits[scored].float(), targets[scored]
    losses = functional.cross_entropy(chosen, wanted, reduction="none")
    right = (chosen.detach().argmax(dim=-1) == wanted).to(losses.dtype)
    zeros = torch.zeros(labels.shape[0], dtype=losses.dtype, device=losses.device)
    return AnswerLoss(
        rows=zeros.index_add(0, rows, losses),
        tokens=scored.sum(dim=1),
        correct=zeros.index_add(0, rows, right),
    )
