"""Preference pairs as micro-batches: which answer is scored after which prompt.

A pair's prompt has *branches* (:mod:`mmemo.losses.base`): with the clip, with a
negative of it, without media. A :class:`Pass` is one forward pass: every branch of it stands in
one packed sequence once, and all of its answers after it. Branches without media are passes of
their own, since the others' padding would be most of them.

B pairs, S prompts of a pass, N answers scored in a pass, C tokens of the batch's longest answer.
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
from mmemo.losses.objective import Answer, AnswerKey, Branch, BuiltTerm, Needed, PreferenceLogps
from mmemo.train.dataloader import Batch

Clip = Mapping[Modality, Mapping[str, Tensor]]


class PairSource(Protocol):
    """Where a sample's features come from, and their addresses."""

    def get(self, sample: Sample) -> Clip: ...
    def keys(self, sample: Sample) -> Mapping[Modality, str]: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """Answers that are scored together, each after its own prompt.

    ``prompts``: a collated batch of S prompts. ``ids``, ``mask``: (N, C). ``prompt_index``: (N,).
    ``places``: N of them, and ``rows`` (N,) the pairs that they belong to. ``grad``: with gradient.
    ``idle``: what comes out is not read. No pair has the branch, but other ranks' pairs may, and
    sharded weights need every rank to compute as often.
    """

    prompts: Batch
    ids: Tensor
    mask: Tensor
    prompt_index: Tensor
    places: tuple[AnswerKey, ...]
    rows: Tensor
    grad: bool
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """One pair in tokens. ``prompt``: of its media prompt; ``answers``: of each answer; ``marks``:
    a digest of prompt and answer together, by (without media, answer)."""

    prompt: int
    answers: Mapping[Answer, int]
    marks: Mapping[tuple[bool, Answer], str]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return self.prompt + max(self.answers.values())


def negative_of(pair: Preference, branch: Branch) -> Negative | None:
    """The negative that stands in this branch."""
    return {"negative": pair.negative, "irrelevant": pair.irrelevant}.get(branch)


def has_branch(pair: Preference, branch: Branch) -> bool:
    """Whether the pair can be scored after this branch."""
    return branch in ("input", "text") or negative_of(pair, branch) is not None


def branch_sample(pair: Preference, branch: Branch) -> Sample:
    """The prompt of a branch with the media whose features are read for it. Named as the pair.

    Raises:
        DataError: without media, a turn has no text left.
    """
    if branch == "text":
        return restrict(pair.sample, [])
    negative = negative_of(pair, branch)
    if negative is None or negative.feature_level:
        return pair.sample
    side = "negative" if branch == "negative" else "irrelevant"
    return replace(negative_sample(pair, side), sample_id=pair.sample.sample_id)


def media_samples(pairs: Sequence[Preference], wanted: Sequence[Needed]) -> list[Sample]:
    """All that has to be encoded: of each pair its clip and the clips of its negatives."""
    asked = {one.branch for one in wanted}
    shown: tuple[Branch, ...] = ("input", "negative", "irrelevant")
    return [
        branch_sample(pair, branch)
        for pair in pairs
        for branch in shown
        if (branch == "input" or branch in asked) and has_branch(pair, branch)
    ]


def presence(pairs: Sequence[Preference], wanted: Sequence[Needed]) -> dict[AnswerKey, Tensor]:
    """(B,) bool for each place: the pair has that branch and that answer."""
    return {
        one.place: torch.tensor(
            [one.answer in p.answers and has_branch(p, one.branch) for p in pairs]
        )
        for one in wanted
    }


def count_pairs(terms: Sequence[BuiltTerm], present: Mapping[AnswerKey, Tensor]) -> dict[str, int]:
    """How many pairs each term can be computed for: what it says of log-probabilities of 0."""
    zeros = {place: torch.zeros(len(here), 1) for place, here in present.items()}
    ones: dict[Answer, Tensor] = {
        place[1]: torch.ones(len(here), 1).bool() for place, here in present.items()
    }
    nothing = PreferenceLogps(zeros, zeros, ones, ones, present)
    with torch.no_grad():
        return {name: int(term(nothing).counted.sum()) for name, _, term in terms}


def changed_tokens(chosen: Sequence[int], other: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """For each token of both answers, whether it is in a span that the other does not have.

    Source: RLHF-V, arXiv 2312.00849, which weighs such spans.
    """
    here, there = [True] * len(chosen), [True] * len(other)
    matcher = SequenceMatcher(None, chosen, other, autojunk=False)
    for start, begin, size in matcher.get_matching_blocks():
        here[start : start + size] = [False] * size
        there[begin : begin + size] = [False] * size
    return here, there


@dataclass(frozen=True, slots=True)
class _TokenizedPairs:
    """The pairs of a micro-batch: the tokens of their ``answers``, the longest of which has
    ``width``, and the ``clips`` of their branches that were read so far."""

    pairs: Sequence[Preference]
    answers: Sequence[Mapping[Answer, list[int]]]
    width: int
    clips: dict[tuple[int, Branch], Clip]


class PairBatcher:
    """Makes micro-batches of pairs.

    Args:
        frames: frames of a clip as the model samples it, so that a negative moves whole frames.
    """

    def __init__(
        self,
        collator: Collator,
        source: PairSource,
        terms: Sequence[BuiltTerm],
        wanted: Sequence[Needed],
        frames: int,
    ) -> None:
        self.collator, self.source, self.frames = collator, source, frames
        self.terms, self.wanted = terms, wanted
        self._code = content.sha256(Path(negatives.__file__))

    def __call__(
        self, pairs: Sequence[Preference], *, policy: bool = True, reference: bool = False
    ) -> Batch:
        """The passes of the policy and, if asked for, those of the reference.

        ``passes`` and ``reference_passes``: lists of :class:`Pass`. ``mask`` and ``changed``:
        (B, C) by answer, ``present``: (B,) by place, as :class:`PreferenceLogps` has them.
        ``counted``: pairs of each term. ``attention_mask``: (1,), the tokens of all passes.
        """
        clips: dict[tuple[int, Branch], Clip] = {}
        if sized_by_clip(self.collator.processor):
            for row, pair in enumerate(pairs):
                if pair.sample.media:
                    clips[row, "input"] = self._clip(pair, "input", pair.sample)
        answers = [self._answers(pair, clips.get((row, "input"))) for row, pair in enumerate(pairs)]
        width = max(len(ids) for row in answers for ids in row.values())
        present = presence(pairs, self.wanted)
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
        wanted = self._ensured([one for one in self.wanted if one.policy], present)
        batch["passes"] = self._passes(wanted, tokenized) if policy else []
        asked = [replace(one, grad=False) for one in self.wanted if one.reference]
        batch["reference_passes"] = self._passes(asked, tokenized) if reference else []
        done: list[Pass] = [*batch["passes"], *batch["reference_passes"]]
        tokens = sum(int(p.prompts["attention_mask"].sum()) + int(p.mask.sum()) for p in done)
        batch["attention_mask"] = torch.tensor([tokens])
        return batch

    def measure(self, pair: Preference, outline: Outline | None = None) -> Measured:
        """The pair's lengths: before anything of it is encoded or, where the clip decides them,
        from the ``outline`` of its features.

        Raises:
            DataError: the prompt does not fit the model, or has no text without media.
        """
        processor = self.collator.processor
        shown: list[Branch] = ["input"]
        if outline is not None:  # a negative may be longer than the clip
            for one in self.wanted:
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
        if any(one.branch == "text" for one in self.wanted):
            text = branch_sample(pair, "text")
            prompts[True] = render(processor, text, generation=True).input_ids
        return Measured(
            prompt=max(len(row) for row in rows),
            answers={name: len(ids) for name, ids in answers.items()},
            marks={
                (bare, name): _digest([prompt, ids])
                for bare, prompt in prompts.items()
                for name, ids in answers.items()
            },
        )

    def seen(self, pair: Preference, branch: Branch) -> str:
        """The address of what a branch shows: of its features, and of what was done to them."""
        sample, negative = branch_sample(pair, branch), negative_of(pair, branch)
        parts: list[Any] = [dict(self.source.keys(sample)) if sample.media else {}]
        if negative is not None and negative.feature_level:
            parts += [asdict(negative), self._code]
        return _digest(parts)

    def _answers(self, pair: Preference, clip: Clip | None = None) -> dict[Answer, list[int]]:
        """Each answer's tokens, with the one that ends it."""
        found: dict[Answer, list[int]] = {}
        for name, text in pair.answers.items():
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
    def _ensured(wanted: Sequence[Needed], present: Mapping[AnswerKey, Tensor]) -> list[Needed]:
        """At least one place with gradient that some pair has, so that every backward pass reaches
        the weights."""
        if any(one.grad and bool(present[one.place].any()) for one in wanted):
            return list(wanted)
        rest = [one for one in wanted if one.place != ("input", "chosen")]
        return [*rest, Needed("input", "chosen", reference=False)]

    def _passes(self, wanted: Sequence[Needed], tokenized: _TokenizedPairs) -> list[Pass]:
        """Passes by what needs a gradient and what has media. A branch is in one of them only."""
        learnt = {one.branch for one in wanted if one.grad}
        found: list[Pass] = []
        for grad in (True, False):
            for bare in (False, True):
                mine = [
                    one
                    for one in wanted
                    if (one.branch in learnt) == grad and (one.branch == "text") == bare
                ]
                spots: list[tuple[AnswerKey, int]] = [
                    (one.place, row)
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
    ) -> Pass:
        """The forward pass of some answers: each is the (branch, answer) of one pair."""
        pairs, known = tokenized.pairs, tokenized.clips
        prompts: list[tuple[int, Branch]] = [(row, place[0]) for place, row in spots]
        prompts = list(dict.fromkeys(prompts))
        samples: list[Sample] = []
        index: list[int] = []
        clips: list[Clip] = []
        places: dict[str, int] = {}
        for row, branch in prompts:
            samples.append(branch_sample(pairs[row], branch))
            if not samples[-1].media:
                index.append(-1)
                continue
            # Pairs about one clip share it, each of its negatives is a clip of its own.
            address = self._address(pairs[row], branch, samples[-1])
            if address not in places:
                if (row, branch) not in known:
                    known[row, branch] = self._clip(pairs[row], branch, samples[-1])
                places[address] = len(clips)
                clips.append(known[row, branch])
            index.append(places[address])
        ids = [tokenized.answers[row][place[1]] for place, row in spots]
        return Pass(
            prompts=self.collator.assemble(samples, index, clips, generation=True),
            ids=_stack(ids, tokenized.width),
            mask=_stack([[1] * len(one) for one in ids], tokenized.width),
            prompt_index=torch.tensor([prompts.index((row, place[0])) for place, row in spots]),
            places=tuple(place for place, _ in spots),
            rows=torch.tensor([row for _, row in spots]),
            grad=grad,
        )

    @staticmethod
    def _address(pair: Preference, branch: Branch, sample: Sample) -> str:
        negative = negative_of(pair, branch)
        made = None if negative is None or not negative.feature_level else repr(negative)
        return repr((sorted(sample.media.items()), made))

    def _clip(self, pair: Preference, branch: Branch, sample: Sample) -> Clip:
        found, negative = self.source.get(sample), negative_of(pair, branch)
        if negative is None or not negative.feature_level:
            return found
        return corrupt(found, negative, frame_tokens=self._frame_tokens(found))

    def _frame_tokens(self, clip: Clip) -> dict[Modality, int]:
        """Feature steps of one frame: encoders of pictures give as many for each."""
        pictured: tuple[Modality, ...] = ("video", "face")
        found: dict[Modality, int] = {}
        for name in pictured:
            steps = clip[name]["x"].shape[-2] if name in clip else 0
            if steps and steps % self.frames == 0:
                found[name] = steps // self.frames
        return found


def _changed(answers: Mapping[Answer, list[int]]) -> dict[Answer, list[bool]]:
    """Tokens in changed spans of each answer; the chosen one's are those that any other lacks."""
    chosen = answers["chosen"]
    found: dict[Answer, list[bool]] = {"chosen": [False] * len(chosen)}
    for name, ids in answers.items():
        if name != "chosen":
            here, found[name] = changed_tokens(chosen, ids)
            found["chosen"] = [a or b for a, b in zip(found["chosen"], here, strict=True)]
    return found


def _stack(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(rows, width) long, padded with 0 on the right."""
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], dtype=torch.long)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
