"""The reward-model stage: trains the local judge, a text model with a head for each dimension.

With branches for video, audio or face, it reads the features of the clip too, which are encoded
once through the feature store, as for every stage.

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
from pydantic import Field, model_validator
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mmemo import content
from mmemo.answers.messages import prompt_text
from mmemo.config import Config, dump
from mmemo.console import console, progress
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import MODALITIES, Modality, Sample
from mmemo.errors import ConfigError, DataError
from mmemo.features.encode import FeatureSource, ensure_features, open_store
from mmemo.media.config import DecodeConfig, SamplingConfig, StoreConfig, store_place
from mmemo.models.backbone import Backbone
from mmemo.models.composed import scratch
from mmemo.models.composed.connectors import collate_features
from mmemo.models.config import AdapterConfig, BranchConfig, ScratchText
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
from mmemo.rewards.judge.clip_features import ClipEncoders, ClipSettings, stream_samples
from mmemo.rewards.judge.reader import Reader, Tokens
from mmemo.rewards.judge.reward_model import (
    LocalJudge,
    LocalJudgeConfig,
    Scorer,
    clip_token_counts,
    expected_grades,
    ordinal_loss,
    save_scorer,
    scorer_digest,
)
from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST, JudgeItem, clip_media, facts
from mmemo.rewards.rewards import columns_of, prompt_of
from mmemo.statistics import BootstrapConfig
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.resume import Identity
from mmemo.train.stage import StageParts, TrainStage, commit_final, weights_digest
from mmemo.train.trainer import Loss, Trainer

_COLUMNS = ("candidate", "grades", "faults", "contrast")
_CHANGED_FACTS = ("cues_absent", "other_emotion")
"""Contrasts whose facts are not those of their clip."""


class ScorerConfig(Config):
    """The text model under the heads, and the branches through which it reads a clip."""

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
    video: BranchConfig | None = None
    """Branches of frozen encoders, as in the ``model`` section of SFT; their connectors are
    trained. Features that a stage with the same encoders and sampling stored are read again."""
    audio: BranchConfig | None = None
    face: BranchConfig | None = None
    sampling: SamplingConfig | None = None
    """What is sampled from each clip; None is the default."""
    facts: bool = True
    """Read the facts of the row as text. False grades a candidate by the clip's features alone."""

    @model_validator(mode="after")
    def _reads_something(self) -> ScorerConfig:
        if self.clip is None and not self.facts:
            raise ValueError("facts: false needs a branch (video, audio or face) to grade by")
        if self.clip is None and self.sampling is not None:
            raise ValueError("sampling is for branches; give video, audio or face")
        return self

    @property
    def clip(self) -> ClipSettings | None:
        """The branches; None without any."""
        found: dict[Modality, BranchConfig] = {
            name: one for name in MODALITIES if (one := getattr(self, name)) is not None
        }
        if not found:
            return None
        sampling = self.sampling or SamplingConfig()
        return ClipSettings(branches=found, sampling=sampling, dtype=self.dtype, seed=self.seed)


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
    store: StoreConfig = StoreConfig()
    """The feature store of a model with branches."""
    decode: DecodeConfig = DecodeConfig()


class ScorerObjective:
    """The mean ordinal loss of the rows."""

    def weight(self, batch: Batch) -> float:
        return float(len(batch["sample_ids"]))

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logits: Tensor = model(**{name: batch[name] for name in batch["inputs"]})
        error = (expected_grades(logits) - batch["grades"]).abs().mean(1)
        count = float(len(batch["sample_ids"]))
        return Loss(ordinal_loss(logits, batch["grades"]), {"grade_error": (error.sum(), count)})


class GradedData:
    """Graded rows in shuffled batches of like length; ``batch_size`` rows make one step."""

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: Reader,
        batch_size: int,
        seed: int,
        source: FeatureSource | None = None,
    ) -> None:
        """
        Args:
            source: of the clips' features, if the scorer reads them.

        Raises:
            DataError: a row's question and facts leave no room for the candidate.
        """
        self.samples, self.reader, self.batch_size, self.seed = samples, reader, batch_size, seed
        self.source = source
        self.streams = stream_samples(samples, tuple(reader.clip_tokens))
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
        inputs = self.reader.batch([self.read[row] for row in rows])
        if self.source is not None:
            inputs |= collate_features([self.source.get(self.streams[row]) for row in rows])
        return {
            **inputs,
            "inputs": list(inputs),
            "grades": torch.tensor(grades),
            "sample_ids": [self.samples[row].sample_id for row in rows],
        }


def item_of(sample: Sample) -> JudgeItem:
    """A graded row in the form in which a judge gets completions during training."""
    question = prompt_text(prompt_of(sample))
    columns = columns_of(sample)
    clip = clip_media(columns["media"])
    return JudgeItem(question, sample.columns["candidate"], facts(columns), clip)


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
        DataError: a row is invalid, a speaker is in both, the test rows have no facts to swap, or a
            row has no clip for any branch.
    """
    train, test = load_graded(config.data), load_graded(config.test_data)
    branches = () if config.model.clip is None else tuple(config.model.clip.branches)
    for row in (*train, *test) if branches else ():
        if not set(branches) & set(row.media):
            file, line = row.source
            raise DataError(
                f"the row has no {' or '.join(branches)} for the branches of the model; give one, "
                "or leave the row out",
                file=file,
                line=line,
            )
    if not config.model.facts:
        # Their grades follow from facts that were changed, while the clip is the same.
        train, test = (
            [row for row in rows if row.columns.get("contrast") not in _CHANGED_FACTS]
            for rows in (train, test)
        )
    shared = sorted({_speaker(row) for row in train} & {_speaker(row) for row in test})
    if shared:
        raise DataError(
            f"speaker '{shared[0]}' is in both data and test_data ({len(shared)} such speakers); "
            "the calibration needs speakers that the reward model never met",
            field="test_data",
        )
    told = {(one.facts, one.clip if branches else None) for one in map(item_of, test)}
    if len(told) < 2:
        raise DataError(
            "all rows have the same facts, so the calibration cannot swap them; give the rows of "
            "several clips, with label, cues or other truth",
            field="test_data",
        )
    return train, test


def _speaker(sample: Sample) -> str:
    return sample.group.get("speaker", sample.sample_id)


def build_encoders(config: ScorerConfig) -> ClipEncoders | None:
    """The frozen encoders of the branches; None without any.

    Raises:
        ConfigError: an encoder cannot be loaded, or does not fit its branch.
    """
    return None if config.clip is None else ClipEncoders(config.clip)


def build_scorer(
    config: ScorerConfig, texts: Sequence[str], encoders: ClipEncoders | None = None
) -> tuple[Scorer, Reader]:
    """A scorer with new heads, and the reader of its inputs.

    Args:
        texts: what a ``scratch`` model trains its tokenizer on.
        encoders: those of :func:`build_encoders`; None loads them.

    Raises:
        ConfigError: ``text`` or an encoder cannot be loaded, or ``max_length`` is more than the
            text model can read.
    """
    encoders = encoders or build_encoders(config)
    branches = {} if encoders is None else encoders.specs
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
        reader = Reader(tokenizer, config.max_length, clip_token_counts(branches), config.facts)
        if config.lora is None:
            return Scorer(backbone, branches), reader
        values = dump(config.lora)
        if values.pop("experts") is not None:
            raise ConfigError("model.lora.experts: a reward model has no experts; leave them out")
        if values.pop("trainable_tokens") is not None or values.pop("modules_to_save"):
            raise ConfigError(
                "model.lora: a reward model trains no tokens; leave trainable_tokens and "
                "modules_to_save out"
            )
        wanted = values.pop("target_modules") or "all-linear"
        try:
            adapted: Any = get_peft_model(
                backbone,
                LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, target_modules=wanted, **values),
            )
        except ValueError as error:
            raise ConfigError(f"model.lora: {error}") from error
        return Scorer(adapted, branches), reader


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
        if config.train.router_aux_loss_coef:
            raise ConfigError(
                "a reward model trains without the routers' loss; set train.router_aux_loss_coef "
                "to 0"
            )

    def build(self) -> StageParts:
        config = self.config
        rows, test = load_both(config)
        encoders = build_encoders(config.model)
        scorer, reader = build_scorer(config.model, scorer_texts(rows), encoders)
        source: FeatureSource | None = None
        if encoders is not None:
            rows, source = self._encoded(rows, config.data, encoders)
            test, _ = self._encoded(test, config.test_data, encoders)
        data = GradedData(rows, reader, self.rows_per_step, config.train.seed, source)
        if self.context.ranks.is_main:
            count = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
            console.print(f"{count:,} parameters are trained on {len(rows)} graded answers")

        def save(trainer: Trainer) -> Path:
            final = self._save(scorer, reader, trainer, encoders)
            if self.context.ranks.is_main:
                self._calibrate(final, test)
            self.context.ranks.barrier()
            return final

        return StageParts(
            model=scorer,
            objective=ScorerObjective(),
            data=data,
            identity=self._identity(data, encoders),
            save=save,
        )

    def _encoded(
        self, rows: list[Sample], data: DataConfig, encoders: ClipEncoders
    ) -> tuple[list[Sample], FeatureSource]:
        """Encode the clips that are not stored yet; the rows whose clips are good."""
        config, run, root = self.config, self.context, Path(data.media_root)
        store = open_store(config.store, run.folder)
        if store is not None:
            run.exits.enter_context(store)
        backbone = cast("Backbone", encoders.to(run.ranks.device))
        report = ensure_features(
            stream_samples(rows, encoders.modalities),
            backbone,
            store,
            media_root=root,
            limits=config.decode,
            record=run.record,
            out_dir=run.folder if data is config.data else run.folder / "test_data",
            rank=run.ranks.rank,
            world_size=run.ranks.size,
            barrier=run.ranks.barrier,
        )
        source = FeatureSource(report.kept, backbone, store, root, config.decode)
        run.exits.enter_context(source)
        good = {row.sample_id for row in report.kept}
        return [row for row in rows if row.sample_id in good], source

    def _identity(self, data: GradedData, encoders: ClipEncoders | None) -> Identity:
        """Everything that decides the weights: config, manifests, the base model, tokens."""
        whole = dump(self.config)
        deciding = {key: whole[key] for key in ("model", "data", "train")}
        # As before there were branches, so that an older run of text alone goes on.
        unset = {"video": None, "audio": None, "face": None, "sampling": None, "facts": True}
        deciding["model"] = {
            key: value
            for key, value in whole["model"].items()
            if key not in unset or value != unset[key]
        }
        names = self.config.data.manifests
        inputs = {name: content.sha256(content.find(name)) for name in names}
        if isinstance(self.config.model.text, str):
            inputs["text"] = weights_digest(Path(self.config.model.text))
        if encoders is not None:
            inputs |= {name: encoders.feature_fingerprint(name) for name in encoders.modalities}
        rows = [[s.sample_id, one.ids] for s, one in zip(data.samples, data.read, strict=True)]
        return self.identity(deciding, inputs, rows)

    def _save(
        self, scorer: Scorer, reader: Reader, trainer: Trainer, encoders: ClipEncoders | None
    ) -> Path:
        """Write ``final``, adapters merged. The checkpoints keep what a resume needs."""
        final = self.context.folder / "final"
        if isinstance(scorer.backbone, PeftModel):
            merged: Any = scorer.backbone
            scorer.backbone = merged.merge_and_unload()

        def write(into: Path) -> None:
            if self.context.ranks.is_main:
                save_scorer(scorer, reader, into, encoders and encoders.saved)

        needed = sum(p.numel() * p.element_size() for p in scorer.parameters()) + (1 << 20)
        commit_final(final, write, trainer, needed, self.context)
        return final

    def _judge(self, final: Path) -> LocalJudge:
        config = self.config
        place = {"path": store_place(config.store, self.context.folder)}
        return LocalJudge(
            LocalJudgeConfig(
                model=str(final),
                use_cpu=config.run.use_cpu,
                rounded=False,
                store=config.store.model_copy(update=place),
                decode=config.decode,
            )
        )

    def _calibrate(self, final: Path, test: Sequence[Sample]) -> None:
        """Grade the test rows with what is on disk, as a reward will load it."""
        judge = self._judge(final)
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
        judge.close()
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
    if reader.clip_tokens:
        counts = ", ".join(f"{count} of {name}" for name, count in reader.clip_tokens.items())
        console.print(f"tokens of a clip: {counts}; facts as text: {reader.with_facts}")
    for name, listed in (("data", rows), ("test_data", test)):
        read = GradedData(listed, reader, 1, 0).read
        lengths = sorted(len(one.ids) for one in read)
        console.print(
            f"{name}: {len(listed)} graded answers of {len({_speaker(s) for s in listed})} "
            f"speakers; median length {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}"
        )
