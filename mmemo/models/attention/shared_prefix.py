"""Attention of continuations to their shared prompt, without attending to each other.

A block mask over the packed sequence is correct but wasteful: most scores of a row belong to tokens
that must not attend to each other. Here prompts attend causally to themselves, and each
continuation attends to its prompt and itself, so that only allowed scores are computed. During
generation, all rows of a prompt read its keys and values in place, without copying them per row.

Shapes: B prompts, P tokens of the longest, N continuations, C tokens of the longest, T tokens of
the packed sequence, H heads, E width of a head. Generation: R rows, S the most rows of a prompt, c
tokens of each, Q query heads, r of them to a head of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmemo.models.transformers_compat import attention_implementation, takes_attention

NAME = "mmemo_prefix"
"""Name of the attention implementation: SDPA that also takes a :class:`PrefixLayout`."""


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """The layout of one packed sequence of B * P + (tokens of all continuations) tokens.

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
        if self.group:  # the gradient of expand, a sum, is faster than that of index_select
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


class SharedPrompts:
    """Keys and values of B prompts, shared by R rows that continue them token by token.

    One softmax covers a row's scores on its prompt and on its own tokens. The rows of a prompt are
    queries of one matrix product, so a prompt's keys are read once for all of them.

    Args:
        keys: (B, H, P, E) of each layer.
        values: likewise.
        mask: (B, P), non-zero for the prompts' tokens.
        group: rows of each prompt, prompt by prompt.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, group: int
    ) -> None:
        self.keys, self.values, self._group = list(keys), list(values), group
        self._mask = None if bool(mask.all()) else mask
        self._prompts = torch.arange(len(mask), device=mask.device).repeat_interleave(group)  # (R,)
        self.own_bias: Tensor | None = None
        """(R, 1, 1, c or more), added to the scores of the rows' own tokens."""
        self._slots: Tensor | None = None  # (R,) places in a flat (B, S); None: they fill it
        self._lay_out()

    def _lay_out(self) -> None:
        # As batched products take them, with rows and heads in one dimension.
        self._turned = [layer.flatten(0, 1).transpose(1, 2) for layer in self.keys]  # (B H, E, P)
        self._flat = [layer.flatten(0, 1) for layer in self.values]  # (B H, P, E)
        self._bias: Tensor | None = None  # (B H, 1, P)
        if self._mask is not None:
            low = torch.finfo(self.keys[0].dtype).min
            bias = torch.zeros_like(self._mask, dtype=self.keys[0].dtype)
            bias = bias.masked_fill(self._mask == 0, low)
            self._bias = bias.repeat_interleave(self.keys[0].shape[1], 0)[:, None]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (R,), which must be in the order of prompts."""
        left, self._prompts, counts = self._prompts[rows].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        # The prompts' keys are copied only when a prompt has lost its last row.
        if len(left) < len(self.keys[0]):
            for layers in (self.keys, self.values):
                layers[:] = [layer[left] for layer in layers]
            self._mask = None if self._mask is None else self._mask[left]
            self._lay_out()
        self._group = int(counts.max())
        starts = counts.cumsum(0) - counts
        at = torch.arange(len(rows), device=rows.device) - starts[self._prompts]
        self.own_bias = None if self.own_bias is None else self.own_bias[rows]
        full = len(rows) == len(left) * self._group
        self._slots = None if full else self._prompts * self._group + at

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``query`` (R, Q, 1, E), ``key`` and ``value`` (R, H, c, E) -> (R, 1, Q, E).

        ``bias``: (1, 1, 1, c), added to the scores of the rows' own tokens.
        """
        rows, heads, own_tokens, width = key.shape
        factor: float = width**-0.5 if scaling is None else scaling
        # Scaling the query touches fewer values than scaling its scores on P + c keys.
        asked = (query * factor).view(rows, heads, -1, width)  # (R, H, r, E)
        each = asked.shape[2]
        prompt = torch.bmm(self._gather(asked), self._turned[layer])  # (B H, S r, P)
        if self._bias is not None:
            prompt = prompt + self._bias
        keys = key.view(rows * heads, own_tokens, width)
        own = torch.bmm(asked.view(rows * heads, each, width), keys.transpose(1, 2))
        own = own.view(rows, heads, each, own_tokens)
        if self.own_bias is not None:
            own = own + self.own_bias[..., :own_tokens]
        own = self._gather(own if bias is None else own + bias)  # (B H, S r, c)
        weights = torch.cat([prompt, own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        tokens = prompt.shape[-1]
        out = self._scatter(torch.bmm(weights[..., :tokens], self._flat[layer]), heads, each)
        own = self._scatter(weights[..., tokens:], heads, each)  # (R, H, r, c)
        values = value.view(rows * heads, own_tokens, width)
        spoken = torch.bmm(own.reshape(rows * heads, each, own_tokens), values)
        return (out + spoken.view(out.shape)).reshape(rows, 1, -1, width)

    def _gather(self, x: Tensor) -> Tensor:
        """(R, H, r, ?) -> (B H, S r, ?)."""
        _, heads, each, last = x.shape
        if self._slots is not None:
            # Free slots are zero queries whose results nobody reads: with S rows for every prompt,
            # one product serves all.
            slots = len(self.keys[0]) * self._group
            x = x.new_zeros(slots, heads, each, last).index_copy(0, self._slots, x)
        x = x.view(-1, self._group, heads, each, last).transpose(1, 2)
        return x.reshape(-1, self._group * each, last)

    def _scatter(self, x: Tensor, heads: int, each: int) -> Tensor:
        """(B H, S r, ?) -> (R, H, r, ?)."""
        x = x.view(-1, heads, self._group, each, x.shape[-1]).transpose(1, 2)
        x = x.reshape(-1, heads, each, x.shape[-1])
        return x if self._slots is None else x.index_select(0, self._slots)


def use_prefixes(model: nn.Module) -> bool:
    """Let a model's attention take :class:`PrefixLayout` and :class:`SharedPrompts`.

    Returns False if it cannot. A decoder stack that uses SDPA through transformers' attention
    interface can; it is switched permanently, and computes plain SDPA if it is given neither.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    if attention_implementation(config) == "sdpa" and takes_attention(model):
        # Permanent, because activation checkpointing looks it up again in the backward pass.
        model.set_attn_implementation(NAME)
    return attention_implementation(config) == NAME


def poison_mask(like: Tensor) -> Tensor:
    """A mask (1, 1, 1, 2) that fits no sequence of more than two tokens.

    It is passed with a layout, so that a layer that loses the layout fails instead of attending to
    everything.
    """
    return torch.ones(1, 1, 1, 2, dtype=torch.bool, device=like.device)


def poison_step(like: Tensor) -> Tensor:
    """A mask (1, 1, 2, 1) that does the same for single tokens with :class:`SharedPrompts`."""
    return torch.ones(1, 1, 2, 1, dtype=torch.bool, device=like.device)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix: PrefixLayout | None = None,
    prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query``, ``key``, ``value`` (1, H, T, E) -> (1, T, H, E); key and value may have fewer
    heads. With ``prompts``, as :meth:`SharedPrompts.attend`. With neither, transformers' own SDPA
    on any shapes."""
    if prompts is not None:
        layer: Any = module.layer_idx
        return prompts.attend(layer, query, key, value, scaling), None
    attend: Any = sdpa_attention_forward
    if prefix is None:
        return attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    sizes = [query.shape[2] - len(prefix.slots), len(prefix.slots)]  # B * P, and the rest
    heads = [x.transpose(1, 2)[0].split(sizes) for x in (query, key, value)]  # (., H, E) twice
    shared = [x.unflatten(0, (prefix.prompts, -1)).transpose(1, 2) for x, _ in heads]
    # Prompts are padded on the right, so that the causal order alone hides the padding.
    out, _ = attend(module, *shared, None, dropout, scaling, **kwargs)  # (B, P, H, E), causal
    flat = out.flatten(0, 1)
    if len(prefix.slots) == 0:
        return flat[None], None
    own = [prefix.pad(x) for _, x in heads]  # (N, H, C, E)
    keys, values = (
        torch.cat([prefix.copy_prompts(prompt), x], 2)
        for prompt, x in zip(shared[1:], own[1:], strict=True)
    )  # (N, H, P + C, E)
    out, _ = attend(module, own[0], keys, values, prefix.mask, dropout, scaling, **kwargs)
    return torch.cat([flat, prefix.unpad(out)])[None], None


AttentionInterface.register(NAME, prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
