"""Attention of continuations to the prompt they share, without looking at each other.

A block mask over the packed sequence is right but wasteful: most of a row's scores are of tokens
that may not see each other. Here the prompts attend causally among themselves, and each
continuation to its prompt and itself, so that only what is allowed is computed.

Shapes: B prompts, P tokens of the longest, N continuations, C tokens of the longest, T tokens of
the packed sequence, H heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "mmemo_prefix"
"""Of the attention implementation: torch's SDPA, which also knows :class:`PrefixLayout`."""


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Where things are in one packed sequence of B * P + (tokens of all continuations).

    Prompts come first, each padded to P on the right; continuations follow without padding.
    ``prompts``: B. ``prompt_index``: (N,) the prompt of each continuation. ``slots``: (T - B * P,)
    the place of each continuation token in a padded, flat (N, C), ascending. ``width``: C.
    ``mask``: (N or 1, 1, C, P + C) bool, True where a continuation's token may look.
    ``group``: G if the prompts have G continuations each, in order, else 0.
    """

    prompts: int
    prompt_index: Tensor
    slots: Tensor
    width: int
    mask: Tensor
    group: int

    def copy_prompts(self, x: Tensor) -> Tensor:
        """(B, H, P, E) -> (N, H, P, E)."""
        if self.group:  # summing the copies' gradients is faster than adding at indices
            return x[:, None].expand(-1, self.group, -1, -1, -1).flatten(0, 1)
        return x.index_select(0, self.prompt_index)

    def pad(self, x: Tensor) -> Tensor:
        """(T - B * P, H, E) -> (N, H, C, E)."""
        rows = len(self.prompt_index)
        if len(x) < rows * self.width:
            x = x.new_zeros(rows * self.width, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (rows, -1)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(N, C, H, E) -> (T - B * P, H, E)."""
        x = x.flatten(0, 1)
        return x if len(x) == len(self.slots) else x.index_select(0, self.slots)


def use_prefixes(model: nn.Module) -> bool:
    """Let ``model``'s attention take a :class:`PrefixLayout`; False where it cannot.

    A decoder stack that computes with SDPA through transformers' attention interface can. It is
    switched over for good and computes as before whenever it gets no layout.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    if config._attn_implementation == "sdpa" and getattr(
        model, "_supports_attention_backend", False
    ):
        # Not for one call only: recomputed activations look it up in the backward pass.
        model.set_attn_implementation(NAME)
    return config._attn_implementation == NAME


def poison_mask(like: Tensor) -> Tensor:
    """(1, 1, 1, 2): a mask that fits no sequence of over two tokens. Given beside a layout, so that
    a layer which loses the layout on the way fails instead of attending to everything."""
    return torch.ones(1, 1, 1, 2, dtype=torch.bool, device=like.device)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query``, ``key``, ``value`` (1, H, T, E) -> (1, T, H, E); key and value may have fewer
    heads. Without ``prefix``, transformers' own SDPA on any shapes."""
    attend: Any = sdpa_attention_forward
    if prefix is None:
        return attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    sizes = [query.shape[2] - len(prefix.slots), len(prefix.slots)]  # B * P, and the rest
    heads = [x.transpose(1, 2)[0].split(sizes) for x in (query, key, value)]  # (., H, E) twice
    prompts = [x.unflatten(0, (prefix.prompts, -1)).transpose(1, 2) for x, _ in heads]
    out, _ = attend(module, *prompts, None, dropout, scaling, **kwargs)  # (B, P, H, E), causal
    flat = out.flatten(0, 1)
    if len(prefix.slots) == 0:
        return flat[None], None
    own = [prefix.pad(x) for _, x in heads]  # (N, H, C, E)
    keys, values = (
        torch.cat([prefix.copy_prompts(prompt), x], 2)
        for prompt, x in zip(prompts[1:], own[1:], strict=True)
    )  # (N, H, P + C, E)
    out, _ = attend(module, own[0], keys, values, prefix.mask, dropout, scaling, **kwargs)
    return torch.cat([flat, prefix.unpad(out)])[None], None


AttentionInterface.register(NAME, prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
