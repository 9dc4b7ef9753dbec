"""Decodes several continuations of each prompt, one token at a time, from one prefill and its
cache.

transformers' own key-value cache copies everything that it holds for each new token. Here
(:class:`PreallocatedLayer`) the room for a whole completion is allocated once the prompt is done,
and tokens are written into it. The prompt's part is copied for the rows of its group or, where the
attention supports it, stays as it is and is read by all of them.

B prompts, P tokens of the longest, G rows of each, N = B * G rows, R rows still in the batch,
D hidden size, V vocabulary, H heads, T tokens, E width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmemo.models.adapters.routing import KEYWORD, Route, join_routes, routed
from mmemo.models.attention.fused import FusedLM, TokenStore
from mmemo.models.attention.shared_prefix import SharedPrompts, poison_step, use_prefixes
from mmemo.models.backbone import Backbone, layer_inputs, prompt_positions


class Decoder:
    """A language model with prefilled prompts; each :meth:`advance` decodes one more token.

    ``logits``: (B * G, V) logits of the first token. ``shared``: whether rows read their prompt's
    keys and values in place.

    Args:
        backbone: the model.
        prompts: collated prompts, as for :class:`~mmemo.generation.rollout.RolloutEngine`, or
            several batches of them, which are prefilled one after the other and decoded together.
        group: G, rows per prompt.
        room: maximum number of tokens of a completion.
        shared: share the prompts' cache if the attention supports it.
        fused: decodes the steps after the prefill, if the cache is shared.
        fixed: keep the shapes of ``fused`` steps fixed.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        group: int,
        room: int,
        *,
        shared: bool = True,
        fused: FusedLM | None = None,
        fixed: bool = False,
    ) -> None:
        self._backbone, self._lm = backbone, cast(Any, backbone.language_model)
        batches = [prompts] if isinstance(prompts, Mapping) else list(prompts)
        shared = shared and use_prefixes(self._lm)
        whole = _join([self._prefill(batch) for batch in batches])
        mask, rows = whole.mask, len(whole.mask) * group
        self._cache, self._route, self._axes = whole.cache, whole.route, whole.axes
        self.logits = self._head(whole.hidden).repeat_interleave(group, 0)
        self._prompts: SharedPrompts | None = None
        if shared:
            self._prompts = split_cache(self._cache, mask, group, room)
        self.shared = self._prompts is not None
        self._fused: FusedLM | None = None
        if self._prompts is None:
            expand_cache(self._cache, group, room)
        elif fused is not None:
            self._fused = fused
            self._store = TokenStore(self._prompts, rows, room, fixed=fixed)
        self.fixed = fixed and self._fused is not None
        """Whether a step is the same operations on the same memory each time."""
        self._positions = whole.following.repeat_interleave(group)  # (R,) of the next token
        # (R,) prompt of each row
        self._prompt_of = torch.arange(len(mask), device=mask.device).repeat_interleave(group)
        # Shared prompts bring their mask along, and without padding no mask is needed.
        padded = not self.shared and not bool(mask.all())
        self._mask: Tensor | None = mask.repeat_interleave(group, 0) if padded else None

    def _prefill(self, prompts: Mapping[str, Any]) -> _Prefilled:
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        positions = prompt_positions(self._backbone, prompts)  # (B, P) or (3, B, P)
        cache, kinds = new_cache(self._lm.config), prompts["modality_ids"]
        embeds, routing = routed(self._lm, self._backbone.embed(ids, kinds, prompts), kinds)
        # Prompts are padded on the left, so the last position is the last token of each.
        hidden = self._lm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **layer_inputs(self._backbone, kinds, prompts),
            **routing,
        ).last_hidden_state[:, -1]
        following = positions.masked_fill(~mask.bool(), -1).amax(-1) + 1  # (B,) or (3, B)
        # M-RoPE's three positions differ inside media; text goes on after the largest of them.
        following = following.amax(0) if following.ndim == 2 else following
        axes = 3 if positions.ndim == 3 else 0
        return _Prefilled(hidden, cache, mask, following, axes, routing.get(KEYWORD))

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        if self._prompts is not None:
            self._prompts.keep(rows)
        if self._fused is None:
            select_rows(self._cache, rows)
        else:
            self._store.keep(rows)
        self._positions, self._prompt_of = self._positions[rows], self._prompt_of[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def advance(self, tokens: Tensor) -> Tensor:
        """Decode (R,) sampled tokens; returns the (R, V) logits of the next ones."""
        embeds = self._lm.get_input_embeddings()(tokens)
        if self._prompts is not None and self._fused is not None:
            hidden = self._fused.step(embeds, self._positions, self._store, self._prompts)
        else:
            hidden = self._stepped(embeds[:, None])
        # In place, because a CUDA graph goes on with the same tensor.
        self._positions += 1
        return self._head(hidden)

    def _stepped(self, embeds: Tensor) -> Tensor:
        """(R, 1, D) embeddings to (R, D) hidden states, through the language model's own
        modules."""
        given: dict[str, Any] = {}
        if self._prompts is not None:
            # A layer that loses ``prompts`` fails at this mask instead of forgetting the prompt.
            given = {"attention_mask": poison_step(embeds), "prompts": self._prompts}
        elif self._mask is not None:
            self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
            given = {"attention_mask": self._mask}
        if self._route is not None:
            given[KEYWORD] = self._route.after(self._prompt_of)
        positions = self._positions[:, None]
        return self._lm(
            inputs_embeds=embeds,
            position_ids=positions.expand(self._axes, -1, -1) if self._axes else positions,
            past_key_values=self._cache,
            use_cache=True,
            **given,
        ).last_hidden_state[:, -1]

    def _head(self, hidden: Tensor) -> Tensor:
        # Some language models scale or cap their logits; the composed model knows how.
        scale: Any = getattr(self._backbone, "_scale", None) or nn.Identity()
        return scale(self._backbone.lm_head(hidden)).float()


@dataclass(slots=True)
class _Prefilled:
    """B prompts that have been computed. ``hidden``: (B, D) of their last tokens. ``mask``: (B, P).
    ``following``: (B,) position of the next token. ``axes``: 3 with M-RoPE, else 0."""

    hidden: Tensor
    cache: Any
    mask: Tensor
    following: Tensor
    axes: int
    route: Route | None


def can_join(config: Any) -> bool:
    """Whether the caches of several batches can be joined: all layers keep all tokens."""
    return all(type(layer) is DynamicLayer for layer in new_cache(config).layers)


def _join(parts: list[_Prefilled]) -> _Prefilled:
    """All prompts as one batch. The parts' caches are emptied."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.shape[1] for part in parts)
    first = parts[0]
    for index, layer in enumerate(first.cache.layers):
        for name in ("keys", "values"):
            # One tensor at a time, so that little more than one copy of the caches is held.
            found = [getattr(part.cache.layers[index], name) for part in parts]
            joined = torch.cat([_padded(one, width, -2) for one in found])
            for part in parts[1:]:
                setattr(part.cache.layers[index], name, None)
            setattr(layer, name, joined)
    routes = [part.route for part in parts if part.route is not None]
    return _Prefilled(
        torch.cat([part.hidden for part in parts]),
        first.cache,
        torch.cat([_padded(part.mask, width, -1) for part in parts]),
        torch.cat([part.following for part in parts]),
        first.axes,
        join_routes(routes) if routes else None,
    )


def _padded(x: Tensor, width: int, dim: int) -> Tensor:
    """Zeros before ``x`` along a dimension counted from the end."""
    after = [0, 0] * (-dim - 1)
    return nn.functional.pad(x, [*after, width - x.shape[dim], 0])


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, (N, H, T, E), at the front of larger tensors."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        """``room``: maximum number of tokens still to come."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._stores = [_preallocated(keys, room), _preallocated(values, room)]
        self._length, self._end = keys.shape[-2], keys.shape[-2] + room
        self.is_initialized = True
        self._update_views()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (N, H, t, E) keys and values; returns all of them as views.

        Raises:
            ValueError: there is no room left.
        """
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._end:
            raise ValueError(f"the cache has room for {self._end} tokens and cannot take more")
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start : self._length] = states
        return self._update_views()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        room = self._end - self._length
        self._stores = [
            _preallocated(store[:, :, : self._length].index_select(0, indices), room)
            for store in self._stores
        ]
        self._update_views()

    def _update_views(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (store[:, :, : self._length] for store in self._stores)
        return self.keys, self.values


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a language model's config."""
    return DynamicCache(config=config)


def expand_cache(cache: DynamicCache, group: int, room: int) -> None:
    """Repeat each row ``group`` times, in place, with room for ``room`` more tokens.

    Layers that are not plain keys and values (sliding windows, states) are repeated as they are.
    """
    for index, layer in enumerate(cache.layers):
        # This very class: its subclasses, such as sliding windows, drop tokens or keep other
        # states.
        if type(layer) is DynamicLayer:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            if group > 1:
                keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            cache.layers[index] = PreallocatedLayer(keys, values, room)
        elif group > 1:
            one: Any = layer
            one.batch_repeat_interleave(group)


def split_cache(cache: DynamicCache, mask: Tensor, group: int, room: int) -> SharedPrompts | None:
    """Move the prompts out of the cache, in place, leaving room for completions.

    Args:
        cache: the cache of the B prefilled prompts.
        mask: (B, P), non-zero for the prompts' tokens.
        group: G.
        room: maximum number of tokens of a completion.

    Returns:
        The prompts, for the attention to read. None, with the cache unchanged, if some layers are
        not plain keys and values.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in cache.layers:
        # All layers are looked at before any is changed: None leaves the cache as it was.
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return None
        keys.append(layer.keys)
        values.append(layer.values)
    for index, pair in enumerate(zip(keys, values, strict=True)):
        none = [x.new_empty(len(x) * group, x.shape[1], 0, x.shape[3]) for x in pair]
        cache.layers[index] = PreallocatedLayer(none[0], none[1], room)
    return SharedPrompts(keys, values, mask, group)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep only these rows, (R,), in place."""
    for layer in cache.layers:
        one: Any = layer
        one.batch_select_indices(rows)


def _preallocated(tensor: Tensor, room: int) -> Tensor:
    rows, heads, length, width = tensor.shape
    # Not filled: each slot is written before it is read.
    store = torch.empty(rows, heads, length + room, width, dtype=tensor.dtype, device=tensor.device)
    store[:, :, :length] = tensor
    return store
