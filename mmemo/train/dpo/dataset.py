"""The pairs of a preference run: their lengths, their batches, where their references are.

B pairs, C tokens of the batch's longest answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmemo.console import console
from mmemo.data.collate import Collator, Outline, check_lengths
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import QUERIES, Preference
from mmemo.errors import ConfigError
from mmemo.losses.objective import AnswerKey, Branch, BuiltTerm, Needed
from mmemo.models.build import Loaded
from mmemo.train.dataloader import Batch
from mmemo.train.dpo.batch import Measured, PairBatcher, count_pairs, has_branch, presence
from mmemo.train.dpo.reference_store import References
from mmemo.train.stage import stage_samples


class DpoData:
    """The pairs of a run. ``batch_size`` of them make one optimizer step, over all ranks."""

    def __init__(
        self,
        pairs: Sequence[Preference],
        measured: Sequence[Measured],
        batcher: PairBatcher,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
        *,
        alternate: bool = False,
        live: bool = False,
        references: References | None = None,
    ) -> None:
        """
        Args:
            alternate: make each batch of one channel's questions.
            live: give each batch what a live reference is computed on.
            references: where each batch's reference log-probabilities are read; they must be
                stored before the first batch is made.
        """
        self.pairs, self.measured, self.batcher = pairs, measured, batcher
        self.curriculum, self.batch_size, self.seed = curriculum, batch_size, seed
        self.alternate, self.live = alternate, live
        self.references = references
        self.lengths = [one.prompt + sum(one.answers.values()) for one in measured]

    def plan(self, epoch: int) -> list[list[int]]:
        """Batches of rows; with ``alternate``, each of one channel's questions."""
        if not self.alternate:
            return self._plan(range(len(self.pairs)), epoch)
        queries = [
            [row for row, pair in enumerate(self.pairs) if pair.query == query] for query in QUERIES
        ]
        return list(_spread([self._plan(rows, epoch) for rows in queries if rows]))

    def _plan(self, rows: Sequence[int], epoch: int) -> list[list[int]]:
        samples = [self.pairs[row].sample for row in rows]
        lengths = [self.lengths[row] for row in rows]
        planned = plan_epoch(samples, self.curriculum, lengths, self.batch_size, self.seed, epoch)
        return [[rows[at] for at in batch] for batch in planned]

    def collate(self, rows: Sequence[int]) -> Batch:
        batch = self.batcher([self.pairs[row] for row in rows], reference=self.live)
        if self.references is not None:
            batch["reference"] = self._stored(rows, self.references)
        return batch

    def _stored(self, rows: Sequence[int], references: References) -> dict[AnswerKey, Tensor]:
        """(B, C) by place."""
        width = max(n for row in rows for n in self.measured[row].answers.values())
        found: dict[AnswerKey, Tensor] = {}
        for at, row in enumerate(rows):
            for place, key in references.keys(self.reference_digests(row)).items():
                logps = references.get(key)
                whole = found.setdefault(place, torch.zeros(len(rows), width))
                whole[at, : len(logps)] = logps
        return found

    def seen(self, row: int) -> dict[Branch, str]:
        """Addresses of what each branch of a pair shows."""
        pair = self.pairs[row]
        found: dict[Branch, str] = {}
        for one in self.batcher.wanted:
            if one.branch not in found and has_branch(pair, one.branch):
                found[one.branch] = self.batcher.seen(pair, one.branch)
        return found

    def reference_digests(self, row: int) -> dict[AnswerKey, tuple[str, str]]:
        """The digests of a pair's tokens and of its inputs, for each of its log-probabilities under
        the reference: what :meth:`References.keys` makes their addresses of."""
        pair, measured, seen = self.pairs[row], self.measured[row], self.seen(row)
        return {
            one.place: (measured.marks[one.branch == "text", one.answer], seen[one.branch])
            for one in self.batcher.wanted
            if one.reference and one.answer in pair.answers and one.branch in seen
        }

    def answer_lengths(self, row: int) -> dict[AnswerKey, int]:
        """Tokens of the answers."""
        lengths = self.measured[row].answers
        return {p.place: lengths[p.answer] for p in self.batcher.wanted if p.answer in lengths}

    def reference_batch(self, rows: Sequence[int]) -> Batch:
        """What the reference's log-probabilities of some pairs are computed on."""
        return self.batcher([self.pairs[row] for row in rows], policy=False, reference=True)


def _spread(plans: Sequence[list[list[int]]]) -> Iterator[list[int]]:
    """The batches of several plans, each spread evenly over the whole."""
    placed = [
        ((rank + 0.5) / len(plan), which, batch)
        for which, plan in enumerate(plans)
        for rank, batch in enumerate(plan)
    ]
    for _, _, batch in sorted(placed, key=lambda one: one[:2]):
        yield batch


def stage_pairs(pairs: Sequence[Preference], curriculum: CurriculumConfig) -> list[Preference]:
    """The pairs that the stage can draw."""
    kept = {one.sample_id for one in stage_samples([pair.sample for pair in pairs], curriculum)}
    return [pair for pair in pairs if pair.sample.sample_id in kept]


def pair_texts(pairs: Sequence[Preference]) -> list[str]:
    """Every text, which a tokenizer from scratch is trained on."""
    return [
        text
        for pair in pairs
        for text in (*(turn.text for turn in pair.sample.turns), *pair.answers.values())
    ]


def measure_pairs(
    pairs: Sequence[Preference],
    loaded: Loaded,
    terms: Sequence[BuiltTerm],
    wanted: Sequence[Needed],
    data: DataConfig,
    outline: Outline | None = None,
) -> list[Measured]:
    """Lengths and digests of all pairs, before anything is encoded, which may take hours.

    Args:
        outline: sizes of encoded features, for models that are ``sized_by_clip``.

    Raises:
        DataError: a prompt with its longest answer has more tokens than ``data.max_length``;
            nothing is ever cut.
    """
    batcher = PairBatcher(Collator(loaded.processor, _Nothing()), _Nothing(), terms, wanted, 1)
    measured = [batcher.measure(pair, outline) for pair in pairs]
    samples = [pair.sample for pair in pairs]
    check_lengths(samples, [one.longest for one in measured], data.max_length)
    return measured


class _Nothing:
    """No features: lengths are measured before there are any."""

    def get(self, sample: Any) -> dict[Any, Any]:
        return {}

    def keys(self, sample: Any) -> dict[Any, str]:
        return {}


def say_what_counts(
    pairs: Sequence[Preference],
    terms: Sequence[BuiltTerm],
    wanted: Sequence[Needed],
    *,
    quiet: bool = False,
) -> dict[str, int]:
    """How many pairs each term can be computed for; printed.

    Raises:
        ConfigError: a term would count none.
    """
    counts = count_pairs(terms, presence(pairs, wanted))
    for name, _, term in terms:
        if pairs and not counts[name]:
            reads = ", ".join(f"'{one.answer}' after '{one.branch}'" for one in term.needs())
            raise ConfigError(
                f"objective: the term '{name}' reads {reads}, which none of the {len(pairs)} pairs "
                "has all of; add answers or negatives to the rows, or leave the term out"
            )
        if not quiet:
            console.print(f"{name}: {counts[name]:,} of {len(pairs):,} pairs")
    return counts
