"""One token from each row of logits, by a random number that the caller brings. R rows, V words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Filters(Protocol):
    """What narrows the distribution; names and order of application are transformers'."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float | None: ...


def draw(
    logits: Tensor, uniforms: Tensor, filters: Filters, never: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the distribution function at the row's number.

    Args:
        logits: (R, V) float32.
        uniforms: (R,) float64 in [0, 1).
        never: (V,) bool, tokens that cannot be drawn.

    Returns:
        The tokens (R,), and their log-probabilities (R,) in nats under the temperature alone.
    """
    scaled = logits / filters.temperature
    allowed = scaled if never is None else scaled.masked_fill(never, -torch.inf)
    allowed = narrow(allowed, filters)
    mass = allowed.double().softmax(-1).cumsum(-1)  # (R, V)
    # Just below 1, so that rounding never leads past the last token that has any mass.
    at = (uniforms * (1 - 1e-12))[:, None] * mass[:, -1:]
    tokens = torch.searchsorted(mass, at, right=True).clamp(max=logits.shape[-1] - 1)
    logps = scaled.gather(1, tokens) - scaled.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), logps.squeeze(1)


def narrow(logits: Tensor, filters: Filters) -> Tensor:
    """(R, V) logits after temperature -> the same with -inf where a filter rules a token out."""
    if 0 < filters.top_k < logits.shape[-1]:
        least = logits.topk(filters.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if filters.top_p < 1:
        ascending, order = logits.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - filters.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if filters.min_p:
        probabilities = logits.softmax(-1)
        least = filters.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def silenced(tokens: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """(V,) bool, True for ``tokens``; None when there are none."""
    if not tokens:
        return None
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(tokens)] = True
    return mask
