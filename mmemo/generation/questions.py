"""Answers several questions about each clip greedily, with what their prompts begin with computed
once.

Prompts about one clip differ in their last tokens only. Their common beginning, which holds the
media, is one row of a packed sequence, and the rest of each prompt attends to it as a completion
does; then all answers are decoded together, each reading the beginning's keys and values in place.
No adapter is merged, so nothing but the order of sums differs from ordinary decoding.

B prompts, L tokens of the longest, K distinct beginnings, P tokens of the longest of them, S tokens
of the longest rest, T tokens of the packed sequence, R rows still in the batch, D hidden size, H
heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmemo.generation.decoder import Decoder, PreallocatedLayer, can_join, new_cache
from mmemo.generation.rollout import poll_of
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.routing import router_of
from mmemo.models.attention.fused import FusedLM, TokenStore, fuse
from mmemo.models.attention.shared_prefix import (
    PrefixLayout,
    SharedPrompts,
    poison_mask,
    use_prefixes,
)
from mmemo.models.backbone import Backbone, prompt_positions

_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "transformers_version"),
    # The caller of `generate` gives these.
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams"),
    *("max_length", "max_new_tokens", "no_repeat_ngram_size", "num_return_sequences"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}
"""Settings of a generation config that do not change greedy answers, or are followed here."""


def can_share(model: nn.Module) -> bool:
    """Whether :func:`answer_greedily` answers as the model's own ``generate`` does.

    It cannot with experts, which are chosen by whole prompts, with features that enter behind the
    first layers (a deepstack), with layers that forget tokens, with attention
    other than SDPA, or with a generation config that changes probabilities.
    """
    backbone: Any = unwrap(model)
    lm = getattr(backbone, "language_model", None)
    if lm is None or router_of(lm) is not None or not can_join(lm.config):
        return False
    if getattr(backbone, "deepstack", 0):
        return False
    config: Any = getattr(backbone, "generation_config", None)
    changed = {} if config is None else config.to_diff_dict()
    if any(name not in _HARMLESS and not name.startswith("_") for name in changed):
        return False
    return use_prefixes(lm)


def common_beginnings(prompts: Sequence[Sequence[int]], clips: Sequence[object]) -> list[int]:
    """Number of tokens that each prompt has in common with all others about the same clip, and
    always fewer than it has."""
    most: dict[object, tuple[Sequence[int], int]] = {}
    for prompt, clip in zip(prompts, clips, strict=True):
        first, size = most.get(clip, (prompt, len(prompt) - 1))
        size = min(size, len(prompt) - 1)
        same = next((at for at in range(size) if first[at] != prompt[at]), size)
        most[clip] = (first, same)
    return [most[clip][1] for clip in clips]


def plan_questions(
    prompts: Sequence[Sequence[int]], clips: Sequence[object], room: int, budget: int | None
) -> list[list[int]]:
    """Distribute prompts over batches of at most ``budget`` tokens, clip by clip in the order in
    which clips first occur. A prompt that exceeds the budget alone is a batch of its own.

    Args:
        prompts: token ids of each prompt.
        clips: the clip of each; equal ones share their beginning.
        room: maximum number of tokens of an answer.
        budget: maximum number of tokens of a batch, padding and answers included; None is no limit.
    """
    common = common_beginnings(prompts, clips)
    first: dict[object, int] = {}
    for row, clip in enumerate(clips):
        first.setdefault(clip, row)
    plan: list[list[int]] = []
    heads: set[object] = set()
    begin = rest = 0
    for row in sorted(range(len(prompts)), key=lambda row: (first[clips[row]], row)):
        own = len(prompts[row]) - common[row]
        more = heads | {clips[row]}
        longest, widest = max(begin, common[row]), max(rest, own)
        rows = len(plan[-1]) + 1 if plan else 1
        tokens = len(more) * longest + rows * (widest + room)
        if not plan or (budget is not None and tokens > budget):
            plan.append([])
            more, longest, widest = {clips[row]}, common[row], own
        heads, begin, rest = more, longest, widest
        plan[-1].append(row)
    return plan


@torch.inference_mode()
def answer_greedily(
    model: nn.Module,
    prompts: Mapping[str, Any],
    *,
    stops: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """The most likely tokens after each prompt, up to and with the first of ``stops``.

    Args:
        model: a model for which :func:`can_share`.
        prompts: a batch of :class:`~mmemo.data.collate.Collator` with ``generation=True`` on the
            model's device.
    """
    backbone = cast(Backbone, unwrap(model))
    fused = fuse(backbone.language_model, adapter=False)
    state = QuestionDecoder(backbone, prompts, max_new_tokens, fused=fused)
    device, total = state.logits.device, len(prompts["input_ids"])
    ends = torch.tensor(sorted(stops), dtype=torch.long, device=device)
    config: Any = getattr(backbone, "generation_config", None)
    never = torch.tensor(list(getattr(config, "suppress_tokens", None) or []), dtype=torch.long)
    never, poll = never.to(device), poll_of(device)
    ids = torch.full((total, max_new_tokens), -1, dtype=torch.long, device=device)
    rows, logits = state.order, state.logits  # (R,) prompt of each row
    for step in range(1, max_new_tokens + 1):
        if len(never):
            logits = logits.index_fill(1, never, -torch.inf)
        tokens = logits.argmax(-1)
        ids[:, step - 1].index_copy_(0, rows, tokens)
        if step == max_new_tokens:
            break
        if step % poll == 0:
            alive = ~torch.isin(ids.index_select(0, rows)[:, :step], ends).any(1)
            kept = alive.nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) < len(rows):
                state.keep(kept)
                rows, tokens = rows[kept], tokens[kept]
        logits = state.advance(tokens)
    return [_until(row, set(stops)) for row in ids.tolist()]


def _until(ids: list[int], stops: set[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


@dataclass(frozen=True, slots=True)
class _Split:
    """Prompts as beginnings and rests, sorted by beginning.

    ``order``: (B,) the prompt of each sorted row. ``owner``: (B,) the beginning of each, ascending.
    ``begin``: (K, P) places in a flat (B, L), padded on the right with ``mask`` (K, P) bool.
    ``rest``: (T - K P,) places of the rests' tokens. ``row``, ``column``: (T - K P,) row of each
    and its step. ``sizes``: (B,) tokens of each rest. ``width``: S.
    """

    order: Tensor
    owner: Tensor
    begin: Tensor
    mask: Tensor
    rest: Tensor
    row: Tensor
    column: Tensor
    sizes: Tensor
    width: int


def _split(prompts: Mapping[str, Any]) -> _Split:
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    device, length = ids.device, ids.shape[1]
    lists = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    given: Tensor | None = prompts.get("clip_index")
    clips: list[int] = list(range(len(ids))) if given is None else given.tolist()
    common = common_beginnings(lists, clips)
    order = sorted(range(len(ids)), key=lambda row: (clips[row], row))
    firsts = [at for at, row in enumerate(order) if at == 0 or clips[order[at - 1]] != clips[row]]
    counts = torch.tensor([*firsts[1:], len(order)]) - torch.tensor(firsts)
    owner = torch.arange(len(firsts)).repeat_interleave(counts)
    starts = torch.tensor([length - len(one) for one in lists])  # padding on the left
    shared = torch.tensor(common)
    heads = torch.tensor([order[at] for at in firsts])
    steps = torch.arange(max(1, int(shared.max())))
    begin_mask = steps < shared[heads][:, None]
    begin = (heads * length + starts[heads])[:, None] + steps * begin_mask
    at = torch.tensor(order)
    sizes = (length - starts - shared)[at]
    row = torch.arange(len(at)).repeat_interleave(sizes)
    column = torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row]
    rest = (at * length + length - sizes)[row] + column
    # Places are found on the CPU, since each read of a device would wait for it.
    return _Split(
        order=at.to(device),
        owner=owner.to(device),
        begin=begin.to(device),
        mask=begin_mask.to(device),
        rest=rest.to(device),
        row=row.to(device),
        column=column.to(device),
        sizes=sizes.to(device),
        width=int(sizes.max()),
    )


class QuestionDecoder(Decoder):
    """A :class:`Decoder` whose rows are prompts that share beginnings.

    ``order``: (B,) the prompt of each row.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Any],
        room: int,
        *,
        fused: FusedLM | None = None,
    ) -> None:
        self._backbone, self._lm = backbone, cast(Any, backbone.language_model)
        ids, kinds = prompts["input_ids"], prompts["modality_ids"]
        positions = prompt_positions(backbone, prompts)  # (B, L) or (3, B, L)
        embeds = backbone.embed(ids, kinds, prompts)  # (B, L, D)
        parts = _split(prompts)
        self.order = parts.order
        places = torch.cat([parts.begin.flatten(), parts.rest])  # (T,)
        packed = embeds.flatten(0, 1).index_select(0, places)[None]  # (1, T, D)
        at = positions.flatten(-2).index_select(-1, places)  # (T,) or (3, T)
        cache: Any = new_cache(self._lm.config)
        hidden = self._lm(
            inputs_embeds=packed,
            attention_mask=poison_mask(packed),
            position_ids=at.unsqueeze(-2),
            past_key_values=cache,
            use_cache=True,
            prefix=_layout(parts),
        ).last_hidden_state[0]  # (T, D)
        last = parts.begin.numel() + parts.sizes.cumsum(0) - 1
        self.logits = self._head(hidden.index_select(0, last))
        self._prompts = _shared(cache, parts, room)
        own = [_own(layer, parts) for layer in cache.layers]
        self.shared, self.fixed, self._fused, self._mask, self._route = (
            True,
            False,
            None,
            None,
            None,
        )
        self._cache = cache
        if fused is None:
            for index, (keys, values) in enumerate(own):
                cache.layers[index] = PreallocatedLayer(keys, values, room)
        else:
            self._fused = fused
            self._store = TokenStore(self._prompts, len(ids), parts.width + room)
            for index, (keys, values) in enumerate(own):
                self._store.fill(index, keys, values)
        latest = at.amax(0) if at.ndim == 2 else at
        self._positions = latest.index_select(0, last) + 1
        self._prompt_of, self._axes = parts.owner, 3 if positions.ndim == 3 else 0


def _layout(parts: _Split) -> PrefixLayout:
    steps = torch.arange(parts.width, device=parts.row.device)
    own = (steps[None, :] <= steps[:, None]).expand(len(parts.order), -1, -1)  # (B, S, S)
    seen = parts.mask[parts.owner][:, None].expand(-1, parts.width, -1)  # (B, S, P)
    return PrefixLayout(
        prompts=len(parts.begin),
        prompt_index=parts.owner,
        slots=parts.row * parts.width + parts.column,
        width=parts.width,
        mask=torch.cat([seen, own], 2)[:, None],
        group=0,
    )


def _shared(cache: Any, parts: _Split, room: int) -> SharedPrompts:
    """The beginnings of a packed cache, for as many rows as each has."""
    (count, length), rows = parts.begin.shape, len(parts.order)

    def begun(x: Tensor) -> Tensor:
        """(1, H, T, E) -> (K, H, P, E)."""
        return x[0, :, : count * length].unflatten(1, (count, length)).transpose(0, 1).contiguous()

    keys = [begun(layer.keys) for layer in cache.layers]
    values = [begun(layer.values) for layer in cache.layers]
    most = int(parts.owner.bincount().max())
    starts = torch.searchsorted(parts.owner, parts.owner)  # first row of each row's beginning
    found = SharedPrompts(keys, values, parts.mask, most)
    here = torch.arange(rows, device=starts.device)
    found.keep(parts.owner * most + here - starts)
    # Rests are padded on the left, so that answers follow them at once.
    bias = keys[0].new_zeros(rows, 1, 1, parts.width + room)
    padding = torch.arange(parts.width, device=starts.device) < (parts.width - parts.sizes)[:, None]
    bias[:, 0, 0, : parts.width].masked_fill_(padding, torch.finfo(bias.dtype).min)
    found.own_bias = bias
    return found


def _own(layer: Any, parts: _Split) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, S, E) of the rests, padded on the left with zeros."""
    rows, width = len(parts.order), parts.width
    slots = parts.row * width + (width - parts.sizes)[parts.row] + parts.column

    def placed(x: Tensor) -> Tensor:
        tokens = x[0, :, parts.begin.numel() :].transpose(0, 1)  # (T - K P, H, E)
        flat = tokens.new_zeros(rows * width, *tokens.shape[1:]).index_copy(0, slots, tokens)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)

    return placed(layer.keys), placed(layer.values)
