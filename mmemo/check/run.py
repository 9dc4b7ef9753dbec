"""``mmemo check``: validate a config and everything it names, without training.

It reads rows and files, renders prompts as the model will see them, and estimates token lengths,
memory and disk. What would stop a run hours later is refused here, in the same words. What is
special to a stage comes from the stage's own check function, as a ``CheckPlan``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemo import files
from mmemo.check.changes import cheapest
from mmemo.check.fitting import Forecaster, parse_lengths
from mmemo.check.media import MediaCheck
from mmemo.check.memory import MemoryEstimate
from mmemo.check.notes import MediaNote
from mmemo.check.opened import show_opened
from mmemo.check.plan import CheckPlan, TrainingPlan, plan_of
from mmemo.check.view import (
    Preview,
    show_changes,
    show_disk,
    show_lengths,
    show_memory,
    show_preview,
)
from mmemo.check.workload import Lengths
from mmemo.config import Config
from mmemo.console import console
from mmemo.data.collate import (
    IGNORE_INDEX,
    Rendered,
    Renderer,
    check_lengths,
    render,
    sized_by_clip,
)
from mmemo.data.curriculum import plan_epoch
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.features.inputs import StageInputs
from mmemo.media.clip import BadClip
from mmemo.media.config import SamplingConfig
from mmemo.stages import Stage, stage_of

if TYPE_CHECKING:  # importing it imports transformers
    from mmemo.models.build import Loaded

_MEASURED = 16
"""Clips that are encoded to measure prompts whose length depends on the clip."""


@dataclass
class CheckReport:
    """What was found. Lengths are in tokens, sizes in bytes."""

    rows: int = 0
    clips: int = 0
    bad: list[BadClip] = field(default_factory=list[BadClip])
    notes: list[MediaNote] = field(default_factory=list[MediaNote])
    lengths: list[int] = field(default_factory=list[int])
    answer: int = 0
    limit: int | None = None
    previews: list[Preview] = field(default_factory=list[Preview])
    memory: MemoryEstimate | None = None
    store_bytes: int | None = None
    checkpoint_bytes: int | None = None
    fits: bool = True
    """The forecast memory is there."""
    packed: tuple[int, int] | None = None
    """Of a pair: tokens that are trained on together, and those whose logits are needed."""


def run_check(
    config: Config,
    *,
    stage: Stage | None = None,
    probe: bool = False,
    notes: Path | None = None,
    memory: int | None = None,
    ranks: int | None = None,
) -> CheckReport:
    """Check a config with its data, and print what a run would meet.

    Args:
        stage: what the config is for; None: the registered stage whose class it has.
        probe: also read every packet of every file, and compare it with what the rows ask of it;
            otherwise a few clips are decoded.
        notes: JSON Lines file for the notes on clips, one a line; None writes nothing.
        memory: bytes of a device that the run is to fit into; None: what is free on this machine.
        ranks: devices on all machines; None: as the config says.

    Raises:
        ConfigError, DataError, EvaluationError: as the run itself would.
        MediaError: more clips cannot be used than ``decode.max_bad_share`` allows.
        DataError: a prompt does not fit the model or ``data.max_length``.
    """
    report = CheckReport()
    stage = stage or stage_of(config)
    if stage is None or (stage.check is None and not stage.encodable):
        console.print("The config is valid. It reads no rows, so there is nothing more to check.")
        return report
    plan = _plan(config, stage)
    if plan is None:  # the stage's own function has checked everything
        return report
    sampling = _sampling(plan)
    parts = [
        MediaCheck(p.data, p.samples, plan.decode, title=p.title, sampling=sampling)
        for p in plan.parts
    ]
    try:
        _check_files(parts, report, probe=probe)
    finally:
        if notes is not None:
            files.write_rows(notes, (note.row() for note in report.notes), ensure_ascii=False)
    if plan.check_rows is not None:
        plan.check_rows()
    if plan.inputs is None:
        return report
    loaded = _load(plan.inputs, plan.training)
    _check_prompts(plan, parts[0], loaded, report)
    for part in parts[1:]:
        _check_part(plan, part, loaded)
    if plan.check_model is not None:
        report.packed = plan.check_model(loaded, report.limit)
    lengths = Lengths(max(report.lengths), report.answer, report.packed)
    _show_memory(config, plan, loaded.model, lengths, report, memory, ranks)
    _check_clips(plan.inputs, plan.training, parts, loaded, report)
    if plan.training is not None:
        _check_plan(plan.training, parts[0], report)
    if report.fits:
        console.print("Everything checked fits together.", style="green")
    return report


def _plan(config: Config, stage: Stage) -> CheckPlan | None:
    check = stage.checker
    if check is None:
        return plan_of(stage.read_inputs(config))
    found = check(config)
    return found if isinstance(found, CheckPlan) else None


def read_samples(config: Config) -> Sequence[Sample]:
    """The rows that a run with this config works on: the benchmark's questions for an evaluation,
    the stage's tiers and what it replays for training, otherwise all rows.

    Raises:
        ConfigError: the config is of no stage that reads clips.
    """
    stage = stage_of(config)
    if stage is None:
        raise ConfigError(f"{type(config).__name__} is the config of no registered stage")
    return stage.read_inputs(config).parts[0].samples


def _check_files(parts: Sequence[MediaCheck], report: CheckReport, *, probe: bool) -> None:
    report.rows, report.clips = len(parts[0].samples), parts[0].clips
    for part in parts:
        if part.title:
            console.print(f"{part.title}:")
        try:
            part.files(probe=probe)
        finally:  # also of a run that is refused for its bad clips
            report.notes += part.notes
        report.bad += part.bad


def _load(inputs: StageInputs, training: TrainingPlan | None) -> Loaded:
    from mmemo.models.build import load_model, set_trainable

    loaded = load_model(inputs.model, inputs.texts)
    if training is None:
        loaded.model.requires_grad_(False)
    else:
        set_trainable(loaded.model, training.trainable)
    return loaded


def _check_prompts(plan: CheckPlan, part: MediaCheck, loaded: Loaded, report: CheckReport) -> None:
    samples = part.samples
    rendered = _render(part, loaded, generation=plan.generation)
    measured = {index: len(row.input_ids) for index, row in rendered.items()}
    longest = max(measured.values(), default=0)
    # Rows that were not measured count as the longest, so memory is not underestimated.
    report.lengths = [measured.get(index, longest) for index in range(len(samples))]
    order = sorted(rendered, key=lambda index: measured[index])
    # The longest, a typical and the shortest row; dict.fromkeys shows each only once.
    chosen = dict.fromkeys((order[-1], order[len(order) // 2], order[0])) if order else {}
    for index in chosen:
        row, sample = rendered[index], samples[index]
        preview = Preview(sample.sample_id, row.text, _token_counts(row.modality_ids), _learnt(row))
        report.previews.append(preview)
        show_preview(preview)
    show_opened(loaded.processor.opened, samples, answered=not plan.generation)
    report.answer = max((_learnt(row) for row in rendered.values()), default=0)
    report.limit = _limit(part.data.max_length, plan.new_tokens, loaded)
    if len(rendered) < len(samples):
        console.print(
            f"{len(rendered)} of {len(samples)} prompts are measured: the length of a prompt "
            "depends on its clip, and only some clips were encoded."
        )
    show_lengths(list(measured.values()), report.limit, plan.new_tokens)
    check_lengths([samples[index] for index in rendered], list(measured.values()), report.limit)


def _check_part(plan: CheckPlan, part: MediaCheck, loaded: Loaded) -> None:
    rows = _render(part, loaded, generation=False)
    lengths = [len(row.input_ids) for row in rows.values()]
    limit = _limit(part.data.max_length, plan.new_tokens, loaded)
    check_lengths([part.samples[index] for index in rows], lengths, limit)


def _learnt(row: Rendered) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels)


def _render(part: MediaCheck, loaded: Loaded, *, generation: bool) -> dict[int, Rendered]:
    """Rows by their index in ``part.samples``: all of them, or, where the clip decides the length,
    those without a clip and a few others. Nothing is written."""
    samples, processor = part.samples, loaded.processor
    renderer: Renderer = processor
    media = [index for index, sample in enumerate(samples) if sample.media]
    tried = media[:: max(1, math.ceil(len(media) / _MEASURED))] if sized_by_clip(processor) else []
    found = {
        index: render(renderer, sample, generation=generation)
        for index, sample in enumerate(samples)
        if not (tried and sample.media)
    }
    if not tried:
        return found
    from mmemo.features.source import FeatureSource
    from mmemo.models.adapters.lora import unwrap

    root = Path(part.data.media_root)
    with FeatureSource(samples, unwrap(loaded.model), None, root, part.limits) as source:
        for index in tried:
            with suppress(MediaError):  # named with the other clips that cannot be used
                clip = source.get(samples[index])
                found[index] = render(renderer, samples[index], generation=generation, clip=clip)
    return dict(sorted(found.items()))


def _token_counts(modality_ids: Sequence[int]) -> dict[str, int]:
    from mmemo.models.backbone import MODALITY_ID

    counts = {name: modality_ids.count(value) for name, value in MODALITY_ID.items()}
    return {name: count for name, count in counts.items() if count}


def _limit(max_length: int | None, new_tokens: int, loaded: Loaded) -> int | None:
    """Most tokens of a prompt: as the config allows, and with room for ``new_tokens`` in the
    language model's positions."""
    positions = getattr(_text_config(loaded), "max_position_embeddings", None)
    room = None if positions is None else int(positions) - new_tokens
    return min((limit for limit in (max_length, room) if limit is not None), default=None)


def _text_config(loaded: Loaded) -> Any:
    from mmemo.models.adapters.lora import unwrap

    model: Any = unwrap(loaded.model)
    return model.config.get_text_config()


def forecast_alone(
    config: Config, lengths: str, *, memory: int | None = None, ranks: int | None = None
) -> CheckReport:
    """Forecast memory from the model's ``config.json`` and the config alone, and print it. Neither
    rows nor clips nor weights are read.

    Args:
        lengths: tokens of the longest prompt and answer, such as ``2048+256``.
        memory: bytes of a device; None: those of this machine.
        ranks: devices on all machines; None: as the config says.

    Raises:
        ConfigError: the stage has no such forecast, or the model's config cannot be read.
    """
    from mmemo.check.shapes import shapes_of
    from mmemo.check.stages import plan_without_rows

    plan, given = plan_without_rows(config), parse_lengths(lengths)
    if plan.training is not None and plan.training.rollout is None:  # a row holds its answer
        given = replace(given, longest=given.longest + given.answer)
    values: Any = config
    model = shapes_of(values.model, list(plan.training.trainable) if plan.training else ["lm"])
    if plan.training is None:
        model.requires_grad_(False)
    report = CheckReport()
    _show_memory(config, plan, model, given, report, memory, ranks)
    return report


def _show_memory(
    config: Config,
    plan: CheckPlan,
    model: Any,
    lengths: Lengths,
    report: CheckReport,
    memory: int | None,
    ranks: int | None,
) -> None:
    """Forecast, print, and where it does not fit print the cheapest changes with which it does."""
    there = _available(plan.training) if memory is None else ("a device", memory)
    gpu = memory is not None or (plan.training is not None and _on_gpu(plan.training))
    limit = None if there is None else there[1]
    again = Forecaster(config, model, plan, lengths, plan.training_of, ranks, limit, gpu)
    report.memory = again()
    show_memory(report.memory)
    if there is None or limit is None or report.memory.total <= limit:
        return
    report.fits = False
    fits = [] if plan.training is None else cheapest(config, limit, again)
    show_changes(there, fits)


def _on_gpu(training: TrainingPlan) -> bool:
    import torch

    return torch.cuda.is_available() and not training.run.use_cpu


def _sampling(plan: CheckPlan) -> SamplingConfig:
    """What the run samples from a clip: the config's word, or the saved model's."""
    if plan.inputs is None:
        return SamplingConfig()
    model = plan.inputs.model
    if model.sampling is None and model.path is not None:
        from mmemo.models.saved import saved_sampling

        return saved_sampling(model.path) or SamplingConfig()
    return model.sampling or SamplingConfig()


def _available(training: TrainingPlan | None) -> tuple[str, int] | None:
    """Name and free bytes of the memory that a run would use."""
    import torch

    on_cpu = training is not None and training.run.use_cpu
    if torch.cuda.is_available() and not on_cpu:
        return "GPU", torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else ("RAM", int(free.split()[1]) * 1024)


def _check_plan(training: TrainingPlan, part: MediaCheck, report: CheckReport) -> None:
    """Plan an epoch of the rows that are left: replay finds rows, and difficulties are there."""
    # The run leaves out rows of bad clips before it plans, which may empty a tier.
    left = {sample.sample_id for sample in part.kept}
    rows = [
        (s, n) for s, n in zip(part.samples, report.lengths, strict=True) if s.sample_id in left
    ]
    train = training.train
    # The curriculum plans in batches of one optimizer step over all ranks.
    size = train.per_device_train_batch_size * train.gradient_accumulation_steps
    size *= training.run.processes
    samples, lengths = [row[0] for row in rows], [row[1] for row in rows]
    plan_epoch(samples, training.curriculum, lengths, size, train.seed, 0)


def _check_clips(
    inputs: StageInputs,
    training: TrainingPlan | None,
    parts: Sequence[MediaCheck],
    loaded: Loaded,
    report: CheckReport,
) -> None:
    """Encode a few clips, which also tells the size of the features; nothing is written."""
    from mmemo.models.adapters.lora import unwrap

    if training is not None and report.memory is not None:
        # AdamW keeps two numbers beside each weight, all of them in float32.
        kept = training.run.save_total_limit or 1
        report.checkpoint_bytes = 12 * report.memory.trainable * kept
    sizes = [part.try_some(unwrap(loaded.model), inputs.store) for part in parts]
    if inputs.store.enabled and sum(part.clips for part in parts):
        report.store_bytes = sum(sizes)
    report.bad = [clip for part in parts for clip in part.bad]
    folder = Path(inputs.store.path or inputs.output_dir).absolute()
    # The run makes its folder only later, and disk_usage needs one that exists.
    while not folder.exists():
        folder = folder.parent
    budget = inputs.store.budget_gb
    show_disk(
        report.store_bytes,
        report.checkpoint_bytes,
        free=shutil.disk_usage(folder).free,
        budget=None if budget is None else round(budget * 1e9),
    )
