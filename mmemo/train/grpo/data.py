"""The prompts of a GRPO run: which of them each step, generation and resampling uses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.train.dataloader import Batch
from mmemo.train.stage import Rows

_PER_ROW = ("input_ids", "attention_mask", "modality_ids", "labels", "mrope_positions")


def select_prompts(prompts: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a collated batch, with only the clips and the padding that they need.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("select at least one prompt")
    device = prompts["input_ids"].device
    index = torch.tensor(list(rows), device=device)
    # Padding is on the left; columns that are padding in all chosen rows are dropped.
    first = int(prompts["attention_mask"][index].any(0).int().argmax())
    chosen: dict[str, Any] = {
        name: prompts[name][index][..., first:] for name in _PER_ROW if name in prompts
    }
    clips: Tensor = prompts["clip_index"][index]
    # Only clips that are used stay, so those that remain get new indices.
    used, places = clips[clips >= 0].unique(return_inverse=True)
    chosen["clip_index"] = clips.masked_scatter(clips >= 0, places)
    chosen["sample_ids"] = [prompts["sample_ids"][row] for row in rows]
    for name, value in prompts.items():
        if name not in chosen and isinstance(value, Tensor) and len(used):
            chosen[name] = value[used]
    return chosen


class GrpoData:
    """The prompts of a run. ``batch_size`` of them make one optimizer step over all ranks.

    ``together`` steps of an epoch in a row, or what is left of it, make a generation: their
    completions are generated at once, and all of them are taken ``repeats`` times.
    """

    def __init__(
        self,
        rows: Rows,
        collator: Collator,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
        *,
        together: int,
        repeats: int,
        kept_batches: int,
    ) -> None:
        """``kept_batches``: so many micro-batches are kept, so that those of a generation, which
        several steps ask for, are collated once."""
        self.rows, self.collator, self.curriculum = rows, collator, curriculum
        self.batch_size, self.seed = batch_size, seed
        self.together, self.repeats = together, repeats
        self._last: OrderedDict[tuple[int, ...], Batch] = OrderedDict()
        self._most = kept_batches
        # The thread that prefetches and the training loop collate at the same time.
        self._lock = threading.Lock()

    def plan(self, epoch: int) -> list[list[int]]:
        return [
            rows
            for generation in self._generations(epoch)
            for _ in range(self.repeats)
            for rows in generation
        ]

    def generation(self, epoch: int, batch: int) -> list[list[int]]:
        """The rows of each step of the generation that the ``batch``-th step of ``epoch`` uses."""
        return self._generations(epoch)[batch // (self.together * self.repeats)]

    def further(self, epoch: int, batch: int) -> list[int]:
        """The epoch's rows that :meth:`generation` does not use, in the order of the epoch: first
        those that come after it, then those before.

        They keep their own turn in the epoch, so that which prompts a step plans does not depend on
        what earlier steps drew, and a resumed run needs no record of it.
        """
        generations = self._generations(epoch)
        place = batch // (self.together * self.repeats)
        used = {row for rows in generations[place] for row in rows}
        others = [*generations[place + 1 :], *generations[:place]]
        found = (row for generation in others for rows in generation for row in rows)
        return [row for row in dict.fromkeys(found) if row not in used]

    def collate(self, rows: Sequence[int]) -> Batch:
        key = tuple(rows)
        with self._lock:
            if key not in self._last:
                samples = [self.rows.kept[row] for row in rows]
                self._last[key] = self.collator(samples, generation=True)
            while len(self._last) > self._most:
                self._last.popitem(last=False)
            return self._last[key]

    def _generations(self, epoch: int) -> list[list[list[int]]]:
        planned = plan_epoch(
            self.rows.kept, self.curriculum, self.rows.lengths, self.batch_size, self.seed, epoch
        )
        return [planned[at : at + self.together] for at in range(0, len(planned), self.together)]
