"""Attention within packed sequences: continuations of a shared prompt, and whole rows.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmemo.models.attention import flex
from mmemo.models.transformers_compat import attention_implementation, takes_attention

NAME = "mmemo_prefix"
"""Name of the attention implementation: SDPA that also takes a :class:`PrefixLayout`."""
FLEX = "mmemo_prefix_flex"
"""The same, where packed sequences are computed by FlexAttention if it can."""


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
    blocks: list[Any] = field(default_factory=list[Any], compare=False)
    """The block mask of FlexAttention, once a layer has made it for all."""

    def allowed(self) -> flex.Allowed:
        """What each token of the packed sequence may look at."""
        P = self.mask.shape[-1] - self.width
        rows = self.slots // self.width if self.width else self.slots
        prompt_of = torch.arange(self.prompts, device=self.slots.device).repeat_interleave(P)
        prompt_of = torch.cat([prompt_of, self.prompt_index[rows]])
        part = torch.cat([prompt_of.new_full((self.prompts * P,), -1), rows])
        lengths = prompt_of.new_full((self.prompts,), P)
        if len(self.mask) > 1:  # some prompts are padded
            real = self.mask[:, 0, 0, :P].sum(-1) if self.width else lengths[self.prompt_index]
            lengths = lengths.index_copy(0, self.prompt_index, real)
        return flex.prefix_allowed(self.prompts * P, lengths, prompt_of, part)

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


@dataclass(frozen=True, slots=True)
class RowsLayout:
    """The layout of whole rows that are packed one after the other, longest first, without padding.

    ``lengths``: tokens of each row, descending. ``slots``: (T,) as :func:`row_slots` gives it.
    """

    lengths: tuple[int, ...]
    slots: Tensor
    blocks: list[Any] = field(default_factory=list[Any], compare=False)
    """As of :class:`PrefixLayout`."""

    def allowed(self) -> flex.Allowed:
        """What each token of the packed sequence may look at."""
        each = torch.tensor(self.lengths, device=self.slots.device)
        return flex.rows_allowed(
            torch.arange(len(each), device=each.device).repeat_interleave(each)
        )


def row_spans(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(rows, width, tokens) of runs of rows that are attended to together, padded to the longest.

    No row is shorter than three quarters of its run's longest, so that little is padding.
    """
    spans: list[tuple[int, int, int]] = []
    for length in lengths:
        rows, width, tokens = spans[-1] if spans else (0, 0, 0)
        if not spans or 4 * length < 3 * width:
            spans.append((1, length, length))
        else:
            spans[-1] = (rows + 1, width, tokens + length)
    return spans


def row_slots(lengths: Sequence[int]) -> Tensor:
    """(T,) the place of each token in its run's padded, flat (rows, width)."""
    found: list[Tensor] = []
    left = list(lengths)
    for rows, width, _ in row_spans(lengths):
        found += [row * width + torch.arange(left[row]) for row in range(rows)]
        del left[:rows]
    return torch.cat(found)


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


def use_prefixes(model: nn.Module, *, by_flex: bool = False) -> bool:
    """Let a model's attention take :class:`PrefixLayout`, :class:`RowsLayout` and
    :class:`SharedPrompts`.

    ``by_flex``: compute packed sequences by FlexAttention where it can.

    Returns False if it cannot. A decoder stack that uses SDPA through transformers' attention
    interface can; it is switched permanently, and computes plain SDPA if it is given neither.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    if attention_implementation(config) == "sdpa" and takes_attention(model):
        # Permanent, because activation checkpointing looks it up again in the backward pass.
        model.set_attn_implementation(FLEX if by_flex else NAME)
    return attention_implementation(config) in (NAME, FLEX)


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
    prefix: PrefixLayout | RowsLayout | None = None,
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
    if isinstance(prefix, RowsLayout):
        return _attend_rows(module, (query, key, value), prefix, dropout, scaling, kwargs), None
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


def _attend_rows(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    layout: RowsLayout,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Query, key and value (1, H, T, E) -> (1, T, H, E): each row attends causally to itself."""
    attend: Any = sdpa_attention_forward
    found: list[Tensor] = []
    start = 0
    for rows, width, tokens in row_spans(layout.lengths):
        end, full = start + tokens, tokens == rows * width
        slots, padded = layout.slots[start:end], list[Tensor]()
        for x in heads:
            x = x[0, :, start:end].transpose(0, 1)  # (tokens, H, E)
            if not full:
                x = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, slots, x)
            padded.append(x.unflatten(0, (rows, width)).transpose(1, 2))  # (rows, H, width, E)
        # Padding comes last, so that the causal order alone hides it.
        out = attend(module, *padded, None, dropout, scaling, **kwargs)[0].flatten(0, 1)
        found.append(out if full else out.index_select(0, slots))
        start = end
    return torch.cat(found)[None]


def flex_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix: PrefixLayout | RowsLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As :func:`prefix_attention`, with packed sequences by FlexAttention where it can."""
    if prefix is None or not flex.usable(query, dropout):
        heads = (query, key, value)
        given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "prefix": prefix}
        return prefix_attention(module, *heads, attention_mask, **given, **kwargs)
    if not prefix.blocks:
        # Once for all layers: it costs a pass over all pairs.
        prefix.blocks.append(flex.blocks_of(prefix.allowed(), query.shape[2], query.device))
    return flex.attend(query, key, value, prefix.blocks[0], scaling), None


for _name, _attention in ((NAME, prefix_attention), (FLEX, flex_prefix_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
