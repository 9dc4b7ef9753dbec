"""Supervised fine-tuning of one curriculum stage: manifests in, a model or an adapter out.

B rows, L tokens of a row, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from mmemo.config import Config, dump
from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.features.encode import StoreConfig
from mmemo.generation.logprobs import row_scores
from mmemo.generation.packing import PackedRows, fill_packs, pack_rows, packed_places
from mmemo.losses.sft import answer_loss, answer_tokens
from mmemo.media.config import DecodeConfig
from mmemo.models.attention.shared_prefix import RowsLayout
from mmemo.models.build import ModelConfig
from mmemo.train import dataloader
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.equal_step import equal_step
from mmemo.train.expert_balance import expert_terms
from mmemo.train.metrics import Ratio
from mmemo.train.resume import Identity
from mmemo.train.router_balance import RouterBalanced
from mmemo.train.stage import (
    MediaStage,
    Split,
    StageContext,
    StageParts,
    check_packs,
    input_digests,
    row_texts,
    split_plan,
    stage_samples,
    unmatched,
    usable_rows,
)
from mmemo.train.trainer import Loss, Objective


class PackingConfig(Config):
    """Rows packed into sequences without padding, each attending to itself alone."""

    max_tokens: int = Field(ge=1)
    """Maximum number of tokens of a sequence, media tokens included. A longer row is a sequence of
    its own."""


class SftConfig(Config):
    """One stage of supervised fine-tuning."""

    output_dir: str
    """Folder for checkpoints, metrics, the event log, and the result in ``final``."""
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    """Held-out rows: their loss is reported and they are never trained on."""
    curriculum: CurriculumConfig = CurriculumConfig()
    trainable: list[str] = Field(default=["lm", "connectors"], min_length=1)
    """Parts of the model that are trained: ``lm``, ``connectors``, ``fusion``, or the name of one
    branch."""
    packing: PackingConfig | None = None
    """Pack rows into sequences by a budget of tokens. A micro-batch is then a sequence, whatever
    ``per_device_train_batch_size`` is; the rows of an optimizer step stay the same. None pads the
    rows of a micro-batch to the longest."""
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()


class SftObjective:
    """Mean negative log-likelihood of the answers' tokens, in nats. Training adds the penalties on
    the model's experts, if it has some.

    Args:
        max_logits: as ``train.max_logits``.
    """

    def __init__(self, max_logits: int | None = None) -> None:
        self.max_logits = max_logits

    def weight(self, batch: Batch) -> float:
        return float(batch["answer_tokens"])

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        found = row_scores(
            model,
            {name: batch[name] for name in batch["inputs"]},
            batch["predictors"],
            batch["targets"],
            packed=packed_rows(batch),
            max_logits=self.max_logits,
        )
        assert found.correct is not None
        out = answer_loss(found.logps, found.correct, batch["rows"], len(batch["input_ids"]))
        tokens = float(batch["answer_tokens"])
        metrics: dict[str, Ratio] = {"token_accuracy": (out.correct.sum(), tokens)}
        experts = expert_terms(model, weight=tokens)
        if experts is None:
            return Loss(out.rows, metrics)
        rows = out.rows + experts.penalty / len(out.rows) if model.training else out.rows
        return Loss(rows, metrics | experts.metrics)


def _balanced(objective: Objective, coefficient: float | None) -> Objective:
    return RouterBalanced(objective, coefficient) if coefficient else objective


class SftData:
    """The batches of a stage. ``batch_size`` rows make one optimizer step over all ranks.

    ``max_tokens``: pack the rows of a step into sequences of at most so many tokens; None does not
    pack.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        lengths: Sequence[int],
        collator: Collator,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.samples, self.lengths, self.collator = samples, lengths, collator
        self.curriculum, self.batch_size, self.seed = curriculum, batch_size, seed

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(
            self.samples, self.curriculum, self.lengths, self.batch_size, self.seed, epoch
        )

    def cut(self, rows: Sequence[int], shards: int) -> list[list[int]]:
        """The rows of each micro-batch of a step, over all ranks."""
        if self.max_tokens is None:
            return dataloader.shards(rows, shards)
        packs = fill_packs([self.lengths[row] for row in rows], self.max_tokens)
        return [[rows[at] for at in pack] for pack in packs]

    def collate(self, rows: Sequence[int]) -> Batch:
        batch = self.collator([self.samples[row] for row in rows])
        return sft_batch(batch, packed=self.max_tokens is not None)


def sft_batch(batch: dict[str, Any], *, packed: bool = False) -> Batch:
    """Add to a collated batch what :class:`SftObjective` reads before it is on a device: the names
    of the model's ``inputs``; ``predictors``, ``targets`` and ``rows`` (K,) of the answers' tokens
    (:class:`~mmemo.losses.sft.AnswerTokens`); and their number ``answer_tokens``. ``packed`` adds
    what :func:`packed_rows` reads."""
    labels: Tensor = batch["labels"]
    inputs = [
        name for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"
    ]
    # Found here, on the CPU: on a GPU, each would wait until the device has caught up.
    tokens = answer_tokens(labels)
    found = {
        **batch,
        "inputs": inputs,
        "predictors": tokens.predictors,
        "targets": tokens.targets,
        "rows": tokens.rows,
        "answer_tokens": len(tokens.targets),
    }
    if packed:
        rows = pack_rows(batch["attention_mask"])
        found["predictors"] = packed_places(rows, tokens.predictors, labels.numel())
        # On their own, because only the tensors of a batch are moved to its device.
        found["places"], found["row_slots"] = rows.places, rows.layout.slots
        found["row_lengths"] = rows.layout.lengths
    return found


def packed_rows(batch: Batch) -> PackedRows | None:
    """How the rows of a batch are packed; None where they are not."""
    if "places" not in batch:
        return None
    return PackedRows(batch["places"], RowsLayout(batch["row_lengths"], batch["row_slots"]))


def run_sft(config: SftConfig) -> Path:
    """Run one stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Raises:
        ConfigError: config, data or model do not fit, or changed since the checkpoint.
        DataError: a row is invalid.
        TrainingError: too many clips are bad, or too many steps in a row were not finite.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return SftStage.start(config)


class SftStage(MediaStage[SftConfig]):
    """Supervised fine-tuning: rows with answers in, the cross-entropy of the answers down."""

    kind = "sft"
    measures_step = True

    @classmethod
    def check_config(cls, config: SftConfig) -> None:
        super().check_config(config)
        check_packs(config.model, config.packing is not None, "packing=null")

    def build(self) -> StageParts:
        config = self.config
        rows = load_samples(config.data)
        eval_rows = load_samples(config.eval_data) if config.eval_data else []
        # A tokenizer trained from scratch serves the later stages too: it sees every tier's texts.
        context = self.load(row_texts(rows))
        data = self._data(stage_samples(rows, config.curriculum), context, "train")
        identity, objective = self._identity(data), SftObjective(config.train.max_logits)
        if unmatched(context.loaded, config.model):
            context = equal_step(context, config, data, objective, identity)
        evaluation = None
        if config.eval_data is not None:
            evaluation = self._data(eval_rows, context, "eval")
        return StageParts(
            model=context.loaded.model,
            objective=_balanced(objective, config.train.router_aux_loss_coef),
            data=data,
            eval_data=evaluation,
            identity=identity,
            save=context.save_final,
        )

    def _data(self, rows: Sequence[Sample], context: StageContext, split: Split) -> SftData:
        plan = split_plan(self, self.config, split)
        usable = usable_rows(rows, context, plan.data, split=split)
        collator = Collator(context.loaded.processor, usable.source, plan.data.max_length)
        seed, packing = self.config.train.seed, self.config.packing
        return SftData(
            usable.kept,
            usable.lengths,
            collator,
            plan.curriculum,
            plan.batch_size,
            seed,
            max_tokens=None if packing is None else packing.max_tokens,
        )

    def _identity(self, data: SftData) -> Identity:
        """Everything that decides the weights: config, manifests, rows that are left, lengths."""
        whole = dump(self.config)
        deciding = {
            key: whole[key]
            for key in ("model", "data", "curriculum", "trainable", "packing", "train")
        }
        rows = [[s.sample_id, n] for s, n in zip(data.samples, data.lengths, strict=True)]
        return self.identity(deciding, input_digests(self.config.model, self.config.data), rows)
