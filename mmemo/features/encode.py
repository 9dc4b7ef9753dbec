"""``mmemo encode``: fill the feature store ahead of training, or forecast what that takes.

The functions and classes that other stages need to read features are exported here too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from rich.table import Table

from mmemo.config import Config, dump, save_resolved
from mmemo.console import console
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import ConfigError
from mmemo.features.forecast import Forecast, forecast
from mmemo.features.ingest import ATTEMPTS, IngestReport, ensure_features, noop, retry_hint
from mmemo.features.inputs import ClipRows, StageInputs
from mmemo.features.keys import feature_key
from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore, StoreConfig, open_store
from mmemo.media.clip import BadClip
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.backbone import Backbone
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord

__all__ = [
    "EncodeConfig",
    "FeatureSource",
    "FeatureStore",
    "Forecast",
    "IngestReport",
    "StoreConfig",
    "encode_inputs",
    "ensure_features",
    "feature_key",
    "forecast",
    "forecast_encode",
    "noop",
    "open_store",
    "run_encode",
]

_SHOWN = 5  # bad clips printed; the list has all


class EncodeRunConfig(Config):
    """The processes that encode."""

    processes: int = Field(default=1, ge=1)
    """Number of ranks to start on this machine, and on each other node. Each decodes and encodes
    its share of the clips."""
    ddp_timeout: int = Field(default=1800, ge=1)
    """Seconds that a rank waits for the others before the run ends with an error. Set it above the
    time that one rank may need for what it does alone."""


class EncodeConfig(Config):
    """Which clips to encode, with which encoders, into which store."""

    output_dir: str
    """Folder for the run record, the resolved config and the list of bad clips."""
    model: ModelConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()
    run: EncodeRunConfig = EncodeRunConfig()


class Together(Protocol):
    """The ranks that encode together: ``mmemo.train.distributed.Ranks``, or one alone."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def all_gather_text(self, text: str) -> list[str]:
        """The text of every rank."""
        ...


@dataclass
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )

    def barrier(self) -> None:
        noop()

    def all_gather_text(self, text: str) -> list[str]:
        return [text]


def encode_inputs(config: EncodeConfig) -> StageInputs:
    """The rows of an encode config."""
    samples = load_samples(config.data)
    return StageInputs(
        output_dir=config.output_dir,
        model=config.model,
        parts=[ClipRows(config.data, samples)],
        texts=[turn.text for sample in samples for turn in sample.turns],
        decode=config.decode,
        store=config.store,
    )


def run_encode(
    config: EncodeConfig | StageInputs, dry_run: bool = False, ranks: Together | None = None
) -> IngestReport:
    """Fill the store and print what was done; a dry run prints a forecast and writes nothing.

    Several processes may run this on one store at the same time; each clip is encoded once.

    Args:
        config: an encode config, or what another stage reads. The features of another stage go to
            the store where that stage looks for them, and the record of this run to the folder
            ``encode`` in that stage's own, which is otherwise left alone.
        ranks: those that share the work; the report is then that of all.

    Raises:
        ConfigError: the store is switched off.
        TrainingError: more clips are bad than ``decode.max_bad_share`` allows.
    """
    if not config.store.enabled:
        raise ConfigError("there is no store to fill; set store.enabled to true")
    inputs = config if isinstance(config, StageInputs) else encode_inputs(config)
    ranks = ranks or Alone()
    backbone = _load_backbone(inputs, ranks.device)
    if dry_run:
        return _dry_run(inputs, backbone)
    folder, record = _open_record(config, ranks)
    store = open_store(inputs.store, inputs.output_dir)
    assert store is not None
    reports: list[IngestReport] = []
    with store:
        for part in _sections(inputs):
            out_dir = folder / part.title
            if ranks.rank == 0:
                out_dir.mkdir(parents=True, exist_ok=True)
                # No training run depends on these attempts, so clips that failed are tried again.
                (out_dir / ATTEMPTS).unlink(missing_ok=True)
            ranks.barrier()
            own = ensure_features(
                part.samples,
                backbone,
                store,
                media_root=Path(part.data.media_root),
                limits=inputs.decode,
                record=record,
                out_dir=out_dir,
                rank=ranks.rank,
                world_size=ranks.size,
                barrier=ranks.barrier,
            )
            reports.append(_of_all(own, ranks))
        report = _together(reports)
        if ranks.rank > 0:
            return report
        if ranks.size > 1:
            record.event("encoded", ranks=ranks.size, new=report.new, bytes=report.bytes)
        console.print(_summary(report, sum(len(part.samples) for part in inputs.parts), store))
    for one in reports:
        _print_bad(one.bad, one.bad_list)
    return report


def _open_record(config: EncodeConfig | StageInputs, ranks: Together) -> tuple[Path, RunRecord]:
    """The folder of the run, and its record, which the first rank writes."""
    if isinstance(config, StageInputs):
        folder = Path(config.output_dir) / "encode"
        record = RunRecord(folder, enabled=ranks.rank == 0)
        record.event("encode", model=dump(config.model), data=[dump(p.data) for p in config.parts])
        return folder, record
    folder = Path(config.output_dir)
    if ranks.rank == 0:
        save_resolved(config, folder / "config.yaml")
    return folder, RunRecord(folder, enabled=ranks.rank == 0)


def _of_all(own: IngestReport, ranks: Together) -> IngestReport:
    """The report of one rank with the work of all in it."""
    mine = [own.new, own.bytes, own.reused, own.seconds, own.notes]
    told = [json.loads(text) for text in ranks.all_gather_text(json.dumps(mine))]
    new, size, reused, seconds, notes = zip(*told, strict=True)
    return replace(
        own,
        new=sum(new),
        bytes=sum(size),
        # A rank that counts later finds what an earlier one has made by then.
        reused=min(reused),
        seconds=max(seconds),
        notes=dict(sum(map(Counter[str], notes), Counter[str]())),
    )


def forecast_encode(config: EncodeConfig | StageInputs) -> IngestReport:
    """``mmemo encode --dry-run``: print a forecast and write nothing."""
    return run_encode(config, dry_run=True)


def _load_backbone(inputs: StageInputs, device: torch.device) -> Backbone:
    model: Any = unwrap(load_model(inputs.model, inputs.texts).model).eval()
    model.to(device)
    return model


def _dry_run(inputs: StageInputs, backbone: Backbone) -> IngestReport:
    store = open_store(inputs.store, inputs.output_dir, read_only=True)
    assert store is not None
    reports: list[IngestReport] = []
    for part in _sections(inputs):
        found = forecast(
            part.samples,
            backbone,
            store,
            media_root=Path(part.data.media_root),
            limits=inputs.decode,
        )
        if part.title:
            console.print(f"{part.title}:")
        console.print(_forecast_table(found, inputs.store, store.folder, store.stats().bytes))
        bad = list(found.bad.values())
        _print_bad(bad, None)
        reports.append(
            IngestReport(
                kept=list(part.samples),
                bad=bad,
                clips=found.clips,
                new=found.new,
                bytes=found.bytes,
                reused=found.known,
                seconds=found.seconds,
            )
        )
    return _together(reports)


def _sections(inputs: StageInputs) -> list[ClipRows]:
    """The parts by section of the config: pairs and their negatives share clips, which are counted
    once, and are kept or left out together."""
    found: list[ClipRows] = []
    for part in inputs.parts:
        if found and found[-1].data == part.data:
            found[-1] = replace(found[-1], samples=[*found[-1].samples, *part.samples])
        else:
            found.append(part)
    return found


def _together(reports: Sequence[IngestReport]) -> IngestReport:
    """The sums of the parts' reports. ``bad_list`` is that of the first part."""
    if len(reports) == 1:
        return reports[0]
    return IngestReport(
        kept=[sample for one in reports for sample in one.kept],
        bad=[clip for one in reports for clip in one.bad],
        clips=sum(one.clips for one in reports),
        new=sum(one.new for one in reports),
        bytes=sum(one.bytes for one in reports),
        reused=sum(one.reused for one in reports),
        face_frames=sum(one.face_frames for one in reports),
        faceless=sum(one.faceless for one in reports),
        seconds=sum(one.seconds for one in reports),
        bad_list=reports[0].bad_list,
    )


def _summary(report: IngestReport, rows: int, store: FeatureStore) -> Table:
    table, stats = _table("Features"), store.stats()
    table.add_row("clips", f"{report.clips:,}")
    table.add_row("rows kept", f"{len(report.kept):,} of {rows:,}")
    table.add_row("features made", f"{report.new:,} ({human_size(report.bytes)})")
    table.add_row("found in the store", f"{report.reused:,}")
    if stats.dropped:
        table.add_row(
            "not kept", f"{stats.dropped:,}, computed again when needed: raise store.budget_gb"
        )
    if stats.damaged:
        table.add_row("damaged shards", f"{len(stats.damaged)}, computed again")
    table.add_row("time", human_time(report.seconds))
    table.add_row("store", f"{store.folder}: {human_size(stats.bytes)} in {stats.shards} shards")
    if report.face_frames:
        share = report.faceless / report.face_frames
        counts = f"{report.faceless:,} of {report.face_frames:,}"
        table.add_row("frames without a face", f"{share:.1%} ({counts}), used whole")
        crops = None if store.crops is None else store.crops.stats()
        if crops is not None:
            table.add_row("face crops", f"{crops.features:,} clips, {human_size(crops.bytes)}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    table.add_row("bad clips", kinds or "none")
    return table


def _forecast_table(found: Forecast, config: StoreConfig, folder: Path, stored: int) -> Table:
    table = _table(f"Forecast from {found.probed} clips")
    table.add_row("clips", f"{found.clips:,}")
    table.add_row("features to make", f"{found.new:,}")
    table.add_row("found in the store", f"{found.known:,}")
    for modality, size in found.by_modality.items():
        table.add_row(f"  {modality}", human_size(size))
    table.add_row("size on disk", human_size(found.bytes))
    if found.crop_bytes and config.crops_gb:
        size = human_size(min(found.crop_bytes, round(config.crops_gb * 1e9)))
        table.add_row("face crops", f"{size} more; store.crops_gb bounds them")
    table.add_row("time", human_time(found.seconds))
    table.add_row("store", f"{folder}: {human_size(stored)} now")
    budget = config.budget_gb
    if budget is not None:
        fits = stored + found.bytes <= budget * 1e9
        note = "fits" if fits else "does not fit; older features are removed and computed again"
        table.add_row("budget", f"{human_size(round(budget * 1e9))}: {note}")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table


def _print_bad(bad: list[BadClip], path: Path | None) -> None:
    for clip in bad[:_SHOWN]:
        console.print(f"  {clip.path}: {clip.kind}: {clip.detail}", soft_wrap=True)
    if len(bad) > _SHOWN:
        console.print(f"  and {len(bad) - _SHOWN} more")
    if bad and path is not None:
        console.print(f"  all of them, with their rows: {path}", soft_wrap=True)
        hint = retry_hint(bad)
        if hint is not None:
            console.print(f"  {hint}")


def human_size(count: int) -> str:
    """Bytes in readable form, in powers of 1000."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_time(seconds: float) -> str:
    """Seconds in readable form."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
