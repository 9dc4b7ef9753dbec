"""The reward-model stage: trains the local judge, a text model with a head for each dimension.

It reads rows with ``candidate`` and ``grades``, as ``mmemo world`` writes them, and trains with the
same loop as every stage. It then grades the answers of speakers that it never met, and reports how
well its grades agree with the known ones.

Shapes: B rows, K = 4 dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from pydantic import Field
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mmemo import content
from mmemo.answers.messages import prompt_text
from mmemo.config import Config, dump
from mmemo.console import console, progress
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, DataError
from mmemo.models.composed import scratch
from mmemo.models.config import AdapterConfig, ScratchText
from mmemo.rewards.judge.calibration import (
    CALIBRATION,
    Graded,
    calibrate,
    calibration_table,
    draw_calibration,
    facts_read,
    headline,
    refusal,
)
from mmemo.rewards.judge.reward_model import (
    SCORER_INPUTS,
    LocalJudge,
    LocalJudgeConfig,
    Reader,
    Scorer,
    Tokens,
    expected_grades,
    ordinal_loss,
    save_scorer,
    scorer_digest,
)
from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST, JudgeItem, facts
from mmemo.rewards.rewards import columns_of, prompt_of
from mmemo.statistics import BootstrapConfig
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.resume import Identity
from mmemo.train.stage import StageParts, TrainStage, commit_final, weights_digest
from mmemo.train.trainer import Loss, Trainer

_COLUMNS = ("candidate", "grades", "faults", "contrast")


class ScorerConfig(Config):
    """The text model under the heads."""

    text: str | ScratchText
    """Hub id or folder of any text model that transformers' AutoModel loads, an encoder or a causal
    LM; or ``scratch``, a small model with new weights."""
    lora: AdapterConfig | None = None
    """Train LoRA adapters instead of all weights; they are merged into the result."""
    max_length: int = Field(default=1024, ge=64)
    """Most tokens of question, facts and candidate together. A longer candidate is truncated."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of frozen weights; trainable weights are float32."""
    seed: int = 0
    """Seed of new weights."""


class RewardModelConfig(Config):
    """The config of a reward model: its text model, its training rows, and its calibration rows."""

    output_dir: str
    """Folder for checkpoints, metrics, the event log, the result in ``final``, and
    ``calibration.json``."""
    model: ScorerConfig
    data: DataConfig
    """Graded rows to train on."""
    test_data: DataConfig
    """Graded rows of other speakers, to calibrate on."""
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()


class ScorerObjective:
    """The mean ordinal loss of the rows."""

    def weight(self, batch: Batch) -> float:
        return float(len(batch["sample_ids"]))

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logits: Tensor = model(**{name: batch[name] for name in SCORER_INPUTS})
        error = (expected_grades(logits) - batch["grades"]).abs().mean(1)
        count = float(len(batch["sample_ids"]))
        return Loss(ordinal_loss(logits, batch["grades"]), {"grade_error": (error.sum(), count)})


class GradedData:
    """Graded rows in shuffled batches of like length; ``batch_size`` rows make one step."""

    def __init__(
        self, samples: Sequence[Sample], reader: Reader, batch_size: int, seed: int
    ) -> None:
        """
        Raises:
            DataError: a row's question and facts leave no room for the candidate.
        """
        self.samples, self.reader, self.batch_size, self.seed = samples, reader, batch_size, seed
        self.read: list[Tokens] = []
        for sample in samples:
            found = reader.read(item_of(sample))
            if found is None:
                file, line = sample.source
                raise DataError(
                    f"question and facts fill all of model.max_length ({reader.max_length}); raise "
                    "it, or shorten the row",
                    file=file,
                    line=line,
                )
            self.read.append(found)

    def plan(self, epoch: int) -> list[list[int]]:
        lengths = [len(one.ids) for one in self.read]
        rows = CurriculumConfig()
        return plan_epoch(self.samples, rows, lengths, self.batch_size, self.seed, epoch)

    def collate(self, rows: Sequence[int]) -> Batch:
        grades = [list(grades_of(self.samples[row])) for row in rows]
        return {
            **self.reader.batch([self.read[row] for row in rows]),
            "grades": torch.tensor(grades),
            "sample_ids": [self.samples[row].sample_id for row in rows],
        }


def item_of(sample: Sample) -> JudgeItem:
    """A graded row in the form in which a judge gets completions during training."""
    question = prompt_text(prompt_of(sample))
    return JudgeItem(question, sample.columns["candidate"], facts(columns_of(sample)))


def grades_of(sample: Sample) -> tuple[int, ...]:
    """The known grades, in the order of :data:`DIMENSIONS`."""
    return tuple(sample.columns["grades"][name] for name in DIMENSIONS)


def load_graded(config: DataConfig) -> list[Sample]:
    """Read the rows of graded manifests.

    Raises:
        DataError: a row is invalid; the message names file, line and field.
    """
    columns = list(dict.fromkeys((*config.columns, *_COLUMNS)))
    samples = load_samples(config.model_copy(update={"columns": columns}))
    for sample in samples:
        file, line = sample.source
        if not isinstance(sample.columns.get("candidate"), str):
            message = "must be the graded text"
            raise DataError(message, file=file, line=line, field="candidate")
        grades: Any = sample.columns.get("grades")
        given = cast("dict[str, Any]", grades) if isinstance(grades, dict) else {}
        right = range(LOWEST, HIGHEST + 1)
        # By type(): isinstance() would accept True as a grade.
        if set(given) != set(DIMENSIONS) or any(
            type(grade) is not int or grade not in right for grade in given.values()
        ):
            message = f"must have a whole number from 1 to 5 for each of {', '.join(DIMENSIONS)}"
            raise DataError(message, file=file, line=line, field="grades")
    return samples


def load_both(config: RewardModelConfig) -> tuple[list[Sample], list[Sample]]:
    """The training rows and the test rows.

    Raises:
        DataError: a row is invalid, a speaker is in both, or the test rows have no facts to swap.
    """
    train, test = load_graded(config.data), load_graded(config.test_data)
    shared = sorted({_speaker(row) for row in train} & {_speaker(row) for row in test})
    if shared:
        raise DataError(
            f"speaker '{shared[0]}' is in both data and test_data ({len(shared)} such speakers); "
            "the calibration needs speakers that the reward model never met",
            field="test_data",
        )
    if len({facts(columns_of(row)) for row in test}) < 2:
        raise DataError(
            "all rows have the same facts, so the calibration cannot swap them; give the rows of "
            "several clips, with label, cues or other truth",
            field="test_data",
        )
    return train, test


def _speaker(sample: Sample) -> str:
    return sample.group.get("speaker", sample.sample_id)


def build_scorer(config: ScorerConfig, texts: Sequence[str]) -> tuple[Scorer, Reader]:
    """A scorer with new heads, and the reader of its inputs.

    Args:
        texts: what a ``scratch`` model trains its tokenizer on.

    Raises:
        ConfigError: ``text`` cannot be loaded, or ``max_length`` is more than it can read.
    """
    # New weights have a seed of their own, which must not move the random state of the run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, tokenizer = _backbone(config, texts)
        for name, weight in backbone.named_parameters():
            if name.startswith("pooler."):  # BERT-like models have one; the heads do not read it
                weight.requires_grad_(False)
        longest = getattr(backbone.config, "max_position_embeddings", None)
        if longest is not None and config.max_length > longest:
            raise ConfigError(
                f"model.max_length {config.max_length} is more than the {longest} tokens that the "
                "text model can read; lower it, or choose another model.text"
            )
        if config.lora is None:
            return Scorer(backbone), Reader(tokenizer, config.max_length)
        values = dump(config.lora)
        if values.pop("experts") is not None:
            raise ConfigError("model.lora.experts: a reward model reads text only; leave them out")
        wanted = values.pop("target_modules") or "all-linear"
        try:
            adapted: Any = get_peft_model(
                backbone,
                LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, target_modules=wanted, **values),
            )
        except ValueError as error:
            raise ConfigError(f"model.lora: {error}") from error
        return Scorer(adapted), Reader(tokenizer, config.max_length)


def _backbone(config: ScorerConfig, texts: Sequence[str]) -> tuple[Any, Any]:
    if isinstance(config.text, ScratchText):
        tokenizer = scratch.train_tokenizer(texts, config.text.scratch.vocab_size)
        return scratch.build_llama(config.text.scratch, tokenizer).model, tokenizer
    try:
        dtype = getattr(torch, config.dtype)
        backbone: Any = AutoModel.from_pretrained(config.text, dtype=dtype)
        return backbone, AutoTokenizer.from_pretrained(config.text)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.text: '{config.text}' cannot be loaded as a text model ({reason}); check the "
            "name or the folder"
        ) from error


def run_reward_model(config: RewardModelConfig) -> Path:
    """Train from the newest checkpoint if there is one, calibrate; returns ``output_dir/final``.

    Raises:
        ConfigError: config, data or model do not fit, or changed since the checkpoint.
        DataError: a row is invalid, or a speaker is in both data sets.
        TrainingError: too many steps in a row were not finite.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return RewardModelStage.start(config)


class RewardModelStage(TrainStage[RewardModelConfig]):
    """Train the scorer on graded answers, then calibrate it on speakers it never met."""

    kind = "reward_model"

    @classmethod
    def check_config(cls, config: RewardModelConfig) -> None:
        if config.run.deepspeed is not None:
            raise ConfigError(
                "a reward model trains without DeepSpeed; unset run.deepspeed, and set model.lora "
                "if it does not fit"
            )

    def build(self) -> StageParts:
        config = self.config
        rows, test = load_both(config)
        scorer, reader = build_scorer(config.model, scorer_texts(rows))
        data = GradedData(rows, reader, self.rows_per_step, config.train.seed)
        if self.context.ranks.is_main:
            count = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
            console.print(f"{count:,} parameters are trained on {len(rows)} graded answers")

        def save(trainer: Trainer) -> Path:
            final = self._save(scorer, reader, trainer)
            if self.context.ranks.is_main:
                self._calibrate(final, test)
            self.context.ranks.barrier()
            return final

        return StageParts(
            model=scorer,
            objective=ScorerObjective(),
            data=data,
            identity=self._identity(data),
            save=save,
        )

    def _identity(self, data: GradedData) -> Identity:
        """Everything that decides the weights: config, manifests, the base model, tokens."""
        whole = dump(self.config)
        deciding = {key: whole[key] for key in ("model", "data", "train")}
        names = self.config.data.manifests
        inputs = {name: content.sha256(content.find(name)) for name in names}
        if isinstance(self.config.model.text, str):
            inputs["text"] = weights_digest(Path(self.config.model.text))
        rows = [[s.sample_id, one.ids] for s, one in zip(data.samples, data.read, strict=True)]
        return self.identity(deciding, inputs, rows)

    def _save(self, scorer: Scorer, reader: Reader, trainer: Trainer) -> Path:
        """Write ``final``, adapters merged. The checkpoints keep what a resume needs."""
        final = self.context.folder / "final"
        if isinstance(scorer.backbone, PeftModel):
            merged: Any = scorer.backbone
            scorer.backbone = merged.merge_and_unload()

        def write(into: Path) -> None:
            if self.context.ranks.is_main:
                save_scorer(scorer, reader, into)

        needed = sum(p.numel() * p.element_size() for p in scorer.parameters()) + (1 << 20)
        commit_final(final, write, trainer, needed, self.context)
        return final

    def _calibrate(self, final: Path, test: Sequence[Sample]) -> None:
        """Grade the test rows with what is on disk, as a reward will load it."""
        use_cpu = self.config.run.use_cpu
        judge = LocalJudge(LocalJudgeConfig(model=str(final), use_cpu=use_cpu, rounded=False))
        with progress("calibration", len(test), unit="answers") as bar:
            grades = judge.grade([item_of(sample) for sample in test], bar.advance)
        rows = [
            Graded(given, grades_of(sample), _speaker(sample), sample.columns.get("faults") or {})
            for sample, given in zip(test, grades, strict=True)
            if given is not None
        ]
        # Contrasts have other facts already.
        own = [sample for sample in test if not sample.columns.get("contrast")] or list(test)
        found: dict[str, Any] = {
            **facts_read(
                [item_of(sample) for sample in own],
                [grades_of(sample) for sample in own],
                [_speaker(sample) for sample in own],
                judge.grade,
                self.config.bootstrap,
            ),
            **calibrate(rows, self.config.bootstrap),
            "unscored": len(test) - len(rows),
            "model": {"path": str(final), "sha256": scorer_digest(final)},
            "manifests": {
                name: content.sha256(content.find(name)) for name in self.config.test_data.manifests
            },
        }
        reason = refusal(found)
        found["passed"] = reason is None
        folder = self.context.folder
        text = json.dumps(found, indent=1) + "\n"
        for into in (folder, final):  # the model keeps it when it is copied elsewhere
            (into / CALIBRATION).write_text(text, encoding="utf-8")
        draw_calibration(found, folder / "calibration.png")
        dimensions: Mapping[str, Any] = found["dimensions"]
        spearman = {name: one["spearman"] for name, one in dimensions.items()}
        event = {"swapped": found["swapped"], "constant": found["constant"], "refused": reason}
        self.context.record.event("calibration", spearman=spearman, **event)
        console.print(calibration_table(found))
        console.print(headline(found))
        if reason is not None:
            console.print(
                f"This reward model is refused as a reward, because {reason}.", style="yellow"
            )
        console.print(
            Text.assemble(
                "the reward model is in ",
                (str(final), "bold"),
                "; name it as judge.model of reward/reasoning.py "
                f"(calibration: {CALIBRATION}, calibration.png)",
            ),
            soft_wrap=True,
        )


def scorer_texts(samples: Sequence[Sample]) -> list[str]:
    """Everything that the scorer reads, which a tokenizer from scratch is trained on."""
    items = [item_of(sample) for sample in samples]
    return [text for item in items for text in (item.prompt, item.facts, item.completion)]


def check_reward_model(config: RewardModelConfig) -> None:
    """``mmemo check``: read both data sets and the tokenizer, and print their sizes.

    Raises:
        ConfigError: the model does not fit.
        DataError: a row is invalid, or a speaker is in both data sets.
    """
    rows, test = load_both(config)
    _, reader = build_scorer(config.model, scorer_texts(rows))
    for name, listed in (("data", rows), ("test_data", test)):
        read = GradedData(listed, reader, 1, 0).read
        lengths = sorted(len(one.ids) for one in read)
        console.print(
            f"{name}: {len(listed)} graded answers of {len({_speaker(s) for s in listed})} "
            f"speakers; median length {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}"
        )
