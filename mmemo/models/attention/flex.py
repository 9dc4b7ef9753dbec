"""Packed sequences through torch's FlexAttention: one kernel that skips what is not allowed.

Attention by layout (:mod:`mmemo.models.attention.shared_prefix`) copies the keys of a prompt for
each of its continuations, and pads. FlexAttention takes the packed sequence as it is, with a mask
of blocks: no key is repeated, and blocks without an allowed pair are not computed. On CUDA it is
compiled, for the forward and the backward pass. On the CPU torch computes its forward pass alone,
and scores of all pairs; it is there for tests.

Shapes: B prompts, P tokens of the longest, N continuations, T tokens of the packed sequence, H
heads, E width of a head.

Source: Dong et al., Flex Attention, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices -> whether the query's token may look at the key's."""


def usable(query: Tensor, dropout: float) -> bool:
    """Whether FlexAttention can compute a pass of ``query``."""
    on_cpu = query.device.type != "cuda"
    # It has no dropout, and on the CPU no backward pass.
    return not dropout and not (on_cpu and torch.is_grad_enabled() and query.requires_grad)


def prefix_allowed(
    prompts: int, lengths: Tensor, prompt_of: Tensor, continuation_of: Tensor
) -> Allowed:
    """What tokens of prompts and continuations may look at.

    Args:
        prompts: B * P, the tokens of all prompts with padding, which come first.
        lengths: (B,) tokens of each prompt without padding.
        prompt_of: (T,) the prompt of each token.
        continuation_of: (T,) the continuation of each token, -1 for those of prompts.
    """
    width = prompts // len(lengths)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt, part = prompt_of[key], continuation_of[key]
        mine = (part == -1) | (part == continuation_of[query])
        real = (key >= prompts) | (key % width < lengths[prompt])
        # Padding looks at itself, so that no softmax is over an empty set.
        seen = (prompt == prompt_of[query]) & mine & real & (query >= key)
        return seen | (query == key)

    return allowed


def rows_allowed(row_of: Tensor) -> Allowed:
    """What tokens of packed rows may look at; ``row_of``: (T,) the row of each."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row_of[query] == row_of[key]) & (query >= key)

    return allowed


def blocks_of(allowed: Allowed, tokens: int, device: torch.device) -> BlockMask:
    """The blocks of T = ``tokens`` by T that hold an allowed pair, for all heads."""
    return create_block_mask(allowed, None, None, tokens, tokens, device=str(device))


@functools.cache
def _compiled() -> Any:
    # Every batch has another T, for each of which a static kernel would be compiled.
    return torch.compile(flex_attention, dynamic=True)


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float | None
) -> Tensor:
    """(1, H, T, E) -> (1, T, H, E); key and value may have fewer heads."""
    run: Any = _compiled() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out = run(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
