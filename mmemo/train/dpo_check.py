"""``mmemo check`` for what only a preference config has: pairs, negatives, terms, the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmemo.console import console
from mmemo.data.collate import check_lengths, sized_by_clip
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import Sample, Turn
from mmemo.losses.preference import Branch, Place, build_terms, needed
from mmemo.models.build import Loaded
from mmemo.train.dpo import check_reference
from mmemo.train.dpo_batch import Measured, branch_sample, has_branch
from mmemo.train.dpo_config import DpoConfig
from mmemo.train.dpo_data import measure_pairs, say_what_counts


def chosen_rows(data: DataConfig) -> list[Sample]:
    """The pairs as rows with their chosen answers."""
    return [_answered(pair, pair.sample) for pair in load_preferences(data)]


def negative_rows(config: DpoConfig, data: DataConfig) -> list[Sample]:
    """The same of the negatives that are clips of their own, as far as a term reads them."""
    asked = {one.branch for one in needed(build_terms(config.objective.terms))}
    replaced: tuple[Branch, ...] = ("negative", "irrelevant")
    return [
        _answered(pair, branch_sample(pair, branch))
        for pair in load_preferences(data)
        for branch in replaced
        if branch in asked and has_branch(pair, branch)
    ]


def check_dpo(config: DpoConfig, loaded: Loaded, limit: int | None) -> tuple[int, int] | None:
    """Check terms, reference and the lengths of all answers, and print what was found.

    Returns:
        Tokens that a pair's forward passes with gradient have together, and those of them whose
        logits are needed: the most of any pair. None where the clip decides how many.

    Raises:
        ConfigError: there is no reference, or a term can be computed for no pair.
        DataError: a prompt with one of its answers has more tokens than fit.
    """
    terms = build_terms(config.objective.terms)
    wanted = needed(terms)
    check_reference(config, wanted)
    packed: tuple[int, int] | None = None
    for data in (config.data, config.eval_data):
        if data is None:
            continue
        pairs = load_preferences(data)
        say_what_counts(pairs, terms, wanted)
        if sized_by_clip(loaded.processor):
            continue
        measured = measure_pairs(pairs, loaded, terms, wanted, data)
        check_lengths([p.sample for p in pairs], [one.longest for one in measured], limit)
        if data is config.data:
            learnt = [one.place for one in wanted if one.grad]
            sizes = [_size(pair, one, learnt) for pair, one in zip(pairs, measured, strict=True)]
            packed = max(sizes)
            longest = max(one.longest for one in measured)
            console.print(
                f"longest prompt with an answer: {longest} tokens; of one pair at most "
                f"{packed[0]} tokens are learnt from together"
            )
    stored = sum(one.reference for one in wanted)
    if stored:
        how = "stored before training" if config.dpo.stored_reference else "computed in each step"
        console.print(f"reference: {stored} log-probabilities of each pair, {how}")
    return packed


def _answered(pair: Preference, sample: Sample) -> Sample:
    turns = (*sample.prompt, Turn("assistant", pair.answers["chosen"]))
    return replace(sample, turns=turns)


def _size(pair: Preference, measured: Measured, learnt: Sequence[Place]) -> tuple[int, int]:
    there = [
        place for place in learnt if place[1] in measured.answers and has_branch(pair, place[0])
    ]
    answers = sum(measured.answers[place[1]] for place in there)
    return measured.prompt * len({place[0] for place in there}) + answers, answers
