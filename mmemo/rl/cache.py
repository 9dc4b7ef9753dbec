"""A key-value cache that is filled by B prompts and then read by G rows of each.

transformers' own cache copies everything it holds for each new token. Here the room for all of a
completion is set aside when the prompt is done, and a token is written into its place. The prompt
itself is copied for its rows, or, where the attention can, stays as it is and is read by all.

B prompts, N = B * G rows, R of them kept, H heads, T tokens, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmemo.models.prefix_attention import SharedPrompts


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
