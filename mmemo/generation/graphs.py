"""A decoding step as one CUDA graph.

A token of a few rows takes some thousand small kernels, and to launch them one by one takes longer
than to run them. A graph launches all of them at once. It goes on with the same memory each time,
so a step must neither change shapes nor make tensors that outlive it.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(R,) tokens and (R,) random numbers -> (R,) next tokens and (R,) their log-probabilities."""


class StepGraph:
    """A :data:`Step` that is recorded once and then replayed; off CUDA it is called as it is."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.forget()

    def forget(self) -> None:
        """Record anew: the rows have changed."""
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        if not tokens.is_cuda:
            return self._step(tokens, uniforms)
        if not self._warm:
            # Libraries set themselves up in their first call, which cannot be recorded.
            self._warm = True
            with _plain_autocast():
                return self._step(tokens, uniforms)
        if self._graph is None:
            self._inputs = (tokens.clone(), uniforms.clone())
            self._graph = torch.cuda.CUDAGraph()
            with _plain_autocast(), torch.cuda.graph(self._graph):
                self._outputs = self._step(*self._inputs)
        for held, new in zip(self._inputs, (tokens, uniforms), strict=True):
            held.copy_(new)
        self._graph.replay()
        found, logps = self._outputs
        return found.clone(), logps.clone()


def _plain_autocast() -> AbstractContextManager[object]:
    """Autocast as it is, without its cache: a cached weight would belong to the graph."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    kind = torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=kind, cache_enabled=False)
