"""The GRPO stage: group-relative policy optimisation of a fine-tuned model, with progressive trust.

Each step generates G completions of some prompts with the current policy, scores them with the
config's rewards, and raises the probability of those that score above the mean of their group. The
training loop, its checkpoints and its guarantees are those of SFT.

Source: Shao et al., DeepSeekMath, arXiv 2402.03300; EmotionThinker, arXiv 2601.15668 (trust).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmemo.config import dump
from mmemo.data.collate import Collator
from mmemo.data.manifest import load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.features.source import FeatureSource
from mmemo.generation.rollout import HFRollouts, RolloutEngine
from mmemo.generation.vllm.adapter import adapted
from mmemo.generation.vllm.connect import connect
from mmemo.generation.vllm.engine import VllmRollouts
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ScratchText
from mmemo.rewards.hacking import AlertMonitor
from mmemo.rewards.opened import check_opened
from mmemo.rewards.rewards import RewardSet, label_set
from mmemo.rewards.score_rollouts import GroupRewards, outcome_reward
from mmemo.rewards.trust import ProgressiveTrust
from mmemo.rewards.validate import Proof
from mmemo.train.config import zero_stage
from mmemo.train.distributed import on_all_ranks
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.data import GrpoData
from mmemo.train.grpo.objective import GrpoObjective
from mmemo.train.grpo.pass_rate import Measuring, by_pass_rate
from mmemo.train.grpo.proof import CHECKED_ROWS, prove_all, prove_before_training
from mmemo.train.grpo.samples import (
    Sampled,
    SampleWatch,
    check_before_training,
    draw,
    known_words,
    show_samples,
    spread,
)
from mmemo.train.reference import (
    ReferenceKind,
    check_adapter_off,
    disable_dropout,
    make_reference,
    starts_new_adapter,
)
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    MediaStage,
    RunContext,
    StageContext,
    StageParts,
    check_packs,
    input_digests,
    row_texts,
    stage_samples,
    usable_rows,
)

__all__ = ["GrpoConfig", "GrpoData", "run_grpo"]

SHOWN_SAMPLES, SHOWN_TOKENS = 3, 64
"""Completions that ``mmemo check`` shows, and their most tokens."""

_HARMLESS = ("timeout_s", "max_failure_share", "failure_window")
"""Settings of a reward that do not decide the weights."""


def run_grpo(config: GrpoConfig, engine: RolloutEngine | None = None) -> Path:
    """Run the stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Args:
        engine: what generates the completions; None: the model itself.

    Raises:
        ConfigError: config, data, rewards or model do not fit, or changed since the checkpoint.
        DataError: a row is invalid.
        RewardError: a reward does not pay for the right answer, or pays for an attack.
        TrainingError: too many clips are bad, too many rewards failed, nothing is scored, too many
            steps in a row were not finite, or no prompt is left.
        RolloutError: a vLLM server gives no completions any more, with a checkpoint saved.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return GrpoStage.start(config, engine=engine)


class GrpoStage(MediaStage[GrpoConfig]):
    """Group-relative policy optimisation: prompts in, the rewards of their completions up."""

    kind = "grpo"
    draws = True

    def __init__(
        self, config: GrpoConfig, context: RunContext, engine: RolloutEngine | None = None
    ) -> None:
        super().__init__(config, context)
        self.engine = engine
        # Loaded before anything is written: a reward that cannot be loaded leaves no trace.
        self.rewards = GroupRewards(
            config.rewards,
            config.trust,
            config.rollout.num_generations,
            config.grpo.scale_rewards,
            context.record,
            config.watch.outcome,
            config.watch.reference_steps,
        )

    @classmethod
    def check_config(cls, config: GrpoConfig) -> None:
        super().check_config(config)
        check_packs(config.model, config.grpo.shared_prefix, "grpo.shared_prefix=false")
        check_reference(config)

    def details(self) -> dict[str, Any]:
        return {"rewards": self._described()}

    def _described(self) -> list[dict[str, Any]]:
        return [one.describe() for one in self.rewards.rewards.rewards]

    def build(self) -> StageParts:
        config, ranks = self.config, self.context.ranks
        samples = load_samples(config.data)
        self._prove(samples)
        context = self.load(row_texts(samples))
        loaded = context.loaded
        check_opened(config.rewards, samples, loaded.processor.opened)
        if config.grpo.disable_dropout:
            disable_dropout(loaded.model)
        kind, zero = reference_kind(config), zero_stage(config.run)
        start = None if kind is None else make_reference(loaded.model, kind, zero_stage=zero)
        engine = self.engine or self._engine(samples, context)
        inputs = input_digests(config.model, config.data)
        data = self._data(stage_samples(samples, config.curriculum), context, engine, inputs)
        watch = self._read_samples(samples, data, context, engine)
        objective = GrpoObjective(
            config,
            engine,
            self.rewards,
            {row.sample_id: row for row in data.rows.kept},
            ranks,
            self.context.folder,
            loaded.processor.tokenizer.eos_token_id,
            watch,
            reference=start,
            data=data,
        )
        return StageParts(
            model=loaded.model,
            objective=objective,
            data=data,
            identity=self._identity(data, inputs),
            save=context.save_final,
            watch=self._watch(),
            before_training=lambda trainer: objective.reference.at_start(trainer.engine.model),
        )

    def _engine(self, samples: Sequence[Sample], context: StageContext) -> RolloutEngine:
        config, loaded, ranks = self.config, context.loaded, self.context.ranks
        if config.rollout.engine == "hf":
            processor = loaded.processor
            return HFRollouts(
                processor.tokenizer, context.backbone, config.rollout, opened=processor.opened
            )

        if adapted(loaded.model) is None:
            raise ConfigError(
                "vLLM is handed over the adapter that is trained, and there is none; set "
                "model.lora, or rollout.engine: hf"
            )

        def served() -> VllmRollouts:
            found = connect(
                config.rollout,
                loaded,
                self.context.folder,
                samples=samples,
                media_root=Path(config.data.media_root),
                decode=config.decode,
                max_length=config.data.max_length,
                rank=ranks.rank,
            )
            self.context.exits.callback(found.close)
            found.check()
            return found

        return on_all_ranks(ranks, served)

    def _prove(self, samples: Sequence[Sample]) -> None:
        """Before the model is loaded: a reward that is refused costs seconds."""
        config, labels = self.config, label_set(samples)
        self.rewards.use_labels(labels)
        prove_before_training(
            config.rewards,
            stage_samples(list(samples), config.curriculum),
            labels,
            self.context.ranks,
            self.context.record,
            enabled=config.watch.prove_rewards,
        )

    def _read_samples(
        self,
        samples: Sequence[Sample],
        data: GrpoData,
        context: StageContext,
        engine: RolloutEngine,
    ) -> SampleWatch:
        """Read a few completions of the starting model, and return what reads those of the run."""
        config, run, loaded = self.config, self.context, context.loaded
        known, tokenizer = known_words(config, samples), loaded.processor.tokenizer
        if config.watch.samples:
            rows = spread(data.rows.kept, config.watch.samples) if run.ranks.is_main else []
            device, copies = run.ranks.device, config.rollout.num_generations
            arguments = (rows, known, config, device)
            found = on_all_ranks(
                run.ranks,
                lambda: draw(loaded.model, engine, data.collator, *arguments, copies=copies),
            )
            check_before_training(found, tokenizer, config, run.ranks, run.record)
        return SampleWatch(config, known, tokenizer, run.record, run.ranks)

    def _watch(self) -> AlertMonitor:
        trusted = self.config.trust.trusted if self.config.trust else ()
        rewards = self.rewards
        return AlertMonitor(self.context.record, rewards.names, rewards.outcome, trusted)

    def _data(
        self,
        samples: list[Sample],
        context: StageContext,
        engine: RolloutEngine,
        inputs: dict[str, str],
    ) -> GrpoData:
        config = self.config
        rows = usable_rows(samples, context, config.data, generation=True)
        collator = Collator(context.loaded.processor, rows.source, config.data.max_length)
        if config.pass_rate is not None:
            measuring = Measuring(
                config=config,
                section=config.pass_rate,
                model=context.loaded.model,
                engine=engine,
                collator=collator,
                ranks=self.context.ranks,
                folder=self.context.folder,
                start=inputs,
                labels=self.rewards.labels,
            )
            rows = by_pass_rate(rows, measuring, self.context.record)
        return GrpoData(
            rows,
            collator,
            config.curriculum,
            self.rows_per_step,
            config.train.seed,
            together=config.generation_steps,
            repeats=config.grpo.num_iterations,
            kept_batches=config.train.gradient_accumulation_steps
            * (config.generation_steps + config.run.prefetch),
        )

    def _identity(self, data: GrpoData, inputs: dict[str, str]) -> Identity:
        """Everything that decides the weights: config, manifests, reward files, rows, lengths."""
        whole = dump(self.config)
        left_out = ("output_dir", "watch", "run", "store", "decode")
        deciding = {key: value for key, value in whole.items() if key not in left_out}
        for one in deciding["rewards"]:
            for name in _HARMLESS:
                one.pop(name)
        deciding["rollout"] = self.config.rollout.deciding()
        rows = [
            # The difficulty may be a measured pass rate, by which the curriculum orders the rows.
            [row.sample_id, length, row.difficulty]
            for row, length in zip(data.rows.kept, data.rows.lengths, strict=True)
        ]
        files = {f"reward {one['name']}": str(one["sha256"]) for one in self._described()}
        return self.identity(deciding, {**inputs, **files}, rows)


def reference_kind(config: GrpoConfig) -> ReferenceKind | None:
    """What computes the reference; None where ``grpo.beta`` asks for none."""
    if config.grpo.beta == 0:
        return None
    return config.grpo.reference or ("adapter_off" if starts_new_adapter(config.model) else "copy")


def check_reference(config: GrpoConfig) -> None:
    """Check that disabling the adapter gives the reference, if it is to be computed in this way.

    Raises:
        ConfigError: there is no new adapter.
    """
    if reference_kind(config) == "adapter_off":
        check_adapter_off(config.model, "grpo.reference", "copy or copy_cpu")


def sample_for_check(config: GrpoConfig, samples: Sequence[Sample], loaded: Loaded) -> None:
    """Print what the model of the config answers to three prompts, for ``mmemo check``.

    A language model with random weights is not asked, and rows of bad clips are passed over.
    """
    if isinstance(config.model.text, ScratchText):
        return
    root, backbone = Path(config.data.media_root), unwrap(loaded.model)
    known, tokenizer = known_words(config, samples), loaded.processor.tokenizer
    # Few tokens suffice to see, and the model may be on a CPU.
    most = min(config.rollout.max_completion_length, SHOWN_TOKENS)
    rollout = config.rollout.model_copy(update={"max_completion_length": most})
    engine = HFRollouts(tokenizer, backbone, rollout, opened=loaded.processor.opened)
    device = next(loaded.model.parameters()).device
    with FeatureSource(samples, backbone, None, root, config.decode) as source:
        collator, found = Collator(loaded.processor, source), list[Sampled]()
        for row in spread(samples, SHOWN_SAMPLES):
            with suppress(MediaError):  # named with the other clips that cannot be used
                arguments = ([row], known, config, device)
                found += draw(loaded.model, engine, collator, *arguments, copies=1)
    show_samples(found, tokenizer, known)


def check_grpo(
    config: GrpoConfig, samples: Sequence[Sample], labels: Sequence[str] | None = None
) -> list[Proof]:
    """``mmemo check`` of what only a GRPO config has: rewards, trust, the reference of the KL.

    Loads and proves every reward, and prints what was proved.

    Args:
        samples: the rows that the stage draws.
        labels: the label set of the manifests; None: that of ``samples``.

    Raises:
        ConfigError: a reward cannot be loaded, trust names a reward that does not exist, or there
            is no reference for ``grpo.beta``.
        RewardError: a reward does not pay for the right answer, or pays for a hack.
    """
    check_reference(config)
    configs, trust = config.rewards, config.trust
    loaded = RewardSet(configs)
    outcome_reward(loaded.names, trust, config.watch.outcome)
    if trust is not None:
        ProgressiveTrust(trust, loaded.names, loaded.weights)
    return prove_all(
        configs, samples, label_set(samples) if labels is None else labels, CHECKED_ROWS
    )
