"""Pre-fusion (AffectGPT): combine the audio and visual encoder outputs before the LM reads them.

Shapes: N clips, T steps of one stream, D its width, W the larger of both widths, E the LM's width,
Q queries, H hidden size, P learned positions of one stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemo.models.composed.configuration import FusionConfig


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid steps: ``x`` (N, T, D), ``mask`` (N, T) -> (N, D). Zero if none is valid."""
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def part_weights(mask: Tensor, parts: int) -> Tensor:
    """Weights that average the valid steps of each clip over ``parts`` equal parts.

    ``mask`` (N, T) with the valid steps first -> (N, parts, T), float32. Part j of n valid steps
    covers ``floor(j n / parts)`` to ``ceil((j + 1) n / parts)``, as in adaptive average pooling,
    so n may be smaller than ``parts``. The weights are zero for a clip without a valid step.
    """
    lengths = mask.sum(1, keepdim=True)  # (N, 1)
    index = torch.arange(parts, device=mask.device)
    start = (index * lengths) // parts
    stop = -((-(index + 1) * lengths) // parts)
    steps = torch.arange(mask.shape[1], device=mask.device)
    inside = (steps >= start.unsqueeze(-1)) & (steps < stop.unsqueeze(-1)) & mask.unsqueeze(1)
    return inside.float() / inside.sum(-1, keepdim=True).clamp(min=1)


class LayerMix(nn.Module):
    """Softmax mix of hidden states with one scalar per layer: (N, layers, T, D) -> (N, T, D)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.scores.float(), 0).to(x.dtype)
        return torch.einsum("k,nktd->ntd", weights, x)


class Stream(nn.Module):
    """Input stage for one encoder's output: an optional layer mix, then an optional LayerNorm."""

    def __init__(self, size: int, layers: int, norm: bool) -> None:
        super().__init__()
        self.mix = LayerMix(layers) if layers else None
        self.norm = nn.LayerNorm(size) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = self.mix(x)
        return x if self.norm is None else self.norm(x)


class AttentionFusion(nn.Module):
    """AffectGPT's attention pre-fusion with one token per clip (ICML 2025; as released).

    Both streams are averaged over time to ``v`` and ``a`` and projected to a common width W. Two
    linear layers without a nonlinearity between them compute two weights from ``[v; a]``, and
    ``w_v v + w_a a`` is projected to the LM. The release uses the raw weights (``score: linear``)
    and does not normalise the streams. The default here is a softmax, which bounds the weights.
    """

    def __init__(
        self, settings: FusionConfig, visual: tuple[int, int], audio: tuple[int, int], out: int
    ) -> None:
        super().__init__()
        width = max(visual[0], audio[0])
        self.score = settings.score
        self.visual = Stream(*visual, norm=settings.norm)
        self.audio = Stream(*audio, norm=settings.norm)
        self.visual_proj = nn.Linear(visual[0], width)
        self.audio_proj = nn.Linear(audio[0], width)
        self.attention = nn.Sequential(nn.Linear(2 * width, width), nn.Linear(width, 2))
        self.proj = nn.Linear(width, out)

    def weights(self, v: Tensor, a: Tensor) -> Tensor:
        """The weights of the two projected streams: (N, W), (N, W) -> (N, 2)."""
        scores = self.attention(torch.cat([v, a], -1))
        return torch.softmax(scores, -1) if self.score == "softmax" else scores

    def forward(self, visual: Tensor, v_mask: Tensor, audio: Tensor, a_mask: Tensor) -> Tensor:
        """(N, [layers,] T, D) and (N, T) of each stream -> (N, 1, E)."""
        v = self.visual_proj(masked_mean(self.visual(visual), v_mask))
        a = self.audio_proj(masked_mean(self.audio(audio), a_mask))
        weights = self.weights(v, a)
        return self.proj(weights[:, :1] * v + weights[:, 1:] * a).unsqueeze(1)


class Attention(nn.Module):
    """Multi-head attention of (N, Q, H) over (N, S, D), with a residual and post-norm."""

    def __init__(self, hidden: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(context, hidden)
        self.v_proj = nn.Linear(context, hidden)
        self.o_proj = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            proj(value).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, value in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        keys = None if mask is None else mask[:, None, None, :]  # (N, 1, 1, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.norm(x + self.o_proj(out.transpose(1, 2).flatten(2)))


class QFormerFusion(nn.Module):
    """AffectGPT's Q-Former pre-fusion: learned queries attend to both streams, concatenated.

    Each layer is self-attention among the queries, then cross-attention to the streams, with
    post-norm as in BERT and without a feed-forward network.

    It differs from the release in these points. Each stream has its own half of the learned
    positions, whereas the release numbers both streams with one sequence of 264 positions; the
    tokens of a clip therefore do not depend on the padding of other clips in the batch. A linear
    layer per stream projects both to a common width, after a LayerNorm unless ``norm`` is off.
    Streams longer than their positions are averaged down. BERT's dropout is left out.
    """

    def __init__(
        self, settings: FusionConfig, visual: tuple[int, int], audio: tuple[int, int], out: int
    ) -> None:
        super().__init__()
        width, hidden = max(visual[0], audio[0]), settings.hidden_size
        self.span = settings.positions // 2
        self.visual = Stream(*visual, norm=settings.norm)
        self.audio = Stream(*audio, norm=settings.norm)
        self.visual_proj = nn.Linear(visual[0], width)
        self.audio_proj = nn.Linear(audio[0], width)
        self.positions = nn.Parameter(torch.zeros(2, self.span, width))
        self.queries = nn.Parameter(torch.zeros(settings.queries, hidden))
        layers = [
            nn.ModuleList(
                [
                    Attention(hidden, hidden, settings.heads),
                    Attention(hidden, width, settings.heads),
                ]
            )
            for _ in range(settings.layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.proj = nn.Linear(hidden, out)

    def _fit(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Average a stream down, clip by clip, where it is longer than its positions."""
        if x.shape[1] <= self.span:
            return x, mask
        short = torch.einsum("npt,ntd->npd", part_weights(mask, self.span).to(x.dtype), x)
        lengths = mask.sum(1, keepdim=True)
        fits = lengths <= self.span
        steps = torch.arange(self.span, device=x.device)
        return (
            # A clip that fits keeps its own steps, however long the others of its batch are.
            torch.where(fits.unsqueeze(-1), x[:, : self.span], short),
            steps < lengths.clamp(max=self.span),
        )

    def forward(self, visual: Tensor, v_mask: Tensor, audio: Tensor, a_mask: Tensor) -> Tensor:
        """(N, [layers,] T, D) and (N, T) of each stream -> (N, Q, E)."""
        v, v_mask = self._fit(self.visual_proj(self.visual(visual)), v_mask)
        a, a_mask = self._fit(self.audio_proj(self.audio(audio)), a_mask)
        v = v + self.positions[0, : v.shape[1]]
        a = a + self.positions[1, : a.shape[1]]
        context, mask = torch.cat([v, a], 1), torch.cat([v_mask, a_mask], 1)
        # A clip without a valid step attends to everything, because attention to nothing is NaN.
        mask = mask | ~mask.any(1, keepdim=True)
        x = self.queries.expand(len(context), -1, -1)
        for layer in self.layers:
            own, cross = layer.children()
            x = cross(own(x, x), context, mask)
        return self.proj(x)


def build_fusion(
    settings: FusionConfig, visual: tuple[int, int], audio: tuple[int, int], out: int
) -> AttentionFusion | QFormerFusion:
    """Build the fusion branch. ``visual`` and ``audio`` are (feature size, layers of a mix)."""
    kind = QFormerFusion if settings.kind == "qformer" else AttentionFusion
    return kind(settings, visual, audio, out)
