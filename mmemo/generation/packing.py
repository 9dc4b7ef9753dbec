"""Packs prompts and their continuations, or whole rows, into one sequence.

In ``[P1 | P2 | ... | c1 | c2 | ...]``, a continuation attends to its own prompt and itself, and its
positions continue from the prompt's.

B prompts, P tokens of the longest, N continuations (G of each prompt in GRPO), C tokens of the
longest, T tokens of the packed sequence, K scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmemo.models.attention.shared_prefix import PrefixLayout, RowsLayout, row_slots
from mmemo.models.backbone import TEXT, Backbone, prompt_positions

REAL: ContextVar[Tensor | None] = ContextVar("real", default=None)
"""(1, T) bool while a packed sequence with shared prompts is computed: its tokens that are no
padding, for what counts tokens inside the language model."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts and continuations as one sequence. It lacks the last token of each continuation,
    which predicts nothing.

    ``prompt_ids``, ``prompt_mask``, ``prompt_modality_ids``: (B, P), padded on the right.
    ``continuation_ids``: (1, T - B * P). ``modality_ids``: (1, T). ``position_ids``: (1, T), or
    (3, 1, T) for M-RoPE. ``owner``: (2, T), each token's prompt and its continuation (-1 for tokens
    of prompts). ``predictors``: (K,) index of the token whose hidden state predicts a scored token.
    ``targets``: (K,) the scored tokens. ``slots``: (K,) their indices in a flattened (N, C).
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
    """Pack prompts and continuations; the arguments are those of
    :func:`~mmemo.generation.logprobs.packed_logps`."""
    ids, kinds, mask = prompt_tensors(prompts)
    # With real tokens first, causal attention alone keeps padding out of every prompt.
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    ids, kinds, mask = (x.gather(1, order) for x in (ids, kinds, mask))
    (B, P), device = ids.shape, ids.device
    positions = prompt_positions(backbone, prompts)  # (B, P) or (3, B, P), in the batch's own order
    positions = positions.gather(-1, order.expand(*positions.shape[:-2], -1, -1))
    following = positions.masked_fill(~mask, -1).amax(-1) + 1  # (B,) or (3, B)
    # M-RoPE's three positions differ inside media; text goes on after the largest of them.
    following = following.amax(0) if following.ndim == 2 else following
    lengths = continuation_mask.long().sum(1)  # (N,)
    # The last token of a continuation predicts nothing; an empty continuation has no token at all.
    inputs = (lengths - 1).clamp(min=0)
    steps = torch.arange(continuation_ids.shape[1], device=device)
    # (T - B * P,) each: the continuation and the step of every packed token.
    rows, columns = (steps < inputs[:, None]).nonzero(as_tuple=True)
    starts = inputs.cumsum(0) - inputs  # (N,) among the continuations' tokens
    text_at = following[prompt_index][rows] + columns
    flat = positions.flatten(-2)  # (B * P,) or (3, B * P)
    # M-RoPE gives text one number on all three axes.
    text_at = text_at.expand(*flat.shape[:-1], -1)
    last = prompt_index * P + mask.sum(1)[prompt_index] - 1  # (N,)
    # (K,) each: the continuation and the step of every scored token.
    scored = (steps < lengths[:, None]).nonzero(as_tuple=True)
    # A token is predicted by the one before it, the first one by its prompt's last token.
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


def real_tokens(packed: Packed) -> Tensor:
    """(1, T) bool: the tokens of the packed sequence that are no padding."""
    behind = torch.ones_like(packed.continuation_ids, dtype=torch.bool)
    return torch.cat([packed.prompt_mask.flatten()[None], behind], 1)


def _layout(
    mask: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor, prompt_index: Tensor
) -> PrefixLayout:
    """The layout for attention that shares prefixes.

    Args:
        mask: (B, P) mask of the prompts.
        inputs: (N,) number of packed tokens of each continuation.
        rows: continuation of each packed token.
        columns: step of each packed token within its continuation.
        prompt_index: (N,).
    """
    width = int(inputs.max())
    steps = torch.arange(width, device=mask.device)
    own = steps[None, :] <= steps[:, None]  # (C, C)
    # A continuation's padding follows all tokens that it may attend to, so only prompts differ.
    prompt_mask = mask[:1] if bool(mask.all()) else mask[prompt_index]
    to_prompt = prompt_mask[:, None, :].expand(-1, width, -1)
    to_itself = own.expand(len(prompt_mask), -1, -1)
    group = len(prompt_index) // len(mask)
    # In a regular order the attention expands prompts, which is faster than gathering them.
    regular = torch.arange(len(mask), device=mask.device).repeat_interleave(group)
    return PrefixLayout(
        prompts=len(mask),
        prompt_index=prompt_index,
        slots=rows * width + columns,
        width=width,
        mask=torch.cat([to_prompt, to_itself], 2)[:, None],
        group=group if torch.equal(regular, prompt_index) else 0,
    )


def block_mask(packed: Packed) -> Tensor:
    """(1, 1, T, T) bool attention mask, for attention without support for shared prefixes."""
    prompt, part = packed.owner
    real = torch.cat([packed.prompt_mask.flatten(), torch.ones_like(part[part >= 0]).bool()])
    own = (part[None, :] == -1) | (part[None, :] == part[:, None])
    allowed = (prompt[None, :] == prompt[:, None]) & own & real[None, :]
    length = len(part)
    # Padding attends to itself, so that no softmax is over an empty set.
    allowed = allowed.tril() | torch.eye(length, dtype=torch.bool, device=part.device)
    return allowed[None, None]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Whole rows as one sequence without padding, the longest first; positions restart in each.

    ``places``: (T,) the place of each packed token in the flattened (B, L). ``layout``: for the
    attention. The batch stays as it is, since it is embedded row by row.
    """

    places: Tensor
    layout: RowsLayout


def pack_rows(mask: Tensor) -> PackedRows:
    """Pack the tokens of rows with an attention mask (B, L), on the CPU."""
    lengths = mask.bool().sum(1)
    order = lengths.argsort(descending=True, stable=True)
    places = [row * mask.shape[1] + mask[row].nonzero().squeeze(1) for row in order.tolist()]
    sizes = tuple(lengths[order].tolist())
    return PackedRows(torch.cat(places), RowsLayout(sizes, row_slots(sizes)))


def packed_places(packed: PackedRows, at: Tensor, size: int) -> Tensor:
    """Where tokens are in the packed sequence that are ``at`` (K,) in the flattened (B, L) of
    ``size`` = B * L places."""
    found = torch.full((size,), -1)
    return found.index_copy(0, packed.places, torch.arange(len(packed.places)))[at]


def rows_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(1, 1, T, T) bool attention mask of packed rows, for attention without support for them."""
    each = torch.tensor(lengths, device=device)
    owner = torch.arange(len(each), device=device).repeat_interleave(each)
    return (owner[:, None] == owner).tril()[None, None]


def fill_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute rows over packs of at most ``budget`` tokens, first fit from the longest on.

    A row that exceeds the budget alone is a pack of its own.

    Returns:
        The rows' indices by pack, the longest first; each row occurs once.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = next((n for n, left in enumerate(room) if lengths[row] <= left), None)
        if place is None:
            packs.append([row])
            room.append(budget - lengths[row])
        else:
            packs[place].append(row)
            room[place] -= lengths[row]
    return packs


def plan_packs(
    prompts: Sequence[int], continuations: Sequence[int], budget: int
) -> list[list[int]]:
    """Distribute groups over micro-batches of at most ``budget`` tokens, longest prompts first.

    Groups are never split; one that exceeds the budget alone is a micro-batch of its own.

    Args:
        prompts: number of tokens of each group's prompt.
        continuations: number of tokens of all of its continuations together.
        budget: maximum number of tokens of a micro-batch, including padding of prompts.

    Returns:
        The groups' indices by micro-batch; each group occurs once.
    """
    plan: list[list[int]] = []
    width = used = 0
    # A micro-batch pads its prompts to the first, so the longest come first and like lengths meet.
    for group in sorted(range(len(prompts)), key=lambda g: (-prompts[g], g)):
        used += continuations[group]
        if not plan or (len(plan[-1]) + 1) * width + used > budget:
            plan.append([])
            width, used = prompts[group], continuations[group]
        plan[-1].append(group)
    return plan


def prompt_tensors(prompts: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``modality_ids`` and the attention mask as bool, all (B, P)."""
    ids: Tensor = prompts["input_ids"]
    mask: Tensor | None = prompts.get("attention_mask")
    kinds: Tensor | None = prompts.get("modality_ids")
    kinds = torch.full_like(ids, TEXT) if kinds is None else kinds
    return ids, kinds, torch.ones_like(ids).bool() if mask is None else mask.bool()


def check_shapes(prompts: int, ids: Tensor, mask: Tensor, prompt_index: Tensor) -> None:
    """Check the shapes of continuations, their mask and their prompt index.

    Raises:
        ValueError: they do not match, or a continuation has padding before a token.
    """
    if ids.ndim != 2 or mask.shape != ids.shape or prompt_index.shape != ids.shape[:1]:
        raise ValueError(
            f"continuations {tuple(ids.shape)}, their mask {tuple(mask.shape)} and prompt_index "
            f"{tuple(prompt_index.shape)} do not match"
        )
    if len(ids) == 0 or int(prompt_index.min()) < 0 or int(prompt_index.max()) >= prompts:
        raise ValueError(f"prompt_index must name one of {prompts} prompts for each continuation")
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError("a continuation has padding before a token; padding comes last")
