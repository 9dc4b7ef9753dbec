"""The dataset of a preference run: its pairs, their lengths, batches and stored references.

Shapes: B pairs, C tokens of the batch's longest answer.
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
from mmemo.data.pair_names import reading
from mmemo.data.preference import QUERIES, Preference
from mmemo.errors import ConfigError
from mmemo.losses.base import JUDGE_AGREEMENT
from mmemo.losses.objective import AnswerKey, Branch, BuiltTerm, LogpRequest
from mmemo.models.build import Loaded
from mmemo.train.dataloader import Batch
from mmemo.train.dpo.batch import PairBatcher, PairLengths, count_pairs, has_branch, presence
from mmemo.train.dpo.reference_store import ReferenceStore
from mmemo.train.stage import stage_samples


class DpoData:
    """The pairs of a run. ``batch_size`` pairs make one optimizer step over all ranks."""

    def __init__(
        self,
        pairs: Sequence[Preference],
        measured: Sequence[PairLengths],
        batcher: PairBatcher,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
        *,
        alternate: bool = False,
        live: bool = False,
        references: ReferenceStore | None = None,
    ) -> None:
        """
        Args:
            alternate: fill each batch with questions about one modality.
            live: add the reference's forward passes to each batch, for a reference that is computed
                in every step.
            references: where the reference's log-probabilities of each batch are read. They must be
                stored before the first batch is made.
        """
        self.pairs, self.measured, self.batcher = pairs, measured, batcher
        self.curriculum, self.batch_size, self.seed = curriculum, batch_size, seed
        self.alternate, self.live = alternate, live
        self.references = references
        self.lengths = [one.prompt + sum(one.answers.values()) for one in measured]

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as lists of rows."""
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

    def _stored(self, rows: Sequence[int], references: ReferenceStore) -> dict[AnswerKey, Tensor]:
        """(B, C) stored log-probabilities of the reference, by (branch, answer) key."""
        width = max(n for row in rows for n in self.measured[row].answers.values())
        found: dict[AnswerKey, Tensor] = {}
        for at, row in enumerate(rows):
            for answer_key, address in references.keys(self.reference_digests(row)).items():
                logps = references.get(address)
                # (B, C); rows of pairs that lack the key stay 0 and are not read.
                whole = found.setdefault(answer_key, torch.zeros(len(rows), width))
                whole[at, : len(logps)] = logps
        return found

    def branch_digests(self, row: int) -> dict[Branch, str]:
        """Digests of what each requested branch of a pair shows."""
        pair = self.pairs[row]
        found: dict[Branch, str] = {}
        for one in self.batcher.requests:
            if one.branch not in found and has_branch(pair, one.branch):
                found[one.branch] = self.batcher.branch_digest(pair, one.branch)
        return found

    def reference_digests(self, row: int) -> dict[AnswerKey, tuple[str, str]]:
        """The (token digest, branch digest) of each of the reference's log-probabilities of a pair:
        what :meth:`ReferenceStore.keys` makes their addresses of."""
        pair, measured, shown = self.pairs[row], self.measured[row], self.branch_digests(row)
        return {
            one.key: (measured.token_digests[one.branch == "text", one.answer], shown[one.branch])
            for one in self.batcher.requests
            if one.reference and one.answer in pair.answers and one.branch in shown
        }

    def answer_lengths(self, row: int) -> dict[AnswerKey, int]:
        """The number of tokens of each requested answer."""
        lengths = self.measured[row].answers
        return {p.key: lengths[p.answer] for p in self.batcher.requests if p.answer in lengths}

    def reference_batch(self, rows: Sequence[int]) -> Batch:
        """The batch that the reference's log-probabilities of some pairs are computed on."""
        return self.batcher([self.pairs[row] for row in rows], policy=False, reference=True)


def _spread(plans: Sequence[list[list[int]]]) -> Iterator[list[int]]:
    """The batches of several plans in one order, with each plan spread evenly over it."""
    # Batch ``rank`` of n stands at (rank + 0.5) / n, so that a shorter plan neither ends early nor
    # starts late.
    placed = [
        ((rank + 0.5) / len(plan), which, batch)
        for which, plan in enumerate(plans)
        for rank, batch in enumerate(plan)
    ]
    for _, _, batch in sorted(placed, key=lambda one: one[:2]):
        yield batch


def stage_pairs(pairs: Sequence[Preference], curriculum: CurriculumConfig) -> list[Preference]:
    """The pairs that the curriculum stage can draw."""
    kept = {one.sample_id for one in stage_samples([pair.sample for pair in pairs], curriculum)}
    return [pair for pair in pairs if pair.sample.sample_id in kept]


def pair_texts(pairs: Sequence[Preference]) -> list[str]:
    """Every text of the pairs, to train a tokenizer from scratch on."""
    return [
        text
        for pair in pairs
        for text in (*(turn.text for turn in pair.sample.turns), *pair.answers.values())
    ]


def measure_pairs(
    pairs: Sequence[Preference],
    loaded: Loaded,
    terms: Sequence[BuiltTerm],
    requests: Sequence[LogpRequest],
    data: DataConfig,
    outline: Outline | None = None,
) -> list[PairLengths]:
    """Token counts and digests of all pairs, known before anything is encoded.

    Encoding may take hours, so a pair that is too long is refused first.

    Args:
        outline: sizes of encoded features, for models that are ``sized_by_clip``.

    Raises:
        DataError: a prompt and its longest answer have more tokens than ``data.max_length``;
            nothing is ever truncated.
    """
    batcher = PairBatcher(
        Collator(loaded.processor, _NoFeatures()), _NoFeatures(), terms, requests, 1
    )
    measured = [batcher.measure(pair, outline) for pair in pairs]
    samples = [pair.sample for pair in pairs]
    check_lengths(samples, [one.longest for one in measured], data.max_length)
    return measured


class _NoFeatures:
    """A source without features, since lengths are measured before there are any."""

    def get(self, sample: Any) -> dict[Any, Any]:
        return {}

    def keys(self, sample: Any) -> dict[Any, str]:
        return {}


def print_pair_counts(
    pairs: Sequence[Preference],
    terms: Sequence[BuiltTerm],
    requests: Sequence[LogpRequest],
    *,
    quiet: bool = False,
) -> dict[str, int]:
    """Print and return the number of pairs that each term can be computed for, and print how keys
    with other names than here were read.

    Args:
        quiet: do not print.

    Raises:
        ConfigError: a term, or a part of it, can be computed for no pair.
    """
    counts = check_pair_counts(pairs, terms, requests)
    for sentence in [] if quiet else reading(pair.names for pair in pairs):
        console.print(f"pairs: {sentence}")
    for name, count in counts.items():
        if not quiet:
            console.print(f"{name}: {count:,} of {len(pairs):,} pairs")
    return counts


def check_pair_counts(
    pairs: Sequence[Preference], terms: Sequence[BuiltTerm], requests: Sequence[LogpRequest]
) -> dict[str, int]:
    """The number of pairs that each term can be computed for, by its name.

    Raises:
        ConfigError: a term can be computed for no pair, or reads a branch that no pair has, so that
            a part of it would do nothing.
    """
    counts = count_pairs(terms, presence(pairs, requests))
    for name, _, term in terms if pairs else ():
        if not counts[name]:
            reads = ", ".join(f"'{one.answer}' after '{one.branch}'" for one in term.needs())
            raise ConfigError(
                f"objective: the term '{name}' reads {reads}, which none of the {len(pairs)} pairs "
                "has all of; add answers or negatives to the rows, set "
                "dpo.missing_negative=noise, or leave the term out"
            )
        stated = any(pair.judge_agreement is not None for pair in pairs)
        if getattr(term, "label_smoothing", 0) == JUDGE_AGREEMENT and not stated:
            raise ConfigError(
                f"objective: label_smoothing of '{name}' is the rows' judge_agreement, which none "
                f"of the {len(pairs)} pairs has; add it, or give a probability"
            )
        branches: list[Branch] = [one.branch for one in term.needs()]
        for branch in dict.fromkeys(branches):
            if not any(has_branch(pair, branch) for pair in pairs):
                raise ConfigError(
                    f"objective: the term '{name}' has a part that compares with the '{branch}' "
                    f"of the clip, which none of the {len(pairs)} pairs has; add it to the rows, "
                    "set dpo.missing_negative=noise, or set that part's weight to 0"
                )
    return counts
