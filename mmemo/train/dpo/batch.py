"""Preference pairs as micro-batches: which answer is scored after which prompt.

Shapes: B pairs, S prompts of a forward pass, N answers scored in it, C tokens of the batch's
longest answer.

A pair's prompt has *branches* (:mod:`mmemo.losses.base`): with the clip, with a negative of the
clip, without media. A :class:`ForwardPass` holds each of its branches once, followed by all of the
answers that are scored after it, in one packed sequence. Branches without media get a forward pass
of their own: beside prompts with media, they would consist mostly of padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmemo import content
from mmemo.data import negatives
from mmemo.data.collate import IGNORE_INDEX, Collator, Outline, render, sized_by_clip
from mmemo.data.negatives import corrupt, negative_sample
from mmemo.data.preference import Negative, Preference
from mmemo.data.rows import restrict
from mmemo.data.sample import Modality, Sample, Turn
from mmemo.losses.objective import (
    Answer,
    AnswerKey,
    Branch,
    BuiltTerm,
    LogpRequest,
    PreferenceLogps,
)
from mmemo.train.dataloader import Batch

ClipFeatures = Mapping[Modality, Mapping[str, Tensor]]
"""Encoder features of each stream of a clip."""


class PairSource(Protocol):
    """Reads the features of a sample and gives their addresses in the feature store."""

    def get(self, sample: Sample) -> ClipFeatures: ...
    def keys(self, sample: Sample) -> Mapping[Modality, str]: ...


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Answers that are scored together, each after its own prompt."""

    prompts: Batch
    """A collated batch of S prompts."""
    ids: Tensor
    """(N, C) answer tokens."""
    mask: Tensor
    """(N, C), non-zero at answer tokens."""
    prompt_index: Tensor
    """(N,) the prompt that each answer follows."""
    keys: tuple[AnswerKey, ...]
    """The N (branch, answer) keys."""
    rows: Tensor
    """(N,) the pair that each answer belongs to."""
    grad: bool
    """Whether the log-probabilities need a gradient."""
    idle: bool = False
    """The result is discarded. No pair of this batch has the branch, but pairs of other ranks may,
    and sharded weights need every rank to run the same number of forward passes."""


@dataclass(frozen=True, slots=True)
class PairLengths:
    """The token counts of one pair."""

    prompt: int
    """Tokens of the longest prompt with media."""
    answers: Mapping[Answer, int]
    """Tokens of each answer."""
    token_digests: Mapping[tuple[bool, Answer], str]
    """(whether the prompt has no media, answer) -> digest of the tokens of prompt and answer."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest answer together."""
        return self.prompt + max(self.answers.values())


def negative_of(pair: Preference, branch: Branch) -> Negative | None:
    """The negative that the branch shows instead of the clip, if it is one."""
    return {"negative": pair.negative, "irrelevant": pair.irrelevant}.get(branch)


def has_branch(pair: Preference, branch: Branch) -> bool:
    """Whether the pair can be scored after this branch."""
    return branch in ("input", "text") or negative_of(pair, branch) is not None


def branch_sample(pair: Preference, branch: Branch) -> Sample:
    """The prompt of a branch, with the media whose features are read for it.

    Its ``sample_id`` is the pair's.

    Raises:
        DataError: a turn has no text left once the media are removed.
    """
    if branch == "text":
        return restrict(pair.sample, [])
    negative = negative_of(pair, branch)
    if negative is None or negative.feature_level:
        return pair.sample
    side = "negative" if branch == "negative" else "irrelevant"
    # Under the pair's own id, so that a bad clip of a negative leaves the whole pair out.
    return replace(negative_sample(pair, side), sample_id=pair.sample.sample_id)


def media_samples(pairs: Sequence[Preference], requests: Sequence[LogpRequest]) -> list[Sample]:
    """Every sample that has to be encoded: each pair's clip and the clips of its negatives."""
    requested = {request.branch for request in requests}
    shown: tuple[Branch, ...] = ("input", "negative", "irrelevant")
    return [
        branch_sample(pair, branch)
        for pair in pairs
        for branch in shown
        if (branch == "input" or branch in requested) and has_branch(pair, branch)
    ]


def presence(
    pairs: Sequence[Preference], requests: Sequence[LogpRequest]
) -> dict[AnswerKey, Tensor]:
    """(B,) bool for each key: the pair has that branch and that answer."""
    return {
        one.key: torch.tensor(
            [one.answer in p.answers and has_branch(p, one.branch) for p in pairs],
            dtype=torch.bool,
        )
        for one in requests
    }


def count_pairs(terms: Sequence[BuiltTerm], present: Mapping[AnswerKey, Tensor]) -> dict[str, int]:
    """How many pairs each term can be computed for, by the name of the term."""
    return {name: int(here.sum()) for name, here in counted_pairs(terms, present).items()}


def counted_pairs(
    terms: Sequence[BuiltTerm], present: Mapping[AnswerKey, Tensor]
) -> dict[str, Tensor]:
    """(B,) bool, the pairs that each term can be computed for, by the name of the term.

    The terms are asked with log-probabilities of 0, since only they know what they need.
    """
    zeros = {key: torch.zeros(len(here), 1) for key, here in present.items()}
    ones: dict[Answer, Tensor] = {
        key[1]: torch.ones(len(here), 1).bool() for key, here in present.items()
    }
    dummy = PreferenceLogps(zeros, zeros, ones, ones, present)
    with torch.no_grad():
        return {name: term(dummy).counted for name, _, term in terms}


def changed_tokens(chosen: Sequence[int], other: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """For each token of both answers, whether it is in a span that the other answer lacks.

    Source: RLHF-V, arXiv 2312.00849, which gives such spans a larger weight.
    """
    in_chosen, in_other = [True] * len(chosen), [True] * len(other)
    # autojunk would take tokens that are frequent in a long answer for junk and match none of them.
    matcher = SequenceMatcher(None, chosen, other, autojunk=False)
    for start, begin, size in matcher.get_matching_blocks():
        in_chosen[start : start + size] = [False] * size
        in_other[begin : begin + size] = [False] * size
    return in_chosen, in_other


@dataclass(frozen=True, slots=True)
class _TokenizedPairs:
    """The pairs of a micro-batch with the tokens of their answers."""

    pairs: Sequence[Preference]
    answers: Sequence[Mapping[Answer, list[int]]]
    width: int
    """Tokens of the longest answer."""
    clips: dict[tuple[int, Branch], ClipFeatures]
    """(row, branch) -> the features that were read so far."""


class PairBatcher:
    """Collates pairs into micro-batches.

    Args:
        collator: collates the prompts.
        source: reads the features of the clips.
        terms: the terms of the objective, to count the pairs of each.
        requests: the log-probabilities that the terms read.
        frames: number of frames that the model samples from a clip, so that a negative made of
            features moves whole frames.
    """

    def __init__(
        self,
        collator: Collator,
        source: PairSource,
        terms: Sequence[BuiltTerm],
        requests: Sequence[LogpRequest],
        frames: int,
    ) -> None:
        self.collator, self.source, self.frames = collator, source, frames
        self.terms, self.requests = terms, requests
        # Part of each digest, since stored references must not outlive a change of how negatives
        # are made.
        self._code = content.sha256(Path(negatives.__file__))

    def __call__(
        self, pairs: Sequence[Preference], *, policy: bool = True, reference: bool = False
    ) -> Batch:
        """A batch with the forward passes of the policy and of the reference.

        Args:
            policy: include the policy's forward passes.
            reference: include the reference's.

        Returns:
            ``passes`` and ``reference_passes``, lists of :class:`ForwardPass`; ``mask`` and
            ``changed``, (B, C) by answer, and ``present``, (B,) by key, as in
            :class:`PreferenceLogps`, as is ``swapped``, (B,), if a row says it; ``counted``, the
            number of pairs of each term; ``sample_ids``; ``attention_mask``, (1,), the number of
            tokens of all passes.
        """
        clips: dict[tuple[int, Branch], ClipFeatures] = {}
        # Here even the prompt's tokens depend on the clip, so its features are read before any
        # rendering.
        if sized_by_clip(self.collator.processor):
            for row, pair in enumerate(pairs):
                if pair.sample.media:
                    clips[row, "input"] = self._clip(pair, "input", pair.sample)
        answers = [self._answers(pair, clips.get((row, "input"))) for row, pair in enumerate(pairs)]
        width = max(len(ids) for row in answers for ids in row.values())
        present = presence(pairs, self.requests)
        changed = [_changed(row) for row in answers]
        names: tuple[Answer, ...] = ("chosen", "spurious", "hallucinated")
        batch: Batch = {
            "mask": {
                name: _stack([[True] * len(row.get(name, ())) for row in answers], width).bool()
                for name in names
            },
            "changed": {
                name: _stack([row.get(name, []) for row in changed], width).bool() for name in names
            },
            "present": present,
            "counted": count_pairs(self.terms, present),
            "sample_ids": [pair.sample.sample_id for pair in pairs],
        }
        tokenized = _TokenizedPairs(pairs, answers, width, clips)
        swapped = [None if p.judge_agreement is None else 1 - p.judge_agreement for p in pairs]
        if any(swapped):
            batch["swapped"] = torch.tensor([one or 0.0 for one in swapped])
        requests = self._ensured([one for one in self.requests if one.policy], present)
        batch["passes"] = self._passes(requests, tokenized) if policy else []
        asked = [replace(one, grad=False) for one in self.requests if one.reference]
        batch["reference_passes"] = self._passes(asked, tokenized) if reference else []
        done: list[ForwardPass] = [*batch["passes"], *batch["reference_passes"]]
        tokens = sum(int(p.prompts["attention_mask"].sum()) + int(p.mask.sum()) for p in done)
        # The trainer counts the tokens of any stage's batch by this name.
        batch["attention_mask"] = torch.tensor([tokens])
        return batch

    def measure(self, pair: Preference, outline: Outline | None = None) -> PairLengths:
        """The token counts of a pair, before any of it is encoded.

        Args:
            outline: sizes of a sample's encoded features, for models whose prompt length depends on
                the clip.

        Raises:
            DataError: the prompt does not fit the model, or has no text without its media.
        """
        processor = self.collator.processor
        shown: list[Branch] = ["input"]
        if outline is not None:  # a negative may be longer than the clip
            for one in self.requests:
                branch: Branch = one.branch
                if branch != "text" and branch not in shown and has_branch(pair, branch):
                    shown.append(branch)
        samples = [branch_sample(pair, branch) for branch in shown]
        clips = [outline(one) if outline is not None and one.media else None for one in samples]
        rows = [
            render(processor, one, generation=True, clip=clip).input_ids
            for one, clip in zip(samples, clips, strict=True)
        ]
        answers, prompts = self._answers(pair, clips[0]), {False: rows[0]}
        if any(one.branch == "text" for one in self.requests):
            text = branch_sample(pair, "text")
            prompts[True] = render(processor, text, generation=True).input_ids
        return PairLengths(
            prompt=max(len(row) for row in rows),
            answers={name: len(ids) for name, ids in answers.items()},
            token_digests={
                (bare, name): _digest([prompt, ids])
                for bare, prompt in prompts.items()
                for name, ids in answers.items()
            },
        )

    def branch_digest(self, pair: Preference, branch: Branch) -> str:
        """Digest of what a branch shows: its features' addresses and how they were corrupted."""
        sample, negative = branch_sample(pair, branch), negative_of(pair, branch)
        parts: list[Any] = [dict(self.source.keys(sample)) if sample.media else {}]
        made = () if negative is None else negative.corruptions
        if made:
            parts += [*map(asdict, made), self._code]
        return _digest(parts)

    def _answers(
        self, pair: Preference, clip: ClipFeatures | None = None
    ) -> dict[Answer, list[int]]:
        """The tokens of each answer, its end token included."""
        found: dict[Answer, list[int]] = {}
        for name, text in pair.answers.items():
            # Rendered as a turn of the chat: tokenised alone, the answer would lack its end token.
            turns = (*pair.sample.prompt, Turn("assistant", text))
            sample = replace(pair.sample, turns=turns)
            row = render(self.collator.processor, sample, generation=False, clip=clip)
            found[name] = [
                token
                for token, label in zip(row.input_ids, row.labels, strict=True)
                if label != IGNORE_INDEX
            ]
        return found

    @staticmethod
    def _ensured(
        requests: Sequence[LogpRequest], present: Mapping[AnswerKey, Tensor]
    ) -> list[LogpRequest]:
        """The requests, with at least one that has a gradient and is present in some pair, so that
        every backward pass reaches the weights."""
        if any(one.grad and bool(present[one.key].any()) for one in requests):
            return list(requests)
        rest = [one for one in requests if one.key != ("input", "chosen")]
        return [*rest, LogpRequest("input", "chosen", reference=False)]

    def _passes(
        self, requests: Sequence[LogpRequest], tokenized: _TokenizedPairs
    ) -> list[ForwardPass]:
        """Forward passes, split by gradient and by media. Each branch is in one of them only."""
        # Any branch with a gradient takes all of its answers along: in two passes, its prompt would
        # be computed twice.
        with_grad = {one.branch for one in requests if one.grad}
        found: list[ForwardPass] = []
        for grad in (True, False):
            for bare in (False, True):
                mine = [
                    one
                    for one in requests
                    if (one.branch in with_grad) == grad and (one.branch == "text") == bare
                ]
                spots: list[tuple[AnswerKey, int]] = [
                    (one.key, row)
                    for row, pair in enumerate(tokenized.pairs)
                    for one in mine
                    if one.answer in tokenized.answers[row] and has_branch(pair, one.branch)
                ]
                if spots:
                    found.append(self._pass(spots, tokenized, grad=grad))
                elif mine:
                    spots = [(("text" if bare else "input", "chosen"), 0)]
                    found.append(replace(self._pass(spots, tokenized, grad=grad), idle=True))
        return found

    def _pass(
        self, spots: Sequence[tuple[AnswerKey, int]], tokenized: _TokenizedPairs, *, grad: bool
    ) -> ForwardPass:
        """The forward pass that scores some answers, each given by its key and its pair."""
        pairs, known = tokenized.pairs, tokenized.clips
        prompts: list[tuple[int, Branch]] = [(row, key[0]) for key, row in spots]
        prompts = list(dict.fromkeys(prompts))
        samples: list[Sample] = []
        index: list[int] = []
        clips: list[ClipFeatures] = []
        clip_index: dict[str, int] = {}
        for row, branch in prompts:
            samples.append(branch_sample(pairs[row], branch))
            if not samples[-1].media:
                index.append(-1)
                continue
            # Pairs about the same clip share its features; each negative is a clip of its own.
            address = self._address(pairs[row], branch, samples[-1])
            if address not in clip_index:
                if (row, branch) not in known:
                    known[row, branch] = self._clip(pairs[row], branch, samples[-1])
                clip_index[address] = len(clips)
                clips.append(known[row, branch])
            index.append(clip_index[address])
        ids = [tokenized.answers[row][key[1]] for key, row in spots]
        return ForwardPass(
            prompts=self.collator.assemble(samples, index, clips, generation=True),
            ids=_stack(ids, tokenized.width),
            mask=_stack([[1] * len(one) for one in ids], tokenized.width),
            prompt_index=torch.tensor([prompts.index((row, key[0])) for key, row in spots]),
            keys=tuple(key for key, _ in spots),
            rows=torch.tensor([row for _, row in spots]),
            grad=grad,
        )

    @staticmethod
    def _address(pair: Preference, branch: Branch, sample: Sample) -> str:
        negative = negative_of(pair, branch)
        made = () if negative is None else negative.corruptions
        return repr((sorted(sample.media.items()), made))

    def _clip(self, pair: Preference, branch: Branch, sample: Sample) -> ClipFeatures:
        found, negative = self.source.get(sample), negative_of(pair, branch)
        for one in () if negative is None else negative.corruptions:
            found = corrupt(found, one, frame_tokens=self._frame_tokens(found))
        return found

    def _frame_tokens(self, clip: ClipFeatures) -> dict[Modality, int]:
        """Feature steps per frame: image encoders give each frame the same number."""
        pictured: tuple[Modality, ...] = ("video", "face")
        found: dict[Modality, int] = {}
        for name in pictured:
            steps = clip[name]["x"].shape[-2] if name in clip else 0
            if steps and steps % self.frames == 0:
                found[name] = steps // self.frames
        return found


def _changed(answers: Mapping[Answer, list[int]]) -> dict[Answer, list[bool]]:
    """Whether each token of each answer is in a changed span; in the chosen answer these are the
    spans that any rejected answer lacks."""
    chosen = answers["chosen"]
    found: dict[Answer, list[bool]] = {"chosen": [False] * len(chosen)}
    for name, ids in answers.items():
        if name != "chosen":
            in_chosen, found[name] = changed_tokens(chosen, ids)
            found["chosen"] = [a or b for a, b in zip(found["chosen"], in_chosen, strict=True)]
    return found


def _stack(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(rows, width) long, padded with 0 on the right."""
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], dtype=torch.long)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
