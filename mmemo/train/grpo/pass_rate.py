"""The pass rate of each prompt: how often the model that GRPO starts from answers it correctly.

A prompt that is always or never answered correctly teaches nothing, because all of its completions
get the same reward. Pass rates are measured once before training and kept in ``pass_rate.jsonl`` of
the run folder, so that a killed run continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmemo import files
from mmemo.console import console, progress
from mmemo.data.collate import Collator
from mmemo.data.sample import Sample
from mmemo.errors import TrainingError
from mmemo.generation.rollout import RolloutEngine, rollout_seed
from mmemo.rewards.rewards import RewardSet
from mmemo.rewards.score_rollouts import GroupRollouts, outcome_reward, score_completions
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.distributed import Ranks
from mmemo.train.grpo.config import GrpoConfig, PassRateConfig
from mmemo.train.stage import Rows

FILE = "pass_rate.jsonl"


@dataclass(frozen=True, slots=True)
class Measuring:
    """What pass rates are measured with. ``start`` has the digests of the weights and of the
    manifests that training starts from, ``labels`` the label set of the manifests."""

    config: GrpoConfig
    section: PassRateConfig
    model: nn.Module
    engine: RolloutEngine
    collator: Collator
    ranks: Ranks
    folder: Path
    start: Mapping[str, str]
    labels: Sequence[str] = ()


def by_pass_rate(rows: Rows, given: Measuring, record: RunRecord) -> Rows:
    """The rows whose pass rate is within the config's limits, with 1 - pass rate as difficulty.

    Rows whose outcome could not be scored are left out. Called on every rank.

    Raises:
        TrainingError: no row is left.
    """
    rates = _measure(rows, given)
    section = given.section
    kept = [
        (replace(row, difficulty=1 - rate), length)
        for row, length in zip(rows.kept, rows.lengths, strict=True)
        if (rate := rates[row.sample_id]) is not None
        and section.min_rate <= rate <= section.max_rate
    ]
    known = [rate for rate in rates.values() if rate is not None]
    counts = {
        "prompts": len(rows.kept),
        "kept": len(kept),
        "unscored": len(rates) - len(known),
        "always_right": sum(rate == 1 for rate in known),
        "always_wrong": sum(rate == 0 for rate in known),
        "mean": sum(known) / len(known) if known else None,
    }
    record.event("pass_rate", **counts)
    if not kept:
        raise TrainingError(
            f"no prompt has a pass rate from {section.min_rate:g} to {section.max_rate:g} "
            f"({counts['always_right']} always right, {counts['always_wrong']} always wrong of "
            f"{counts['prompts']}); widen pass_rate's limits, or train the starting model longer"
        )
    if given.ranks.is_main:
        console.print(
            f"pass rate: {counts['mean']:.0%} on average; {counts['kept']} of {counts['prompts']} "
            f"prompts are kept ({counts['always_right']} always right, "
            f"{counts['always_wrong']} always wrong)"
        )
    return Rows([row for row, _ in kept], [length for _, length in kept], rows.source)


def _measure(rows: Rows, given: Measuring) -> dict[str, float | None]:
    """Pass rate by sample id; None where no completion could be scored."""
    ranks, size = given.ranks, given.section.per_device_batch_size
    name = outcome_reward(
        [one.title for one in given.config.rewards], given.config.trust, given.config.watch.outcome
    )
    outcome = [one for one in given.config.rewards if one.title == name]
    rewards = RewardSet(outcome, given.labels)
    file = given.folder / FILE
    mark = _fingerprint(given, rewards)
    known = json.loads(ranks.broadcast_text(json.dumps(_read(file, mark)) if ranks.is_main else ""))
    todo = [row for row in rows.kept if row.sample_id not in known]
    chunks = [todo[start : start + size] for start in range(0, len(todo), size)]
    given.model.eval()
    with progress("pass rate", len(chunks), unit="batches") as bar:
        for start in range(0, len(chunks), ranks.size):
            mine = chunks[start + ranks.rank : start + ranks.rank + 1]
            found = _rates(mine[0], given, rewards) if mine else {}
            # Written batch by batch, so that a killed run repeats at most one batch per rank.
            for text in ranks.all_gather_text(json.dumps(found)):
                known.update(new := json.loads(text))
                if ranks.is_main:
                    _append(file, new)
            bar.advance(min(ranks.size, len(chunks) - start))
    return {row.sample_id: known[row.sample_id] for row in rows.kept}


@torch.no_grad()
def _rates(rows: list[Sample], given: Measuring, rewards: RewardSet) -> dict[str, float | None]:
    count = given.section.rollouts
    batch = runtime.to_device(given.collator(rows, generation=True), given.ranks.device)
    seed = given.config.train.seed
    seeds = [
        # Training puts its step here; a name gives seeds that no completion in training has.
        rollout_seed(seed, "pass rate", row.sample_id, copy)
        for row in rows
        for copy in range(count)
    ]
    rollouts = given.engine.generate(given.model, batch, seeds)
    lengths = rollouts.mask.sum(1).tolist()
    ids = [ids[:n] for ids, n in zip(rollouts.ids.tolist(), lengths, strict=True)]
    drawn = GroupRollouts(0, rows, rollouts.texts, ids, rollouts.ended.tolist())
    # Rewards with TRL's signature expect a trainer's state; no step has been made yet.
    state = SimpleNamespace(global_step=0, max_steps=0)
    scores: list[float] = score_completions(rewards, [drawn], state).values[:, 0].tolist()
    found: dict[str, float | None] = {}
    for at, row in enumerate(rows):
        scored = [x for x in scores[at * count : (at + 1) * count] if not math.isnan(x)]
        passed = sum(x >= given.section.correct_from for x in scored)
        found[row.sample_id] = passed / len(scored) if scored else None
    return found


def _fingerprint(given: Measuring, rewards: RewardSet) -> str:
    """Hash of all that decides the rates. A file with another one is measured again."""
    # Not the limits: they choose prompts by their rates and change no rate.
    section = {"rollouts": given.section.rollouts, "correct_from": given.section.correct_from}
    parts: list[Any] = [
        dict(given.start),
        given.config.rollout.deciding(),
        section,
        given.config.train.seed,
        [one.describe() for one in rewards.rewards],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, mark: str) -> dict[str, float | None]:
    """What was measured before; begins the file anew when it was of something else."""
    found: dict[str, float | None] = {}
    # A damaged line costs one prompt's rate, which is then measured again.
    rows = list(files.read_intact_rows(file))
    if not rows or rows[0].get("fingerprint") != mark:
        files.write_rows(file, [{"fingerprint": mark}])
        return found
    for row in rows[1:]:
        found[row["sample_id"]] = row["pass_rate"]
    return found


def _append(file: Path, rates: Mapping[str, float | None]) -> None:
    files.append_rows(
        file, ({"sample_id": name, "pass_rate": rate} for name, rate in rates.items())
    )
