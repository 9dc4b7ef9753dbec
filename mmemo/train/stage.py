"""What stages of training have in common: rows with features, identity of a run, its result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import transformers
from torch import nn

from mmemo import __version__, checkpoint, content
from mmemo.console import console
from mmemo.data.collate import Outline, check_lengths, measure_lengths, sized_by_clip
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MODALITIES, Sample
from mmemo.errors import ConfigError, StoreError
from mmemo.features.encode import FeatureSource, StoreConfig, ensure_features
from mmemo.features.store import FeatureStore
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import in_adapter, save_model, unwrap
from mmemo.models.backbone import Backbone
from mmemo.models.build import Loaded, ModelConfig
from mmemo.run_log import RunRecord
from mmemo.train.config import RunConfig
from mmemo.train.distributed import Ranks
from mmemo.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows whose clips can be used, their lengths in tokens, and where their features are."""

    kept: list[Sample]
    lengths: list[int]
    source: FeatureSource


def usable_rows(
    rows: Sequence[Sample],
    loaded: Loaded,
    store: FeatureStore | None,
    record: RunRecord,
    *,
    data: DataConfig,
    decode: DecodeConfig,
    run: RunConfig,
    out_dir: Path,
    ranks: Ranks,
    exits: ExitStack,
    generation: bool = False,
) -> Rows:
    """Measure the rows, then encode what is not stored yet; ``exits`` closes the source.

    Raises:
        DataError: a row is too long.
        TrainingError: too many bad clips.
    """
    processor, measured = loaded.processor, dict[str, int]()

    def measure(rows: Sequence[Sample], outline: Outline | None = None) -> None:
        found = measure_lengths(rows, processor, generation=generation, outline=outline)
        check_lengths(rows, found, data.max_length)
        measured.update(zip((row.sample_id for row in rows), found, strict=True))

    if not sized_by_clip(processor):
        measure(rows)  # before anything is encoded, which may take hours
    kept, source = stored_rows(
        rows,
        loaded,
        store,
        record,
        data=data,
        decode=decode,
        run=run,
        out_dir=out_dir,
        ranks=ranks,
        exits=exits,
    )
    if sized_by_clip(processor):
        measure(kept, source.outline)
    return Rows(kept, [measured[row.sample_id] for row in kept], source)


def stored_rows(
    rows: Sequence[Sample],
    loaded: Loaded,
    store: FeatureStore | None,
    record: RunRecord,
    *,
    data: DataConfig,
    decode: DecodeConfig,
    run: RunConfig,
    out_dir: Path,
    ranks: Ranks,
    exits: ExitStack,
) -> tuple[list[Sample], FeatureSource]:
    """Encode what is not stored yet: the rows whose clips are good, and where features come from.

    Rows of one id stay or go together. ``exits`` closes the source.

    Raises:
        TrainingError: too many bad clips.
    """
    backbone: Backbone = unwrap(loaded.model)
    report = ensure_features(
        rows,
        backbone,
        store,
        media_root=Path(data.media_root),
        limits=decode,
        record=record,
        out_dir=out_dir,
        rank=ranks.rank,
        world_size=ranks.size,
        barrier=ranks.barrier,
    )
    if run.deepspeed is not None:
        backbone = cast(Backbone, _StoredOnly(backbone))
    source = FeatureSource(report.kept, backbone, store, Path(data.media_root), decode)
    exits.enter_context(source)
    return report.kept, source


class _StoredOnly:
    """A backbone whose encoders may not run: DeepSpeed has cast or sharded their weights."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def encode(self, *_: object) -> NoReturn:
        raise StoreError(
            "a stored feature is gone while DeepSpeed trains, when it cannot be made again; raise "
            "store.budget_gb or give the run a store of its own, then start it again"
        )


def check_deepspeed(run: RunConfig, store: StoreConfig) -> None:
    """Raises:
    ConfigError: DeepSpeed without a feature store.
    """
    if run.deepspeed is not None and not store.enabled:
        raise ConfigError(
            "DeepSpeed shards the encoders, so features must be stored before training; "
            "set store.enabled=true"
        )


def input_digests(model: ModelConfig, data: DataConfig) -> dict[str, str]:
    """Hashes of the manifests and of the weights that a stage starts from."""
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
    """Of the model that a stage starts from; a hub id stands for itself."""
    if not path.exists():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}={content.sha256(file)}".encode())
    return digest.hexdigest()


def save_final(
    loaded: Loaded, loop: Trainer, folder: Path, ranks: Ranks, record: RunRecord
) -> Path:
    """Write the trained model, or its adapter, to ``folder/final``; called on every rank.

    Raises:
        CheckpointError: it could not be written.
    """
    final = folder / "final"
    state = loop.engine.whole_state()

    def write(into: Path) -> None:
        if ranks.is_main:
            save_model(loaded.model, loaded.processor, into, base=loaded.base, state_dict=state)

    meta = {"step": loop.state.step, "metrics": loop.metrics, "version": __version__}
    checkpoint.save(final, write, meta=meta, needed=_bytes_to_save(loaded.model), ranks=ranks)
    files = checkpoint.verify(final).files if ranks.is_main else {}
    record.event("final", path=final, files={name: row[1] for name, row in files.items()})
    if ranks.is_main:
        console.print(f"trained {loop.state.step} steps; the model is in [bold]{final}[/bold]")
    return final


def _bytes_to_save(model: nn.Module) -> int:
    """Size of the result: the whole model, or an adapter with connectors."""
    adapted = any(in_adapter(name) for name, _ in model.named_parameters())
    return (1 << 20) + sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size()
        for p in model.parameters()
        if p.requires_grad or not adapted
    )


def stage_samples(samples: list[Sample], curriculum: CurriculumConfig) -> list[Sample]:
    """The rows that a stage can draw; clips of others need no features."""
    if curriculum.tiers is None:
        return samples
    earlier = curriculum.earlier() if curriculum.replay_share else []
    # With none at all the plan says which tiers there are.
    return [row for row in samples if row.tier in (*curriculum.tiers, *earlier)] or samples


def row_texts(rows: Sequence[Sample]) -> list[str]:
    """Every turn's text, which a tokenizer from scratch is trained on."""
    return [turn.text for row in rows for turn in row.turns]


def say_what_learns(loaded: Loaded, learns: Sequence[str], ranks: Ranks) -> None:
    """One line for the person who started the run."""
    sizes = {name: p.numel() for name, p in loaded.model.named_parameters()}
    count = sum(sizes[name] for name in learns)
    if ranks.is_main:
        console.print(
            f"{count:,} of {sum(sizes.values()):,} parameters learn, on {ranks.size} "
            f"{'process' if ranks.size == 1 else 'processes'} ({ranks.device.type})"
        )


def versions() -> dict[str, str]:
    """What runs, for the run record."""
    return {
        "mmemo": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
