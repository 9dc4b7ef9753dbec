"""Log-probabilities of tokens from hidden states, without the logits of all tokens at once.

The logits of a batch are by far its largest tensor: 4096 tokens and 152 thousand words are 2.5 GB
in float32, and a loss on them holds several such tensors. Here the head is applied to some tokens
at a time. Each token's log-probability depends on its own hidden state alone, so that, where the
head does not learn, its gradient is known up to one factor as soon as it is computed: the chunk's
logits are dropped, and the backward pass multiplies. Where the head learns, the backward pass
computes the chunk again.

K scored tokens, k of them in a chunk, D hidden size, V vocabulary.

Source: Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2 (chunks, and gradients in the
forward pass).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmemo.models.backbone import Backbone
from mmemo.models.transformers_compat import has_forward_hooks

MAX_LOGITS = 1 << 26
"""Maximum number of logits held at once, unless a config says otherwise: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of K tokens.

    ``logps``: (K,) log-probability in nats, float32, with gradient. ``entropies``: (K,) entropy in
    nats of the distribution that the token is from. ``correct``: (K,) 1 where the token is the most
    likely one. The latter two are without gradient, and None if they were not asked for.
    """

    logps: Tensor
    entropies: Tensor | None = None
    correct: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of a backbone with what is computed of its logits."""

    backbone: Backbone
    temperature: float
    entropies: bool
    correct: bool
    apply: Callable[[Tensor], Tensor] | None = None
    """What is called instead of the backbone's own head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(k, D) -> (k, V), in the model's own dtype."""
        # Some language models scale or cap their logits; the composed model knows how.
        scale: Any = getattr(self.backbone, "_scale", None) or nn.Identity()
        return scale((self.apply or self.backbone.lm_head)(hidden))

    def distribution(self, logits: Tensor) -> Tensor:
        """(k, V) log-probabilities in float32."""
        logits = logits.float()
        return (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)

    def measures(self, spread: Tensor, targets: Tensor) -> list[Tensor]:
        """(k,) each: what was asked for of (k, V) log-probabilities, without gradient."""
        spread, found = spread.detach(), list[Tensor]()
        if self.entropies:
            found.append(-(spread.exp() * spread).sum(-1))
        if self.correct:
            found.append((spread.argmax(-1) == targets).float())
        return found

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """(k,) log-probabilities, then the :meth:`measures`."""
        spread = self.distribution(self.logits(hidden))
        # cross_entropy in two steps, of which the measures need the first.
        logps = -functional.nll_loss(spread, targets, reduction="none")
        return logps, *self.measures(spread, targets)

    def score_with_slopes(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """(k, D) gradient of each log-probability for its own hidden state, then :meth:`score`."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.logits(hidden)
        with torch.no_grad():
            spread = self.distribution(logits)
            at = targets[:, None]
            logps = spread.gather(-1, at).squeeze(-1)
            measures = self.measures(spread, targets)
            # d log p / d logits = [is the target] - p, in the memory of the log-probabilities.
            pull = spread.exp_().neg_()
            pull.scatter_(-1, at, 1 - logps.exp()[:, None])
            pull = pull if self.temperature == 1 else pull.div_(self.temperature)
        (slopes,) = torch.autograd.grad(logits, hidden, pull.to(logits.dtype))
        return slopes, logps, *measures

    def learns(self, hidden: Tensor) -> bool:
        """Whether the logits have a gradient beside that of the hidden states."""
        # Asked of the result: PEFT has layers whose weights stand elsewhere in the model.
        with torch.enable_grad():
            return self.logits(hidden[:1].detach()).requires_grad


class _KnownSlopes(torch.autograd.Function):
    """(K,) values whose gradients (K, D) are known: each depends on its own row alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logps: Tensor, slopes: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(slopes)
        return logps.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None


def token_scores(
    backbone: Backbone,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    correct: bool = False,
    max_logits: int | None = None,
) -> TokenScores:
    """Log-probabilities of tokens from hidden states.

    Args:
        backbone: its output head is applied.
        hidden: (K, D) hidden states.
        targets: (K,) tokens that they predict.
        temperature: divisor of the logits.
        entropies: also compute entropies.
        correct: also compute which tokens are the most likely ones.
        max_logits: maximum number of logits held at once; None is :data:`MAX_LOGITS`, and 0 holds
            all. It bounds memory, and changes numbers by rounding alone.
    """
    head = _Head(backbone, temperature, entropies, correct)
    module, limit = backbone.lm_head, max_logits
    hooked = has_forward_hooks(module)
    if hooked and next(module.children(), None) is not None:
        limit = 0  # the hooks of its parts would run once a chunk
    size = chunk_size(backbone, limit) or max(1, len(hidden))
    if hooked and len(hidden) > size:
        return _scores(head, [_in_one_call(head, hidden, targets, size)])
    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    # Only where a graph would hold the logits of several chunks is there memory to be saved.
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return _scores(head, [head.score(*chunk) for chunk in chunks])
    if head.learns(hidden):
        return _scores(head, _recomputed(head, chunks))
    found = [head.score_with_slopes(*chunk) for chunk in chunks]
    scores = _scores(head, [parts[1:] for parts in found])
    slopes = torch.cat([parts[0] for parts in found])
    logps: Any = _KnownSlopes.apply(hidden, scores.logps, slopes)
    return TokenScores(logps, scores.entropies, scores.correct)


def _recomputed(head: _Head, chunks: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """:meth:`_Head.score` of each chunk, which the backward pass computes again."""
    if not torch.is_grad_enabled():
        return [head.score(*chunk) for chunk in chunks]
    recompute: Any = checkpoint
    return [recompute(head.score, *chunk, use_reentrant=False) for chunk in chunks]


def _in_one_call(head: _Head, hidden: Tensor, targets: Tensor, size: int) -> tuple[Tensor, ...]:
    """:meth:`_Head.score` in chunks within a single call of the head.

    The hooks of ZeRO-3 gather a weight over the ranks for as long as its layer runs, and again
    before the backward pass of its output. Ranks have different numbers of chunks, and would wait
    for each other forever if each chunk were a call.
    """
    module: Any = head.backbone.lm_head
    linear = module.forward
    inner = replace(head, apply=linear)

    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
        found = _recomputed(inner, chunks)
        return tuple(torch.cat(list(part)) for part in zip(*found, strict=True))

    before = vars(module).get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _scores(head: _Head, chunks: list[tuple[Tensor, ...]]) -> TokenScores:
    logps, *measures = (torch.cat(list(part)) for part in zip(*chunks, strict=True))
    entropies = measures.pop(0) if head.entropies else None
    return TokenScores(logps, entropies, measures.pop() if head.correct else None)


def chunk_size(backbone: Backbone, max_logits: int | None) -> int | None:
    """The number of tokens whose logits are held at once; None: of all."""
    limit = MAX_LOGITS if max_logits is None else max_logits
    if limit == 0:
        return None
    head: Any = backbone.lm_head
    # PEFT wraps a head that learns.
    return max(1, limit // int(getattr(head, "original_module", head).out_features))
