"""Group-relative policy optimisation with progressive trust: an SFT model in, a better one out.

Each step draws G completions of some prompts from the present policy, scores them with the
config's rewards, compares each with its group, and moves the policy towards what was better. The
loop, its checkpoints and its promises are those of SFT.

Source: Shao et al., DeepSeekMath, arXiv 2402.03300; EmotionThinker, arXiv 2601.15668 (trust).
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmemo.config import dump, save_resolved
from mmemo.console import console, progress
from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError
from mmemo.features.encode import open_store
from mmemo.generation.rollout import HFRollouts, RolloutEngine
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.rewards.hacking import AlertMonitor
from mmemo.rewards.rewards import RewardSet
from mmemo.rewards.score_rollouts import GroupRewards, outcome_reward
from mmemo.rewards.trust import ProgressiveTrust
from mmemo.rewards.validate import Proof, proof_rows, prove
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks, StopRequest, run_lock
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.objective import GrpoObjective
from mmemo.train.grpo.pass_rate import Measuring, by_pass_rate
from mmemo.train.reference import disable_dropout
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    Rows,
    check_deepspeed,
    input_digests,
    row_texts,
    save_final,
    say_what_learns,
    stage_samples,
    usable_rows,
    versions,
)
from mmemo.train.trainer import Trainer

__all__ = ["GrpoConfig", "GrpoData", "run_grpo"]

_HARMLESS = ("timeout_s", "max_failure_share", "failure_window")
"""Settings of a reward that decide no weight."""


class GrpoData:
    """The prompts of a run. ``batch_size`` of them make one optimizer step, over all ranks;
    ``repeats`` steps in a row have the same ones."""

    def __init__(
        self,
        rows: Rows,
        collator: Collator,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
        repeats: int,
        pieces: int,
    ) -> None:
        """``pieces``: micro-batches of one rank in a step."""
        self.rows, self.collator, self.curriculum = rows, collator, curriculum
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self._last: OrderedDict[tuple[int, ...], Batch] = OrderedDict()
        self._most = pieces

    def plan(self, epoch: int) -> list[list[int]]:
        planned = plan_epoch(
            self.rows.kept, self.curriculum, self.rows.lengths, self.batch_size, self.seed, epoch
        )
        return [rows for rows in planned for _ in range(self.repeats)]

    def collate(self, rows: Sequence[int]) -> Batch:
        key = tuple(rows)
        if key not in self._last:
            samples = [self.rows.kept[row] for row in rows]
            self._last[key] = self.collator(samples, generation=True)
        while len(self._last) > self._most:
            self._last.popitem(last=False)
        return self._last[key]


def run_grpo(config: GrpoConfig, engine: RolloutEngine | None = None) -> Path:
    """Run the stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Args:
        engine: where completions come from; None: the model itself.

    Raises:
        ConfigError: config, data, rewards or model do not fit, or changed since the checkpoint.
        DataError: a row is wrong.
        TrainingError: too many bad clips, failed rewards or non-finite steps; no prompt is left.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    check_deepspeed(config.run, config.store)
    folder = Path(config.output_dir)
    with ExitStack() as exits:
        stop = exits.enter_context(StopRequest())
        ranks = Ranks(cpu=config.run.use_cpu)
        exits.enter_context(run_lock(folder, ranks))
        return _Stage(config, folder, ranks, stop, exits, engine).run()


@dataclass
class _Stage:
    config: GrpoConfig
    folder: Path
    ranks: Ranks
    stop: StopRequest
    exits: ExitStack
    engine: RolloutEngine | None

    def run(self) -> Path:
        config, ranks = self.config, self.ranks
        check_reference(config.model, config.grpo.beta)
        record = RunRecord(self.folder, enabled=ranks.is_main)
        rewards = self._rewards(record)
        if ranks.is_main:
            save_resolved(config, self.folder / "config.yaml")
        described = [one.describe() for one in rewards.rewards.rewards]
        record.event(
            "grpo",
            config=dump(config),
            versions=versions(),
            ranks=ranks.size,
            rewards=described,
        )
        samples = load_samples(config.data)
        loaded = load_model(config.model, row_texts(samples), base_dir=self.folder / "base")
        say_what_learns(loaded, set_trainable(loaded.model, config.trainable), ranks)
        if config.grpo.disable_dropout:
            disable_dropout(loaded.model)
        runtime.prepare(config.train, config.run, ranks)
        nn.Module.to(loaded.model, ranks.device)
        data, identity = self._data(samples, loaded, record, described)
        objective = GrpoObjective(
            config,
            self.engine or self._own_engine(loaded),
            rewards,
            {row.sample_id: row for row in data.rows.kept},
            ranks,
            self.folder,
            loaded.processor.tokenizer.eos_token_id,
        )
        loop = Trainer(
            model=loaded.model,
            objective=objective,
            data=data,
            folder=self.folder,
            train=config.train,
            run=config.run,
            identity=identity,
            record=record,
            ranks=ranks,
            stop=self.stop,
            watch=self._watch(record, rewards),
        )
        loop.run()
        return save_final(loaded, loop, self.folder, ranks, record)

    def _rewards(self, record: RunRecord) -> GroupRewards:
        config = self.config
        return GroupRewards(
            config.rewards,
            config.trust,
            config.rollout.num_generations,
            config.grpo.scale_rewards,
            record,
            config.watch.outcome,
            config.watch.reference_steps,
        )

    def _watch(self, record: RunRecord, rewards: GroupRewards) -> AlertMonitor:
        trusted = self.config.trust.trusted if self.config.trust else ()
        return AlertMonitor(record, rewards.names, rewards.outcome, trusted)

    def _own_engine(self, loaded: Loaded) -> HFRollouts:
        return HFRollouts(loaded.processor.tokenizer, unwrap(loaded.model), self.config.rollout)

    def _data(
        self,
        samples: list[Sample],
        loaded: Loaded,
        record: RunRecord,
        rewards: list[dict[str, Any]],
    ) -> tuple[GrpoData, Identity]:
        config, ranks = self.config, self.ranks
        store = open_store(config.store, self.folder)
        if store is not None:
            self.exits.enter_context(store)
        rows = usable_rows(
            stage_samples(samples, config.curriculum),
            loaded,
            store,
            record,
            data=config.data,
            decode=config.decode,
            run=config.run,
            out_dir=self.folder,
            ranks=ranks,
            exits=self.exits,
            generation=True,
        )
        collator = Collator(loaded.processor, rows.source, config.data.max_length)
        inputs = input_digests(config.model, config.data)
        if config.pass_rate is not None:
            engine = self.engine or self._own_engine(loaded)
            given = (config, config.pass_rate, loaded.model, engine, collator, ranks, self.folder)
            rows = by_pass_rate(rows, Measuring(*given, inputs), record)
        train = config.train
        pieces = train.gradient_accumulation_steps
        data = GrpoData(
            rows,
            collator,
            config.curriculum,
            train.per_device_train_batch_size * pieces * ranks.size,
            train.seed,
            config.grpo.num_iterations,
            pieces,
        )
        return data, self._identity(data, inputs, rewards)

    def _identity(
        self, data: GrpoData, inputs: dict[str, str], rewards: list[dict[str, Any]]
    ) -> Identity:
        """Everything that decides the weights: config, manifests, reward files, rows, lengths."""
        whole = dump(self.config)
        left_out = ("output_dir", "watch", "run", "store", "decode")
        deciding = {key: value for key, value in whole.items() if key not in left_out}
        for one in deciding["rewards"]:
            for name in _HARMLESS:
                one.pop(name)
        # Only their product decides which prompts make a step.
        deciding["train"].pop("gradient_accumulation_steps")
        deciding["train"]["rows_per_step"] = data.batch_size
        rows = [
            [row.sample_id, length, row.difficulty]
            for row, length in zip(data.rows.kept, data.rows.lengths, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        files = {f"reward {one['name']}": str(one["sha256"]) for one in rewards}
        return Identity(deciding, {**inputs, **files, "rows": digest})


def check_reference(model: ModelConfig, beta: float) -> None:
    """Raises:
    ConfigError: ``beta`` asks for a reference, and no adapter can be switched off to have it.
    """
    if beta == 0:
        return
    path = None if model.path is None else Path(model.path)
    on_adapter = path is not None and (path / "adapter_config.json").exists()
    if on_adapter and model.adapter == "continue":
        raise ConfigError(
            "grpo.beta: the reference is the model without its adapter, and the adapter of "
            f"'{path}' is what SFT learnt; set model.adapter=merge with a new model.lora, or beta=0"
        )
    if model.lora is None:
        raise ConfigError(
            "grpo.beta: the reference is the model without its adapter, and this one would have "
            "none; give model.lora, or set grpo.beta=0"
        )


# ``mmemo check`` for what only a GRPO config has: rewards, trust, the reference of the KL.

_ROWS = 64
"""Rows that a reward is proved on, spread evenly; a judge may be slow and cost money."""


def check_grpo(config: GrpoConfig, samples: Sequence[Sample]) -> list[Proof]:
    """Load and prove every reward, and print what was proved.

    Raises:
        ConfigError: a reward cannot be loaded, trust names one that is not there, or there is no
            reference for ``grpo.beta``.
        RewardError: a reward does not pay for the right answer, or pays for a hack.
    """
    check_reference(config.model, config.grpo.beta)
    configs, trust = config.rewards, config.trust
    loaded = RewardSet(configs)
    outcome_reward(loaded.names, trust, config.watch.outcome)
    if trust is not None:
        ProgressiveTrust(trust, loaded.names, loaded.weights)
    step = -(-len(samples) // _ROWS)
    rows = proof_rows(samples[:: max(1, step)])
    proofs: list[Proof] = []
    with progress("rewards", len(configs)) as bar:
        for one in configs:
            proofs.append(prove(one, rows))
            bar.advance()
    for proof in proofs:
        if proof.proved:
            console.print(
                f"reward {proof.reward}: proved on {proof.rows} of {proof.asked} rows; the right "
                "answer scores the most, empty, listing, copied and master-key answers the least."
            )
        else:
            console.print(f"[yellow]reward {proof.reward}: not proved; {proof.note}[/yellow]")
    return proofs
