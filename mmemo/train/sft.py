"""Supervised fine-tuning of one curriculum stage: manifests in, a model or an adapter out.

B rows, L tokens of a row, K positions that predict an answer token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from mmemo.config import Config, dump, save_resolved
from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.features.encode import StoreConfig, open_store
from mmemo.features.store import FeatureStore
from mmemo.losses.sft import answer_loss, answer_positions, count_answer_tokens
from mmemo.media.config import DecodeConfig
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.run_log import RunRecord
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks, StopRequest, run_lock
from mmemo.train.expert_balance import expert_terms
from mmemo.train.metrics import Ratio
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    check_deepspeed,
    input_digests,
    row_texts,
    save_final,
    say_what_learns,
    stage_samples,
    usable_rows,
    versions,
)
from mmemo.train.trainer import Loss, Trainer


class SftConfig(Config):
    """One stage of supervised fine-tuning."""

    output_dir: str
    """Checkpoints, metrics, the run record, and the result in ``final``."""
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    """Rows whose loss is reported and never learnt from."""
    curriculum: CurriculumConfig = CurriculumConfig()
    trainable: list[str] = Field(default=["lm", "connectors"], min_length=1)
    """Parts that learn: ``lm``, ``connectors``, ``fusion``, or one branch's name."""
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()


class SftObjective:
    """Mean negative log-likelihood of the answers' tokens, in nats. In training, plus the
    penalties of the model's experts if it has some."""

    def weight(self, batch: Batch) -> float:
        return float(batch["answer_tokens"])

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logits: Tensor = model(
            **{name: batch[name] for name in batch["inputs"]},
            logits_to_keep=batch["positions"],
            use_cache=False,
        ).logits  # (B, K, V)
        out = answer_loss(logits, batch["labels"], batch["positions"])
        tokens = float(batch["answer_tokens"])
        metrics: dict[str, Ratio] = {"token_accuracy": (out.correct.sum(), tokens)}
        experts = expert_terms(model)
        if experts is None:
            return Loss(out.rows, metrics)
        # As often as the micro-batch has tokens: the step's mean then has it once.
        rows = out.rows + experts.penalty * out.tokens if model.training else out.rows
        return Loss(rows, metrics | experts.metrics)


class SftData:
    """The batches of a stage. ``batch_size`` rows make one optimizer step, over all ranks."""

    def __init__(
        self,
        samples: Sequence[Sample],
        lengths: Sequence[int],
        collator: Collator,
        curriculum: CurriculumConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        self.samples, self.lengths, self.collator = samples, lengths, collator
        self.curriculum, self.batch_size, self.seed = curriculum, batch_size, seed

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(
            self.samples, self.curriculum, self.lengths, self.batch_size, self.seed, epoch
        )

    def collate(self, rows: Sequence[int]) -> Batch:
        return sft_batch(self.collator([self.samples[row] for row in rows]))


def sft_batch(batch: dict[str, Any]) -> Batch:
    """A collated batch with what the objective needs to know before it is on a device."""
    labels: Tensor = batch["labels"]
    inputs = [
        name for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"
    ]
    return {
        **batch,
        "inputs": inputs,
        "positions": answer_positions(labels),
        "answer_tokens": count_answer_tokens(labels),
    }


def run_sft(config: SftConfig) -> Path:
    """Run one stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Raises:
        ConfigError: config, data or model do not fit, or changed since the checkpoint.
        DataError: a row is wrong.
        TrainingError: too many bad clips or non-finite steps.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    check_deepspeed(config.run, config.store)
    folder = Path(config.output_dir)
    with ExitStack() as exits:
        stop = exits.enter_context(StopRequest())
        ranks = Ranks(cpu=config.run.use_cpu)
        exits.enter_context(run_lock(folder, ranks))
        return _Stage(config, folder, ranks, stop, exits).run()


@dataclass
class _Stage:
    config: SftConfig
    folder: Path
    ranks: Ranks
    stop: StopRequest
    exits: ExitStack

    def run(self) -> Path:
        config, ranks = self.config, self.ranks
        record = RunRecord(self.folder, enabled=ranks.is_main)
        if ranks.is_main:
            save_resolved(config, self.folder / "config.yaml")
        record.event("sft", config=dump(config), versions=versions(), ranks=ranks.size)
        rows = load_samples(config.data)
        eval_rows = load_samples(config.eval_data) if config.eval_data else []
        # A tokenizer trained from scratch serves the later stages too: it sees every tier's texts.
        loaded = load_model(config.model, row_texts(rows), base_dir=self.folder / "base")
        rows = stage_samples(rows, config.curriculum)
        learns = set_trainable(loaded.model, config.trainable)
        say_what_learns(loaded, learns, ranks)
        store = open_store(config.store, self.folder)
        if store is not None:
            self.exits.enter_context(store)
        train, kept = self._data(rows, loaded, store, record, "train")
        evaluation = None
        if config.eval_data is not None:
            evaluation, _ = self._data(eval_rows, loaded, store, record, "eval")
        loop = Trainer(
            model=loaded.model,
            objective=SftObjective(),
            data=train,
            eval_data=evaluation,
            folder=self.folder,
            train=config.train,
            run=config.run,
            identity=self._identity(train, kept),
            record=record,
            ranks=ranks,
            stop=self.stop,
        )
        loop.run()
        return save_final(loaded, loop, self.folder, ranks, record)

    def _data(
        self,
        rows: Sequence[Sample],
        loaded: Loaded,
        store: FeatureStore | None,
        record: RunRecord,
        what: str,
    ) -> tuple[SftData, list[Sample]]:
        config, ranks = self.config, self.ranks
        data = config.data if what == "train" or config.eval_data is None else config.eval_data
        found = usable_rows(
            rows,
            loaded,
            store,
            record,
            data=data,
            decode=config.decode,
            run=config.run,
            out_dir=self.folder if what == "train" else self.folder / "eval_data",
            ranks=ranks,
            exits=self.exits,
        )
        collator = Collator(loaded.processor, found.source, data.max_length)
        train = config.train
        if what == "train":
            size = train.per_device_train_batch_size * train.gradient_accumulation_steps
            curriculum = config.curriculum
        else:
            size = config.run.per_device_eval_batch_size
            curriculum = CurriculumConfig(longest_first=False)
        size *= ranks.size
        made = SftData(found.kept, found.lengths, collator, curriculum, size, train.seed)
        return made, found.kept

    def _identity(self, data: SftData, kept: Sequence[Sample]) -> Identity:
        """Everything that decides the weights: config, manifests, rows that are left, lengths."""
        whole = dump(self.config)
        deciding = {
            key: whole[key] for key in ("model", "data", "curriculum", "trainable", "train")
        }
        # Only their product decides which rows make a step.
        deciding["train"].pop("gradient_accumulation_steps")
        deciding["train"]["rows_per_step"] = data.batch_size
        rows = json.dumps([[s.sample_id, n] for s, n in zip(kept, data.lengths, strict=True)])
        inputs = input_digests(self.config.model, self.config.data)
        inputs["rows"] = hashlib.sha256(rows.encode()).hexdigest()
        return Identity(deciding, inputs)
