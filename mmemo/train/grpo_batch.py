"""Prompts and their completions as micro-batches of the update.

B prompts, P tokens of the longest, G completions of each, N = B * G completions prompt by prompt,
C tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmemo.rl.rollout import Rollouts
from mmemo.train.feed import Batch
from mmemo.train.packing import plan_packs

_PER_ROW = ("input_ids", "attention_mask", "modality_ids", "labels")


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of one micro-batch with their completions, before they are packed.

    ``prompts``: the collated batch on the model's device. ``mask``: (N, C) tokens that count in
    the loss; ``advantages``: (N,).
    """

    prompts: Mapping[str, Any]
    rollouts: Rollouts
    mask: Tensor
    advantages: Tensor

    @property
    def size(self) -> int:
        """G."""
        return len(self.mask) // len(self.prompts["input_ids"])


def select_prompts(prompts: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a collated batch, with the clips they need and no more padding than they need.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("select at least one prompt")
    device = prompts["input_ids"].device
    index = torch.tensor(list(rows), device=device)
    first = int(prompts["attention_mask"][index].any(0).int().argmax())
    chosen: dict[str, Any] = {
        name: prompts[name][index, first:] for name in _PER_ROW if name in prompts
    }
    clips: Tensor = prompts["clip_index"][index]
    used, places = clips[clips >= 0].unique(return_inverse=True)
    chosen["clip_index"] = clips.masked_scatter(clips >= 0, places)
    chosen["sample_ids"] = [prompts["sample_ids"][row] for row in rows]
    for name, value in prompts.items():
        if name not in chosen and isinstance(value, Tensor) and len(used):
            chosen[name] = value[used]
    return chosen


def update_batches(group: Group, kept: Sequence[int], budget: int | None) -> list[Batch]:
    """The prompts ``kept`` with their completions as micro-batches of at most ``budget`` tokens.

    A batch has the prompts' tensors, named in ``inputs``, ``completion_ids`` and
    ``completion_mask`` (N, C), ``loss_mask`` (N, C), ``prompt_index`` (N,), ``advantages`` (N,),
    and ``sample_ids``, N of them.
    """
    if not kept:
        return []
    prompt_sizes = group.prompts["attention_mask"].sum(1).tolist()
    sizes = group.rollouts.mask.view(-1, group.size, group.rollouts.mask.shape[1]).sum((1, 2))
    packs = [list(range(len(kept)))]
    if budget is not None:
        packs = plan_packs([prompt_sizes[b] for b in kept], sizes[list(kept)].tolist(), budget)
    return [_batch(group, [kept[at] for at in pack]) for pack in packs]


def _batch(group: Group, rows: Sequence[int]) -> Batch:
    G, device = group.size, group.mask.device
    prompts = select_prompts(group.prompts, rows)
    at = torch.tensor([row * G + copy for row in rows for copy in range(G)], device=device)
    width = max(1, int(group.rollouts.mask[at].sum(1).max()))
    return {
        **prompts,
        "inputs": [name for name, value in prompts.items() if isinstance(value, Tensor)],
        "completion_ids": group.rollouts.ids[at, :width],
        "completion_mask": group.rollouts.mask[at, :width],
        "loss_mask": group.mask[at, :width],
        "prompt_index": torch.arange(len(rows), device=device).repeat_interleave(G),
        "advantages": group.advantages[at],
        "sample_ids": [name for name in prompts["sample_ids"] for _ in range(G)],
    }


def idle_batch(prompts: Mapping[str, Any], token: int) -> Batch:
    """What a rank computes that has nothing to learn from in a step: one token, which counts
    nothing."""
    device = prompts["input_ids"].device
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    rollouts = Rollouts(one * token, one, torch.zeros(1, 1, device=device), one[0].bool(), [""])
    first = select_prompts(prompts, [0])
    return _batch(Group(first, rollouts, one, torch.zeros(1, device=device)), [0])
