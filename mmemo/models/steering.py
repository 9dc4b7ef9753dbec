"""Two simpler changes of attention, to compare reallocation with. Both take the same switch,
:func:`mmemo.models.reallocation.reallocating`.

Shapes: B rows, S keys, n rows of attention, Q query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mmemo.models.reallocation import Kind, RowConfig


class AmplificationConfig(RowConfig):
    """More attention to everything seen and heard, whatever its balance.

    Source: PAI, Liu et al., arXiv 2407.21771: scores a of media tokens become
    a + alpha |a| before the softmax. Its contrast with a prompt without media is
    :class:`mmemo.models.contrast.ContrastConfig`.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token that are amplified."""
    alpha: float = Field(default=0.2, ge=0)

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention_rows.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention_rows.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        return (scores + self.alpha * scores.abs() * media).softmax(-1, dtype=torch.float32)


class SinkConfig(RowConfig):
    """Attention wasted on sinks goes to the other media tokens.

    Source: VAR, Kang et al., arXiv 2503.03321. There a sink shows in certain dimensions
    of its hidden state, which differ from model to model; here it is a token with many times the
    mean weight of a token, all heads together, which needs nothing to be known of the model.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token that receive."""
    sink: float = Field(default=20.0, gt=1)
    """A sink has over so many times the weight of the mean token."""
    head_gate: float = Field(default=0.2, ge=0, le=1)
    """Heads with less than this share of their attention on the modalities do not change."""
    most_sunk: float = Field(default=0.5, ge=0, le=1)
    """Nor do heads with over this share of their attention to the modalities on sinks."""
    keep: float = Field(default=0.6, ge=0, le=1)
    """What sinks keep of their weight."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention_rows.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention_rows.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        seen = (scores > torch.finfo(scores.dtype).min / 2).sum(-1, keepdim=True)  # (B, Q, n, 1)
        sink = plain.mean(1, keepdim=True) * seen > self.sink  # (B, Q, n, S)
        sink = sink.to(plain.dtype)
        mass = (plain * media).sum(-1, keepdim=True)  # (B, Q, n, 1)
        rest = (plain * media * (1 - sink)).sum(-1, keepdim=True)
        freed = (1 - self.keep) * (plain * sink).sum(-1, keepdim=True)
        chosen = (mass >= self.head_gate) & (mass - rest <= self.most_sunk * mass)
        chosen &= rest > torch.finfo(plain.dtype).eps
        gain = torch.where(chosen, freed / rest.clamp(min=torch.finfo(plain.dtype).eps), 0.0)
        loss = torch.where(chosen, 1 - self.keep, 0.0)
        return plain * (1 + gain * media * (1 - sink) - loss * sink)
