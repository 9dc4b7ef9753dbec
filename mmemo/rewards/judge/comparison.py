"""The comparison of a candidate with what is known of the clip, under the heads of a reward model.

B rows, L tokens, D hidden size, H heads, C tokens of the candidate, F tokens of facts and clip.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_PHRASE = 3
"""Longest run of equal words that the comparison tells from shorter ones; cues have up to three."""


class Comparison(nn.Module):
    """Attention of the candidate's tokens to those of the facts, and a comparison of each token
    with what it found there.

    It attends and compares as the ESIM does (Chen et al., arXiv 1609.06038, sections 3.2 and 3.3).
    That a word occurs in the other text is an input, as DrQA's exact match is (arXiv 1704.00051,
    section 3.2): runs of 1, 2 and 3 equal words each have a learned weight in the attention. What
    stands at the head of a line of facts ("present cues:") is an input at each of its tokens. What
    a match means is learned.
    """

    def __init__(self, width: int, heads: int, clip: bool = False) -> None:
        """
        Args:
            clip: there are tokens of the clip among those of the facts.
        """
        super().__init__()
        self.heads = heads
        self.norm, self.head_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        # (H, n): the weight of each length of match. The first heads start with single words, the
        # last ones with phrases, and all with enough to outweigh a page of facts.
        steps = torch.linspace(0, 4, heads)[:, None]
        self.match = nn.Parameter(torch.cat([6 - steps, *[2 + steps] * (_PHRASE - 1)], dim=1))
        # What a token attends to that finds nothing.
        self.nothing = nn.Parameter(torch.full((heads,), 5.0))
        # Tokens of a clip match no word: from the start, each weighs as much as finding nothing.
        self.seen = nn.Parameter(torch.full((heads,), 5.0)) if clip else None
        self.compare = nn.Sequential(
            nn.Linear(3 * width + heads, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )

    def forward(
        self,
        states: Tensor,
        heads: Tensor,
        words: Tensor,
        candidate: Tensor,
        facts: Tensor,
        clip: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compare C candidate tokens with F tokens of the facts.

        Args:
            states: (B, L, D).
            heads: (B, L, D) what the head of each token's line says; 0 outside of the facts.
            words: (B, L) ids of words.
            candidate: (B, L), True for the candidate's tokens, which are consecutive.
            facts: (B, L), True for the tokens of the clip and the facts, which are consecutive.
            clip: (B, L), not 0 for the tokens of the clip; None without a clip.

        Returns:
            (B, C, D) comparisons, and (B, C) True where there is a token.
        """
        states = self.norm(states)
        # Only these two parts are compared: the whole text with itself would take several times as
        # long as the backbone.
        (mine, is_mine), (theirs, is_theirs) = _places(candidate), _places(facts)
        said, known = _taken(states, mine), _taken(states + heads, theirs)
        q, k, v = map(self._split, (self.query(said), self.key(known), known))
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, C, F)
        run = torch.ones((), dtype=torch.bool, device=states.device)
        for length in range(_PHRASE):  # the word itself, then those before it
            one, other = (words.gather(1, (at - length).clamp(min=0)) for at in (mine, theirs))
            run = run & (one[:, :, None] == other[:, None, :])  # (B, C, F)
            logits = logits + self.match[:, length, None, None] * run[:, None]
        if self.seen is not None and clip is not None:
            shown = clip.gather(1, theirs) > 0  # (B, F)
            logits = logits + self.seen[:, None, None] * shown[:, None, None, :]
        logits = logits.masked_fill(~is_theirs[:, None, None, :], -torch.inf)
        nothing = self.nothing[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, nothing], dim=-1).softmax(-1)
        found = (weights[..., :-1] @ v).transpose(1, 2).flatten(2)  # (B, C, D)
        missed = weights[..., -1].transpose(1, 2)  # (B, C, H)
        compared = torch.cat([said, found, said * found, missed], dim=-1)
        return self.compare(compared), is_mine

    def line_heads(self, embeddings: Tensor, lines: Tensor, heading: Tensor) -> Tensor:
        """The mean embedding of the head of each token's line.

        Args:
            embeddings: (B, L, D).
            lines: (B, L), number of each fact's line from 1; 0 outside of the facts.
            heading: (B, L), True for the tokens of the heads.

        Returns:
            (B, L, D), normalised; 0 outside of the facts.
        """
        # (B, N, L): the tokens of each line's head.
        number = torch.arange(1, int(lines.max()) + 1, device=lines.device)[None, :, None]
        mine = (lines[:, None, :] == number).float()
        head = mine * heading[:, None, :]
        means = head @ embeddings / head.sum(-1, keepdim=True).clamp(min=1)
        return mine.transpose(1, 2) @ self.head_norm(means)

    def _split(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _places(part: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) True for N consecutive tokens of each row -> (B, N) their places, and which exist."""
    counts = part.sum(1, keepdim=True)
    steps = torch.arange(int(counts.max()), device=part.device)
    places = part.int().argmax(1, keepdim=True) + steps
    return places.clamp(max=part.shape[1] - 1), steps < counts


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(B, L, D) at (B, N) -> (B, N, D)."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
