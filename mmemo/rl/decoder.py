"""A language model that goes on from B prompts with several rows of each, a token at a time.

B prompts, P tokens of the longest, R rows still in the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmemo.models.backbone import Backbone
from mmemo.models.fused import FusedLM, TokenStore
from mmemo.models.prefix_attention import SharedPrompts, poison_step, use_prefixes
from mmemo.models.routing import KEYWORD, Route, routed
from mmemo.rl.cache import expand_cache, new_cache, select_rows, split_cache


class Decoder:
    """A language model after its prompts, one token further with each :meth:`advance`.

    ``logits``: (B * group, V) for the first token. ``shared``: whether rows read their prompt's
    keys and values where they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Any],
        group: int,
        room: int,
        *,
        shared: bool = True,
        fused: FusedLM | None = None,
    ) -> None:
        """``prompts``: as for :class:`~mmemo.rl.rollout.RolloutEngine`; ``room``: tokens that may
        come; ``shared``: share the cache if the attention can; ``fused``: what takes the steps
        then."""
        self._backbone, self._lm = backbone, cast(Any, backbone.language_model)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        positions = backbone.positions(ids, mask, prompts)  # (B, P) or (3, B, P)
        self._cache: Any = new_cache(self._lm.config)
        kinds = prompts["modality_ids"]
        embeds, routing = routed(self._lm, backbone.embed(ids, kinds, prompts), kinds)
        self._route: Route | None = routing.get(KEYWORD)
        hidden = self._lm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **routing,
        ).last_hidden_state[:, -1]
        self.logits = self._head(hidden).repeat_interleave(group, 0)
        self._prompts: SharedPrompts | None = None
        if shared and use_prefixes(self._lm):
            self._prompts = split_cache(self._cache, mask, group, room)
        self.shared = self._prompts is not None
        self._fused: FusedLM | None = None
        if self._prompts is None:
            expand_cache(self._cache, group, room)
        elif fused is not None:
            self._fused, self._store = fused, TokenStore(self._prompts, len(ids) * group, room)
        following = positions.masked_fill(~mask.bool(), -1).amax(-1) + 1  # (B,) or (3, B)
        following = following.amax(0) if following.ndim == 2 else following
        self._at = following.repeat_interleave(group)  # (R,) position of the next token
        self._of = torch.arange(len(ids), device=ids.device).repeat_interleave(group)  # prompts
        self._axes = 3 if positions.ndim == 3 else 0
        padded = not self.shared and not bool(mask.all())
        self._mask: Tensor | None = mask.repeat_interleave(group, 0) if padded else None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        if self._prompts is not None:
            self._prompts.keep(rows)
        if self._fused is None:
            select_rows(self._cache, rows)
        else:
            self._store.keep(rows)
        self._at, self._of = self._at[rows], self._of[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def advance(self, tokens: Tensor) -> Tensor:
        """(R,) the tokens drawn -> (R, V) logits of the next ones."""
        embeds = self._lm.get_input_embeddings()(tokens)
        if self._prompts is not None and self._fused is not None:
            hidden = self._fused.step(embeds, self._at, self._store, self._prompts)
        else:
            hidden = self._stepped(embeds[:, None])
        self._at = self._at + 1
        return self._head(hidden)

    def _stepped(self, embeds: Tensor) -> Tensor:
        """(R, 1, D) -> (R, D), through the language model's own modules."""
        given: dict[str, Any] = {}
        if self._prompts is not None:
            given = {"attention_mask": poison_step(embeds), "prompts": self._prompts}
        elif self._mask is not None:
            self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
            given = {"attention_mask": self._mask}
        if self._route is not None:
            given[KEYWORD] = self._route.after(self._of)
        positions = self._at[:, None]
        return self._lm(
            inputs_embeds=embeds,
            position_ids=positions.expand(self._axes, -1, -1) if self._axes else positions,
            past_key_values=self._cache,
            use_cache=True,
            **given,
        ).last_hidden_state[:, -1]

    def _head(self, hidden: Tensor) -> Tensor:
        # Some LMs scale or cap their logits; the composed model knows how.
        scale: Any = getattr(self._backbone, "_scale", None) or nn.Identity()
        return scale(self._backbone.lm_head(hidden)).float()
