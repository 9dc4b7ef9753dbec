"""What the training stages share: how a run begins and ends, its rows with features, its result.

:class:`TrainStage` carries out any stage. :class:`MediaStage` adds what the stages need that train
the multimodal model itself: the model, its feature store, and rows whose clips are encoded. The
file of a stage then says only what is particular to it: its objective, its data, and what decides
its weights.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NoReturn, Protocol, TypeVar, cast

import torch
from rich.text import Text
from torch import nn

from mmemo import __version__, checkpoint, content
from mmemo.config import Config, dump, save_resolved
from mmemo.console import console
from mmemo.data.collate import Outline, check_lengths, measure_lengths, sized_by_clip
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MODALITIES, Sample
from mmemo.errors import ConfigError, StoreError
from mmemo.features.encode import FeatureSource, StoreConfig, ensure_features, open_store
from mmemo.features.store import FeatureStore
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import in_adapter, save_model, unwrap
from mmemo.models.backbone import Backbone
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.run_log import RunRecord, versions
from mmemo.train import runtime
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Data
from mmemo.train.distributed import Ranks, StopRequest, exit_code, run_lock
from mmemo.train.metrics import LineWatch
from mmemo.train.preflight import preflight
from mmemo.train.resume import Identity
from mmemo.train.router_balance import check_routers
from mmemo.train.trainer import Objective, Trainer
from mmemo.train.zero.compat import whole_numel
from mmemo.train.zero.loading import gather_encoders, sharded_loading

Split = Literal["train", "eval"]


class StageConfig(Protocol):
    """What the config of every training stage has."""

    @property
    def output_dir(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def run(self) -> RunConfig: ...


class MediaStageConfig(StageConfig, Protocol):
    """What the config of a stage has that trains the multimodal model."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def curriculum(self) -> CurriculumConfig: ...
    @property
    def trainable(self) -> list[str]: ...
    @property
    def store(self) -> StoreConfig: ...
    @property
    def decode(self) -> DecodeConfig: ...


class EvaluatedStageConfig(MediaStageConfig, Protocol):
    """What the config of a stage has that may report its loss on held-out rows."""

    @property
    def eval_data(self) -> DataConfig | None: ...


AnyStageConfig = TypeVar("AnyStageConfig", bound=StageConfig)
AnyMediaStageConfig = TypeVar("AnyMediaStageConfig", bound=MediaStageConfig)


@dataclass(frozen=True, slots=True)
class RunContext:
    """One run in its folder: its processes, its event log, and what is closed when it ends."""

    folder: Path
    ranks: Ranks
    record: RunRecord
    stop: StopRequest
    exits: ExitStack
    hosts: Sequence[Mapping[str, Any]] = ()
    """What :func:`~mmemo.train.preflight.preflight` found of each host."""


@contextmanager
def open_run(config: StageConfig) -> Generator[RunContext]:
    """Join the ranks, lock ``output_dir`` and open the event log; all of it ends with the context.

    Raises:
        TrainingError: another run is training in the same folder.
    """
    folder = Path(config.output_dir)
    with ExitStack() as exits:
        # First of all: a signal that comes while the ranks are joined is not lost.
        stop = exits.enter_context(StopRequest())
        ranks = Ranks(cpu=config.run.use_cpu, timeout=config.run.ddp_timeout)
        hosts = preflight(cast(Config, config), folder, ranks)
        exits.enter_context(run_lock(folder, ranks))
        exits.enter_context(exit_code(folder, ranks))
        record = RunRecord(folder, enabled=ranks.is_main)
        yield RunContext(folder, ranks, record, stop, exits, hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """What a stage hands to the :class:`~mmemo.train.trainer.Trainer`, and what it does around it.

    ``save`` writes ``output_dir/final`` after training. ``before_training`` is called once the
    engine holds the model and before any weight changes. Both are called on every rank.
    """

    model: nn.Module
    objective: Objective
    data: Data
    identity: Identity
    save: Callable[[Trainer], Path]
    eval_data: Data | None = None
    watch: LineWatch | None = None
    before_training: Callable[[Trainer], None] | None = None


class TrainStage(ABC, Generic[AnyStageConfig]):
    """One training stage. A subclass names its ``kind`` and builds its parts."""

    kind: ClassVar[str]
    """The kind of the event that opens the run's ``events.jsonl``."""

    def __init__(self, config: AnyStageConfig, context: RunContext) -> None:
        self.config, self.context = config, context

    @classmethod
    def check_config(cls, config: AnyStageConfig) -> None:
        """Refuse what cannot work before anything is started or written.

        Raises:
            ConfigError: the config contradicts itself.
        """

    @abstractmethod
    def build(self) -> StageParts:
        """Load the model and the data."""

    def details(self) -> Mapping[str, Any]:
        """What the opening event says beside config, versions and ranks."""
        return {}

    @classmethod
    def start(cls, config: AnyStageConfig, **particulars: Any) -> Path:
        """Carry out the stage, from its newest checkpoint if there is one.

        Args:
            particulars: further arguments of the subclass.

        Returns:
            ``output_dir/final``.
        """
        cls.check_config(config)
        with open_run(config) as context:
            return cls(config, context, **particulars).run()

    def run(self) -> Path:
        """Build the parts, train them and save the result; returns ``output_dir/final``."""
        config, context = self.config, self.context
        ranks, record = context.ranks, context.record
        if ranks.is_main:
            save_resolved(cast(Config, config), context.folder / "config.yaml")
        record.event(
            self.kind,
            config=dump(cast(Config, config)),
            versions=versions(),
            ranks=ranks.size,
            **({"hosts": list(context.hosts)} if context.hosts else {}),
            **self.details(),
        )
        parts = self.build()
        trainer = Trainer(
            model=parts.model,
            objective=parts.objective,
            data=parts.data,
            eval_data=parts.eval_data,
            folder=context.folder,
            train=config.train,
            run=config.run,
            identity=parts.identity,
            record=record,
            ranks=ranks,
            stop=context.stop,
            watch=parts.watch,
        )
        # Before hours of preparation, such as a reference's log-probabilities.
        trainer.checkpoints.check()
        if parts.before_training is not None:
            parts.before_training(trainer)
        trainer.run()
        return parts.save(trainer)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all ranks and accumulation steps."""
        train = self.config.train
        per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
        return per_rank * self.context.ranks.size

    def identity(
        self, deciding: dict[str, Any], inputs: Mapping[str, str], rows: Sequence[Any]
    ) -> Identity:
        """What a resumed run must have in common with this one.

        Args:
            deciding: the sections of the dumped config that decide the weights; ``train`` is
                one of them, and is changed here.
            inputs: names to hashes of manifests and weights.
            rows: JSON values that say which rows are learnt from, and how long they are.
        """
        # Only the product of ranks, accumulation and batch size decides which rows make a step.
        deciding["train"].pop("gradient_accumulation_steps")
        deciding["train"]["rows_per_step"] = self.rows_per_step
        device = self.context.ranks.device
        fixed = runtime.deterministic(self.config.train, device)
        deciding["train"]["full_determinism"] = fixed
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        config = cast(Config, self.config)
        chosen = config.model_dump(mode="json", exclude_defaults=True)
        return Identity(deciding, {**inputs, "rows": digest}, chosen)


@dataclass(frozen=True, slots=True)
class StageContext:
    """The model of a stage and its feature store, within a run: what its data are made with."""

    run: RunContext
    loaded: Loaded
    store: FeatureStore | None
    decode: DecodeConfig
    deepspeed: bool
    """Whether DeepSpeed will hold the model, whose encoders then cannot run any more."""

    @property
    def backbone(self) -> Any:
        """The model without the adapter around it."""
        return unwrap(self.loaded.model)

    def data_folder(self, split: Split) -> Path:
        """Where bad clips of a split are listed."""
        return self.run.folder if split == "train" else self.run.folder / "eval_data"

    def save_final(self, trainer: Trainer) -> Path:
        """Write the trained model, or its adapter, to ``final``; called on every rank.

        Raises:
            CheckpointError: it could not be written.
        """
        loaded, ranks, final = self.loaded, self.run.ranks, self.run.folder / "final"
        # Every rank takes part in gathering, so this comes before what only the main rank does.
        state = trainer.engine.whole_state()

        def write(into: Path) -> None:
            if ranks.is_main:
                save_model(loaded.model, loaded.processor, into, base=loaded.base, state_dict=state)

        commit_final(final, write, trainer, _bytes_to_save(loaded.model), self.run)
        if ranks.is_main:
            steps = trainer.state.step
            console.print(
                Text.assemble(f"trained {steps} steps; the model is in ", (str(final), "bold")),
                soft_wrap=True,
            )
        return final


_NO_FLOAT16 = (
    "model.dtype: training in float16 needs loss scaling, which there is none of, and small "
    "gradients would be lost; set model.dtype=bfloat16 with train.bf16=true"
)


class MediaStage(TrainStage[AnyMediaStageConfig]):
    """A stage that trains the multimodal model on rows whose clips are encoded once."""

    measures_step: ClassVar[bool] = False
    """Whether it can scale a new adapter by its first step (``lora.experts.match_step``)."""
    draws: ClassVar[bool] = False
    """Whether it samples from the model."""

    @classmethod
    def check_config(cls, config: AnyMediaStageConfig) -> None:
        if config.model.dtype == "float16":
            raise ConfigError(_NO_FLOAT16)
        if config.run.deepspeed is not None and config.model.quantization == "int8":
            raise ConfigError(
                "DeepSpeed does not hold the scales of int8 weights; set model.quantization=nf4"
            )
        if config.run.deepspeed is not None and not config.store.enabled:
            raise ConfigError(
                "DeepSpeed shards the encoders, so features must be stored before training; "
                "set store.enabled=true"
            )

    def load(self, texts: Sequence[str]) -> StageContext:
        """Load the model onto its device, choose what is trained, and open the feature store.

        Args:
            texts: what a tokenizer from scratch is trained on.
        """
        config, run = self.config, self.context
        given = (config.model, config.train, config.run, run.ranks)
        with sharded_loading(*given, draws=self.draws) as sharded:
            loaded = load_model(config.model, texts, base_dir=run.folder / "base")
        if sharded:
            gather_encoders(loaded.model)
        # The dtype may be the saved model's own.
        if any(p.dtype == torch.float16 for p in unwrap(loaded.model).language_model.parameters()):
            raise ConfigError(_NO_FLOAT16)
        if not self.measures_step and unmatched(loaded, config.model):
            raise ConfigError(
                "lora.experts.match_step measures a first step on answers, which only sft does; "
                "begin the adapter in an sft stage, or leave match_step out"
            )
        check_routers(loaded.model, config.train.router_aux_loss_coef)
        names = set_trainable(loaded.model, config.trainable)
        print_trainable_parameters(loaded.model, names, run.ranks)
        # Before any clip is encoded or completion is drawn, which long precede the first step.
        runtime.prepare(config.train, config.run, run.ranks)
        nn.Module.to(loaded.model, run.ranks.device)
        store = open_store(config.store, run.folder)
        if store is not None:
            run.exits.enter_context(store)
        deepspeed = config.run.deepspeed is not None
        return StageContext(run, loaded, store, config.decode, deepspeed)


def check_packs(model: ModelConfig, packs: bool, off: str) -> None:
    """Check that the attention can compute packed sequences, if the stage makes any.

    Args:
        off: the setting that switches them off.

    Raises:
        ConfigError: it cannot.
    """
    name = model.attn_implementation
    if packs and name is not None and name.startswith("flash"):
        raise ConfigError(
            f"model.attn_implementation: '{name}' packs nothing; set {off}, or leave it out"
        )


def unmatched(loaded: Loaded, config: ModelConfig) -> bool:
    """Whether the model has a new adapter whose scaling ``match_step`` is still to decide."""
    section = config.lora
    asked = section is not None and section.experts is not None and section.experts.match_step
    return asked and loaded.drawn_from is not None


def commit_final(
    final: Path,
    write: Callable[[Path], None],
    trainer: Trainer,
    needed: int,
    run: RunContext,
) -> None:
    """Commit what ``write`` writes as ``final``, verify it and record its files.

    Args:
        needed: about how many bytes that is.

    Raises:
        CheckpointError: it could not be written.
    """
    meta = {"step": trainer.state.step, "metrics": trainer.metrics, "version": __version__}
    checkpoint.save(final, write, meta=meta, needed=needed, ranks=run.ranks)
    # Read back from disk: the recorded digests are of what a later stage will load.
    files = checkpoint.verify(final).files if run.ranks.is_main else {}
    run.record.event("final", path=final, files={name: row[1] for name, row in files.items()})


def _bytes_to_save(model: nn.Module) -> int:
    """Size of the result: the whole model, or an adapter with connectors."""
    adapted = any(in_adapter(name) for name, _ in model.named_parameters())
    return (1 << 20) + sum(
        whole_numel(p) * p.element_size()
        for p in model.parameters()
        if p.requires_grad or not adapted
    )


def print_trainable_parameters(model: nn.Module, names: Sequence[str], ranks: Ranks) -> None:
    """One line for the person who started the run, from the main rank.

    Args:
        names: the parameters that are trained.
    """
    sizes = {name: whole_numel(p) for name, p in model.named_parameters()}
    count = sum(sizes[name] for name in names)
    if ranks.is_main:
        console.print(
            f"{count:,} of {sum(sizes.values()):,} parameters are trained, on {ranks.size} "
            f"{'process' if ranks.size == 1 else 'processes'} ({ranks.device.type})"
        )


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How the rows of a split are read: from which data, in which order, how many at a time."""

    data: DataConfig
    curriculum: CurriculumConfig
    batch_size: int
    """Rows over all ranks and accumulation steps together."""


def split_plan(stage: TrainStage[Any], config: EvaluatedStageConfig, split: Split) -> SplitPlan:
    """The plan of the training rows, or of those that are only evaluated, which come in order."""
    if split == "train" or config.eval_data is None:
        return SplitPlan(config.data, config.curriculum, stage.rows_per_step)
    size = config.run.per_device_eval_batch_size * stage.context.ranks.size
    return SplitPlan(config.eval_data, CurriculumConfig(longest_first=False), size)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows whose clips can be used, their lengths in tokens, and where their features are."""

    kept: list[Sample]
    lengths: list[int]
    source: FeatureSource


def usable_rows(
    rows: Sequence[Sample],
    context: StageContext,
    data: DataConfig,
    *,
    split: Split = "train",
    generation: bool = False,
) -> Rows:
    """Measure the rows, then encode the clips that are not stored yet.

    Args:
        generation: the rows are prompts to complete; their answers are not counted.

    Raises:
        DataError: a row has more tokens than ``data.max_length``.
        TrainingError: more clips are bad than ``decode.max_bad_share`` allows.
    """
    processor, lengths = context.loaded.processor, dict[str, int]()

    def measure(rows: Sequence[Sample], outline: Outline | None = None) -> None:
        found = measure_lengths(rows, processor, generation=generation, outline=outline)
        check_lengths(rows, found, data.max_length)
        lengths.update(zip((row.sample_id for row in rows), found, strict=True))

    if not sized_by_clip(processor):
        measure(rows)  # before anything is encoded, which may take hours
    kept, source = stored_rows(rows, context, data, split=split)
    if sized_by_clip(processor):
        measure(kept, source.outline)
    return Rows(kept, [lengths[row.sample_id] for row in kept], source)


def stored_rows(
    rows: Sequence[Sample], context: StageContext, data: DataConfig, *, split: Split = "train"
) -> tuple[list[Sample], FeatureSource]:
    """Encode the clips that are not stored yet. The source is closed when the run ends.

    Returns:
        The rows whose clips are good (rows of one id stay or go together), and where their
        features come from.

    Raises:
        TrainingError: more clips are bad than ``decode.max_bad_share`` allows.
    """
    run, backbone, root = context.run, cast(Backbone, context.backbone), Path(data.media_root)
    report = ensure_features(
        rows,
        backbone,
        context.store,
        media_root=root,
        limits=context.decode,
        record=run.record,
        out_dir=context.data_folder(split),
        rank=run.ranks.rank,
        world_size=run.ranks.size,
        barrier=run.ranks.barrier,
    )
    if context.deepspeed:
        backbone = cast(Backbone, _StoredOnly(backbone))
    source = FeatureSource(report.kept, backbone, context.store, root, context.decode)
    run.exits.enter_context(source)
    return report.kept, source


class _StoredOnly:
    """A backbone whose encoders may not run: DeepSpeed has cast or sharded their weights."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def encode(self, *_: object) -> NoReturn:
        raise StoreError(
            "a stored feature was removed while DeepSpeed trains, when it cannot be encoded again; "
            "raise store.budget_gb or give the run a store of its own, then start it again"
        )


def stage_samples(samples: list[Sample], curriculum: CurriculumConfig) -> list[Sample]:
    """The rows that the curriculum can draw; the clips of others need no features."""
    if curriculum.tiers is None:
        return samples
    earlier = curriculum.earlier() if curriculum.replay_share else []
    # Where no row is left, all stay: the plan's error then says which tiers there are.
    return [row for row in samples if row.tier in (*curriculum.tiers, *earlier)] or samples


def row_texts(rows: Sequence[Sample]) -> list[str]:
    """The text of every turn, which a tokenizer from scratch is trained on."""
    return [turn.text for row in rows for turn in row.turns]


def input_digests(model: ModelConfig, data: DataConfig) -> dict[str, str]:
    """Hashes of the manifests and of the weights that a stage starts from, by name."""
    inputs = {name: content.sha256(content.find(name)) for name in data.manifests}
    starts = {"model": model.path, "text": model.text if isinstance(model.text, str) else None}
    for name in MODALITIES:
        branch = getattr(model, name)
        starts[name] = None if branch is None else branch.encoder
    for name, start in starts.items():
        if start is not None:
            inputs[name] = weights_digest(Path(start))
    return inputs


def weights_digest(path: Path) -> str:
    """SHA-256 over the weight files of a model folder; a hub id stands for itself."""
    if not path.exists():
        return str(path)
    digest = hashlib.sha256()
    # Sorted, because the order of a folder is the file system's.
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}={content.sha256(file)}".encode())
    return digest.hexdigest()
