"""Prompts and their continuations as one sequence, each prompt in it once.

``[P1 | P2 | ... | c1 | c2 | ...]``: a continuation sees its own prompt and itself, and its
positions go on where the prompt's end.

Shapes: B prompts, P tokens of the longest, N continuations (G for each prompt in GRPO), C tokens of
the longest, T tokens of the packed sequence, K scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmemo.models.attention.shared_prefix import PrefixLayout
from mmemo.models.backbone import TEXT, Backbone


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts and continuations as one sequence. The last token of a continuation is not in it:
    it predicts nothing.

    ``prompt_ids``, ``prompt_mask``, ``prompt_modality_ids``: (B, P), padded on the right.
    ``continuation_ids``: (1, T - B * P). ``modality_ids``: (1, T). ``position_ids``: (1, T), or
    (3, 1, T) for M-RoPE. ``owner``: (2, T), the prompt of each token and its continuation, -1 in a
    prompt. ``predictors``: (K,) the token whose hidden state predicts a scored one; ``targets``:
    (K,) the scored ones; ``slots``: (K,) their places in a flat (N, C).
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_modality_ids: Tensor
    continuation_ids: Tensor
    modality_ids: Tensor
    position_ids: Tensor
    owner: Tensor
    layout: PrefixLayout
    predictors: Tensor
    targets: Tensor
    slots: Tensor


def pack(
    backbone: Backbone,
    prompts: Mapping[str, Any],
    continuation_ids: Tensor,
    continuation_mask: Tensor,
    prompt_index: Tensor,
) -> Packed:
    """Lay prompts and continuations out; arguments as in :func:`packed_logps`."""
    ids, kinds, mask = prompt_tensors(prompts)
    # Real tokens first: causal attention alone then keeps padding out of every prompt.
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    ids, kinds, mask = (x.gather(1, order) for x in (ids, kinds, mask))
    (B, P), device = ids.shape, ids.device
    positions = backbone.positions(ids, mask.long(), prompts)  # (B, P) or (3, B, P)
    following = positions.masked_fill(~mask, -1).amax(-1) + 1  # (B,) or (3, B)
    following = following.amax(0) if following.ndim == 2 else following
    lengths = continuation_mask.long().sum(1)  # (N,)
    inputs = (lengths - 1).clamp(min=0)
    steps = torch.arange(continuation_ids.shape[1], device=device)
    rows, columns = (steps < inputs[:, None]).nonzero(as_tuple=True)
    starts = inputs.cumsum(0) - inputs  # (N,) among the continuations' tokens
    text_at = following[prompt_index][rows] + columns
    flat = positions.flatten(-2)  # (B * P,) or (3, B * P)
    text_at = text_at.expand(*flat.shape[:-1], -1)
    last = prompt_index * P + mask.sum(1)[prompt_index] - 1  # (N,)
    scored = (steps < lengths[:, None]).nonzero(as_tuple=True)
    inside = B * P + starts[scored[0]] + scored[1] - 1
    prompt_of = torch.arange(B, device=device).repeat_interleave(P)
    return Packed(
        prompt_ids=ids,
        prompt_mask=mask,
        prompt_modality_ids=kinds,
        continuation_ids=continuation_ids[rows, columns][None],
        modality_ids=torch.cat([kinds.flatten(), torch.full_like(rows, TEXT)])[None],
        position_ids=torch.cat([flat, text_at], -1).unsqueeze(-2),
        owner=torch.stack(
            [
                torch.cat([prompt_of, prompt_index[rows]]),
                torch.cat([torch.full_like(prompt_of, -1), rows]),
            ]
        ),
        layout=_layout(mask, inputs, rows, columns, prompt_index),
        predictors=torch.where(scored[1] == 0, last[scored[0]], inside),
        targets=continuation_ids[scored],
        slots=scored[0] * continuation_ids.shape[1] + scored[1],
    )


def _layout(
    mask: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor, prompt_index: Tensor
) -> PrefixLayout:
    """From the prompts' mask (B, P), the number of tokens that are put in of each continuation
    (N,), and the continuation and step of each of them."""
    width = int(inputs.max())
    steps = torch.arange(width, device=mask.device)
    own = steps[None, :] <= steps[:, None]  # (C, C)
    # Padding of a continuation comes after all that its tokens may see: only prompts differ.
    seen = mask[:1] if bool(mask.all()) else mask[prompt_index]
    looks = [seen[:, None, :].expand(-1, width, -1), own.expand(len(seen), -1, -1)]
    group = len(prompt_index) // len(mask)
    regular = torch.arange(len(mask), device=mask.device).repeat_interleave(group)
    return PrefixLayout(
        prompts=len(mask),
        prompt_index=prompt_index,
        slots=rows * width + columns,
        width=width,
        mask=torch.cat(looks, 2)[:, None],
        group=group if torch.equal(regular, prompt_index) else 0,
    )


def block_mask(packed: Packed) -> Tensor:
    """(1, 1, T, T) bool: who sees whom, for attention that knows nothing of prefixes."""
    prompt, part = packed.owner
    real = torch.cat([packed.prompt_mask.flatten(), torch.ones_like(part[part >= 0]).bool()])
    mine = (part[None, :] == -1) | (part[None, :] == part[:, None])
    allowed = (prompt[None, :] == prompt[:, None]) & mine & real[None, :]
    length = len(part)
    # Padding sees itself, so that no softmax is over nothing.
    allowed = allowed.tril() | torch.eye(length, dtype=torch.bool, device=part.device)
    return allowed[None, None]


def plan_packs(
    prompts: Sequence[int], continuations: Sequence[int], budget: int
) -> list[list[int]]:
    """Groups to micro-batches of at most ``budget`` tokens, longest prompts first.

    A group is never cut: one that is over the budget alone is a micro-batch of its own.

    Args:
        prompts: tokens of each group's prompt.
        continuations: tokens of all of its continuations together.

    Returns:
        Indices of groups; each group once.
    """
    plan: list[list[int]] = []
    width = used = 0
    for group in sorted(range(len(prompts)), key=lambda g: (-prompts[g], g)):
        used += continuations[group]
        if not plan or (len(plan[-1]) + 1) * width + used > budget:
            plan.append([])
            width, used = prompts[group], continuations[group]
        plan[-1].append(group)
    return plan


def prompt_tensors(prompts: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``modality_ids`` and the mask as bool, all (B, P)."""
    ids: Tensor = prompts["input_ids"]
    mask: Tensor | None = prompts.get("attention_mask")
    kinds: Tensor | None = prompts.get("modality_ids")
    kinds = torch.full_like(ids, TEXT) if kinds is None else kinds
    return ids, kinds, torch.ones_like(ids).bool() if mask is None else mask.bool()


def check_shapes(prompts: int, ids: Tensor, mask: Tensor, prompt_index: Tensor) -> None:
    """Raises:
    ValueError: continuations, mask and index do not fit, or padding stands before a token.
    """
    if ids.ndim != 2 or mask.shape != ids.shape or prompt_index.shape != ids.shape[:1]:
        raise ValueError(
            f"continuations {tuple(ids.shape)}, their mask {tuple(mask.shape)} and prompt_index "
            f"{tuple(prompt_index.shape)} do not fit together"
        )
    if len(ids) == 0 or int(prompt_index.min()) < 0 or int(prompt_index.max()) >= prompts:
        raise ValueError(f"prompt_index must name one of {prompts} prompts for each continuation")
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError("a continuation has padding before a token; padding comes last")
