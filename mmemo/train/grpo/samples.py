"""Whether what a policy samples is language: before GRPO trains, while it does, and in ``mmemo
check``.

:mod:`mmemo.generation.readable` says what is looked for, and with which false alarms.

Shapes: B prompts, G completions of each, N = B * G completions prompt by prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text
from torch import nn

from mmemo.answers.messages import prompt_text
from mmemo.console import console
from mmemo.data.collate import Collator
from mmemo.data.manifest import load_samples
from mmemo.data.sample import Sample
from mmemo.errors import TrainingError
from mmemo.generation.logprobs import Ranks as TokenRanks
from mmemo.generation.logprobs import token_ranks
from mmemo.generation.packing import plan_packs
from mmemo.generation.readable import (
    KINDS,
    TITLES,
    Reading,
    Vocabulary,
    read_answer,
    shares,
    token_name,
    vocabulary_of,
)
from mmemo.generation.rollout import RolloutEngine, Rollouts, rollout_seed
from mmemo.rewards.rewards import prompt_of
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.distributed import Ranks
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.data import select_prompts
from mmemo.train.reference import ReferenceModel

WARN_ABOVE = 0.05
"""Share of flagged samples above which a warning is given: some times what an honest model
shows."""

_NAMED = 4
"""Tokens and words that a warning names."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled completion of a row. ``meant`` is the token that the model would rather have said
    where the completion departs furthest from it; None where no distribution is known."""

    sample: Sample
    text: str
    reading: Reading
    meant: int | None = None


def known_words(config: GrpoConfig, samples: Sequence[Sample]) -> Vocabulary:
    """The words of the rows of the run and of the answers in ``watch.answers``.

    Raises:
        DataError: a row of ``watch.answers`` is invalid.
    """
    told = config.watch.answers
    return vocabulary_of(samples, load_samples(told) if told else ())


@torch.no_grad()
def read_rollouts(
    model: nn.Module,
    prompts: Mapping[str, Any],
    rollouts: Rollouts,
    samples: Sequence[Sample],
    known: Vocabulary,
    *,
    ranked: bool,
    shared_prefix: bool = True,
    max_tokens: int | None = None,
) -> list[Sampled]:
    """Read N completions.

    Args:
        model: its distribution is the one that completions are compared with.
        prompts: B collated prompts on the model's device.
        samples: their B rows.
        ranked: compare them, which takes forward passes.
        max_tokens: most tokens of such a pass, as ``grpo.max_tokens_per_batch``.
    """
    ids, mask, group = rollouts.ids, rollouts.mask, len(rollouts.texts) // len(samples)
    ranks = _ranks(model, prompts, rollouts, shared_prefix, max_tokens) if ranked else None
    found: list[Sampled] = []
    for at, text in enumerate(rollouts.texts):
        tails, meant, ended = None, None, bool(rollouts.ended[at])
        if ranks is not None:
            size = int(mask[at].sum())
            departs = ranks.best[at, :size] != ids[at, :size]
            tail = ranks.tails[at, :size]
            tails = tail.tolist()
            if bool(departs.any()):
                where = int(tail.masked_fill(~departs, 2.0).argmin())
                meant = int(ranks.best[at, where])
        reading = read_answer(text, known, ended=ended, tails=tails)
        found.append(Sampled(samples[at // group], text, reading, meant))
    return found


def _ranks(
    model: nn.Module,
    prompts: Mapping[str, Any],
    rollouts: Rollouts,
    shared_prefix: bool,
    max_tokens: int | None,
) -> TokenRanks:
    """Ranks of all tokens, in passes of the size of those that train."""
    ids, mask, count = rollouts.ids, rollouts.mask, len(prompts["input_ids"])
    group = len(ids) // count
    packs = [list(range(count))]
    if max_tokens is not None:
        sizes = mask.reshape(count, -1).sum(1).tolist()  # it may be a slice
        packs = plan_packs(prompts["attention_mask"].sum(1).tolist(), sizes, max_tokens)
    tails, best = torch.ones(ids.shape, device=ids.device), torch.zeros_like(ids)
    for pack in packs:
        at = torch.tensor([row * group + copy for row in pack for copy in range(group)])
        at = at.to(ids.device)
        index = torch.arange(len(pack), device=ids.device).repeat_interleave(group)
        some = select_prompts(prompts, pack)
        part = token_ranks(model, some, ids[at], mask[at], index, shared_prefix=shared_prefix)
        tails[at], best[at] = part.tails, part.best
    return TokenRanks(tails, best)


def draw(
    model: nn.Module,
    engine: RolloutEngine,
    collator: Collator,
    samples: Sequence[Sample],
    known: Vocabulary,
    config: GrpoConfig,
    device: torch.device,
    *,
    copies: int,
) -> list[Sampled]:
    """Sample ``copies`` completions of each row with the settings of ``rollout``, and read them."""
    model.eval()
    found: list[Sampled] = []
    size = config.train.per_device_train_batch_size
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        batch = runtime.to_device(collator(some, generation=True), device)
        seeds = [
            # Training puts its step here; a name gives seeds that no completion in training has.
            rollout_seed(config.train.seed, "samples", row.sample_id, copy)
            for row in some
            for copy in range(copies)
        ]
        rollouts = engine.generate(model, batch, seeds)
        found += read_rollouts(
            model,
            batch,
            rollouts,
            some,
            known,
            ranked=True,
            shared_prefix=config.grpo.shared_prefix,
            max_tokens=config.grpo.max_tokens_per_batch,
        )
    return found


def spread(rows: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` rows, evenly from the first to the last."""
    count = min(count, len(rows))
    return [rows[at * len(rows) // count] for at in range(count)]


def warnings(found: Sequence[Sampled], tokenizer: Any) -> dict[str, str]:
    """Sign -> a sentence, for each sign that more than :data:`WARN_ABOVE` of the samples show.

    It names the share, an example, the words or tokens, and what can be done.
    """
    told: dict[str, str] = {}
    for kind in KINDS:
        flagged = [one for one in found if kind in one.reading.flags]
        # One of a few samples is no share.
        if len(flagged) < 2 or len(flagged) <= WARN_ABOVE * len(found):
            continue
        parts = [f"{len(flagged) / len(found):.0%} of {len(found)} sampled answers {TITLES[kind]}"]
        unknown = Counter(word for one in flagged for word in one.reading.unknown or ())
        if kind == "unknown_words":
            parts.append("such as " + ", ".join(f"'{w}'" for w, _ in unknown.most_common(_NAMED)))
        parts.append(f"e.g. '{_excerpt(flagged[0].text)}'")
        advice = "lower rollout.temperature or rollout.top_p"
        named = worst_tokens(flagged, tokenizer)
        if named:
            listed = ", ".join(f"'{name}'" for name in named)
            advice += (
                f", or train the tokens that the model cannot say there, {listed} (a full "
                "fine-tuning does, and LoRA does with model.lora.trainable_tokens)"
            )
        told[kind] = ", ".join(parts) + f"; {advice}"
    return told


def worst_tokens(flagged: Sequence[Sampled], tokenizer: Any) -> list[str]:
    """Names of the tokens that flagged completions most often have something else in place of."""
    counts = Counter(one.meant for one in flagged if one.meant is not None)
    special = set(tokenizer.all_special_ids)
    return [
        token_name(tokenizer, token)
        for token, _ in counts.most_common(_NAMED + len(special))
        if token not in special
    ][:_NAMED]


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}..."


def check_before_training(
    found: Sequence[Sampled], tokenizer: Any, config: GrpoConfig, ranks: Ranks, record: RunRecord
) -> None:
    """Say and record what the starting model samples. Called on every rank; ``found`` is the main
    rank's.

    Raises:
        TrainingError: fewer samples are readable than ``watch.min_readable`` asks for.
    """
    refused = ""
    if ranks.is_main:
        told, measured = warnings(found, tokenizer), shares([one.reading for one in found])
        record.event("samples", step=0, samples=len(found), **measured, warnings=told)
        for sentence in told.values():
            console.print(Text(sentence, style="yellow"), soft_wrap=True)
        if found and measured["readable"] < config.watch.min_readable:
            why = next(iter(told.values()), "see the run's events")
            refused = (
                f"{measured['readable']:.0%} of {len(found)} sampled answers are readable, and "
                f"watch.min_readable is {config.watch.min_readable:g}: {why}"
            )
    # A rank that raised alone would leave the others waiting for it.
    refused = ranks.broadcast_text(refused)
    if refused:
        raise TrainingError(refused)


class SampleWatch:
    """Reads the completions of a run: its metrics, the flags of ``completions.jsonl``, and one
    warning for each sign."""

    def __init__(
        self,
        config: GrpoConfig,
        known: Vocabulary,
        tokenizer: Any,
        record: RunRecord,
        ranks: Ranks,
    ) -> None:
        self._config, self._known, self._tokenizer = config, known, tokenizer
        self._record, self._ranks, self._warned = record, ranks, set[str]()

    def read(
        self,
        model: nn.Module,
        prompts: Mapping[str, Any],
        rollouts: Rollouts,
        samples: Sequence[Sample],
        reference: ReferenceModel,
        *,
        due: bool,
    ) -> list[Sampled]:
        """Read the completions of a micro-batch. Where it is ``due`` and the loss has a reference,
        they are compared with it. Needs whole weights."""
        ranked = due and self._config.grpo.beta > 0
        with reference.of(model) if ranked else nullcontext(model) as judge:
            return read_rollouts(
                judge,
                prompts,
                rollouts,
                samples,
                self._known,
                ranked=ranked,
                shared_prefix=self._config.grpo.shared_prefix,
                max_tokens=self._config.grpo.max_tokens_per_batch,
            )

    def metrics(self, found: Sequence[Sampled], step: int) -> dict[str, float]:
        """Shares over a step that is logged, of all ranks. Called on every rank. The main one warns
        of a sign when it is first above the limit among its own completions."""
        for kind, sentence in warnings(found, self._tokenizer).items():
            if kind not in self._warned and self._record.enabled:
                self._warned.add(kind)
                self._record.event("samples", step=step, sign=kind, warning=sentence)
                console.print(Text(f"step {step}: {sentence}", style="yellow"), soft_wrap=True)
        mine = {"completions": len(found), "shares": shares([one.reading for one in found])}
        # A rank without completions must log the same names as the others.
        all_ranks = [json.loads(text) for text in self._ranks.all_gather_text(json.dumps(mine))]
        some = [one for one in all_ranks if one["completions"]]
        count = sum(one["completions"] for one in some)
        names = some[0]["shares"] if some else ()
        return {
            name: sum(one["shares"][name] * one["completions"] for one in some) / count
            for name in names
        }


def show_samples(found: Sequence[Sampled], tokenizer: Any, known: Vocabulary) -> None:
    """Print samples with their questions and flags, for ``mmemo check``."""
    for one in found:
        flags = ", ".join(flag.replace("_", " ") for flag in one.reading.flags)
        unknown = ", ".join(f"'{word}'" for word in one.reading.unknown or ())
        console.rule(Text(f"sample: {one.sample.sample_id}", style="bold"), align="left")
        console.print(Text(prompt_text(prompt_of(one.sample)), style="dim"), soft_wrap=True)
        console.print(Text(one.text), soft_wrap=True)
        if flags:
            told = f"{flags}{f' ({unknown})' if unknown else ''}"
            names = worst_tokens([one], tokenizer)
            told += f"; the model would rather say '{names[0]}' somewhere" if names else ""
            console.print(Text(told, style="yellow"), soft_wrap=True)
    if not known.is_closed:
        console.print(
            f"Words are not checked: {known.new_share:.0%} of {known.answers} answers of the data "
            "hold a word of their own.",
            style="dim",
        )
