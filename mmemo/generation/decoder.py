"""A language model that goes on from B prompts with several rows of each, a token at a time.

B prompts, P tokens of the longest, R rows still in the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmemo.models.adapters.routing import KEYWORD, Route, routed
from mmemo.models.attention.fused import FusedLM, TokenStore
from mmemo.models.attention.shared_prefix import SharedPrompts, poison_step, use_prefixes
from mmemo.models.backbone import Backbone

# A key-value cache that is filled by B prompts and then read by G rows of each.
#
# transformers' own cache copies everything it holds for each new token. Here the room for all of a
# completion is set aside when the prompt is done, and a token is written into its place. The prompt
# itself is copied for its rows, or, where the attention can, stays as it is and is read by all.
#
# B prompts, N = B * G rows, R of them kept, H heads, T tokens, E width of a head.


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (N, H, T, E), in the front of larger tensors."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        """``room``: how many more tokens will come."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._stores = [_roomy(keys, room), _roomy(values, room)]
        self._length, self._end = keys.shape[-2], keys.shape[-2] + room
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (N, H, t, E) behind what is there; all of it comes back, as views."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._end:
            raise ValueError(f"a cache with room for {self._end} tokens cannot take more")
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start : self._length] = states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        room = self._end - self._length
        self._stores = [
            _roomy(store[:, :, : self._length].index_select(0, indices), room)
            for store in self._stores
        ]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (store[:, :, : self._length] for store in self._stores)
        return self.keys, self.values


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a language model."""
    return DynamicCache(config=config)


def expand_cache(cache: DynamicCache, group: int, room: int) -> None:
    """Repeat each row ``group`` times, in place, with room for so many more tokens.

    Layers that are no plain keys and values (sliding windows, states) are repeated as they are.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            if group > 1:
                keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            cache.layers[place] = RoomyLayer(keys, values, room)
        elif group > 1:
            one: Any = layer
            one.batch_repeat_interleave(group)


def split_cache(cache: DynamicCache, mask: Tensor, group: int, room: int) -> SharedPrompts | None:
    """Leave the prompts to the attention and room for completions in the cache, in place.

    Args:
        mask: (B, P), non-zero for the prompts' tokens.

    Returns:
        The prompts; None, and nothing is changed, where some layers are no plain keys and values.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return None
        keys.append(layer.keys)
        values.append(layer.values)
    for place, pair in enumerate(zip(keys, values, strict=True)):
        none = [x.new_empty(len(x) * group, x.shape[1], 0, x.shape[3]) for x in pair]
        cache.layers[place] = RoomyLayer(none[0], none[1], room)
    return SharedPrompts(keys, values, mask, group)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows, (R,), in place."""
    for layer in cache.layers:
        one: Any = layer
        one.batch_select_indices(rows)


def _roomy(tensor: Tensor, room: int) -> Tensor:
    rows, heads, length, width = tensor.shape
    store = torch.empty(rows, heads, length + room, width, dtype=tensor.dtype, device=tensor.device)
    store[:, :, :length] = tensor
    return store


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
        """``prompts``: as for :class:`~mmemo.generation.rollout.RolloutEngine`; ``room``: tokens
        that may come; ``shared``: share the cache if the attention can; ``fused``: what takes the
        steps then."""
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
