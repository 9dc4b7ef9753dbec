"""``mmemo check``: validate a config and everything it names, without training.

Rows, files, prompts as the model will see them, token lengths, memory and disk. What a run would
stumble over hours later is refused here, in the same words.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.config import Config
from mmemo.console import console, progress
from mmemo.data import memory
from mmemo.data.check_view import (
    Preview,
    show_disk,
    show_lengths,
    show_media,
    show_memory,
    show_preview,
)
from mmemo.data.collate import IGNORE_INDEX, Renderer, check_lengths, render
from mmemo.data.curriculum import CurriculumConfig, stage_rows
from mmemo.data.manifest import load_samples
from mmemo.data.memory import MemoryEstimate
from mmemo.data.sample import MediaRef, Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.media.clip import BadClip

_FORECAST_CLIPS = 64


@dataclass
class CheckReport:
    """What was found. Lengths are in tokens, sizes in bytes."""

    rows: int = 0
    clips: int = 0
    bad: list[BadClip] = field(default_factory=list[BadClip])
    lengths: list[int] = field(default_factory=list[int])
    limit: int | None = None
    previews: list[Preview] = field(default_factory=list[Preview])
    memory: MemoryEstimate | None = None
    store_bytes: int | None = None
    checkpoint_bytes: int | None = None


def run_check(config: Config, *, probe: bool = False) -> CheckReport:
    """Check a sft, eval or encode config (or any with ``data``) and print what a run would meet.

    Args:
        probe: also read every packet of every file.

    Raises:
        ConfigError, DataError, EvaluationError: as the run itself would.
        MediaError: more clips are missing or broken than ``decode.max_bad_share`` allows.
        DataError: a prompt does not fit the model or ``data.max_length``.
    """
    settings: Any = config
    report = CheckReport()
    if not hasattr(settings, "data"):
        console.print("The config is valid. It reads no rows, so there is nothing more to check.")
        return report
    samples = read_samples(settings)
    report.rows = len(samples)
    _check_media(settings, samples, report, probe=probe)
    if hasattr(settings, "rewards"):
        from mmemo.train.grpo_check import check_grpo

        check_grpo(settings, samples)
    if not hasattr(settings, "model"):
        return report
    loaded = _load(settings, samples)
    _check_prompts(settings, samples, loaded, report)
    report.memory = _memory(settings, samples, loaded, report)
    show_memory(report.memory, _available(settings))
    _check_disk(settings, samples, loaded, report)
    console.print("[green]Everything checked fits together.[/green]")
    return report


def read_samples(settings: Any) -> list[Sample]:
    """The rows that a run with this config works on: the benchmark's questions for an
    evaluation, the stage's tiers and what it replays for training, else all rows."""
    benchmark = getattr(settings, "benchmark", None)
    if benchmark is not None:
        from mmemo.evaluation.benchmark import load_benchmark, validate

        found = load_benchmark(benchmark)
        questions = found.questions(settings.data)
        validate(found, questions)
        console.print(f"{benchmark}: {len(questions)} questions; the right answer scores 1.")
        return [replace(question.sample, turns=question.turns) for question in questions]
    samples = load_samples(settings.data)
    curriculum: CurriculumConfig | None = getattr(settings, "curriculum", None)
    if curriculum is None:
        return samples
    own = set(stage_rows(samples, curriculum))
    earlier = curriculum.earlier() if curriculum.replay_share > 0 else []
    return [
        sample for index, sample in enumerate(samples) if index in own or sample.tier in earlier
    ]


def _check_media(
    settings: Any, samples: Sequence[Sample], report: CheckReport, *, probe: bool
) -> None:
    from mmemo.media.paths import resolve
    from mmemo.media.probe import probe as read_streams

    rows: dict[str, list[str]] = {}
    for sample in samples:
        for ref in sample.media.values():
            rows.setdefault(ref.path, []).append(sample.sample_id)
    report.clips = len(_clips(samples))
    root = Path(settings.data.media_root)
    with progress("probe" if probe else "files", len(rows)) as bar:
        for name, ids in rows.items():
            try:
                path = resolve(root, name)
                if probe:
                    read_streams(path, name)
            except MediaError as error:
                ids = tuple(dict.fromkeys(ids))
                report.bad.append(BadClip(name, error.kind, error.detail, ids))
            bar.advance()
    show_media(report.rows, report.clips, len(rows), report.bad, probed=probe)
    share = len(report.bad) / max(1, len(rows))
    most = settings.decode.max_bad_share
    if share > most:
        first = report.bad[0]
        raise MediaError(
            first.path,
            first.kind,
            f"{first.detail} ({len(report.bad)} of {len(rows)} files cannot be used, more than "
            f"decode.max_bad_share={most:g} allows; check data.media_root)",
        )


def _clips(samples: Iterable[Sample]) -> dict[frozenset[tuple[str, MediaRef]], Sample]:
    """One sample for each distinct clip."""
    found: dict[frozenset[tuple[str, MediaRef]], Sample] = {}
    for sample in samples:
        if sample.media:
            found.setdefault(frozenset(sample.media.items()), sample)
    return found


def _load(settings: Any, samples: Sequence[Sample]) -> Any:
    from mmemo.models.build import load_model, set_trainable

    texts = [turn.text for sample in samples for turn in sample.turns]
    loaded = load_model(settings.model, texts)
    trainable = getattr(settings, "trainable", None)
    if trainable is not None:
        set_trainable(loaded.model, trainable)
    elif not hasattr(settings, "train"):
        loaded.model.requires_grad_(False)
    return loaded


def _check_prompts(
    settings: Any, samples: Sequence[Sample], loaded: Any, report: CheckReport
) -> None:
    from mmemo.models.adapters import unwrap

    generation = not hasattr(settings, "train") or hasattr(settings, "rollout")
    processor: Renderer = loaded.processor
    rendered = [render(processor, sample, generation=generation) for sample in samples]
    report.lengths = [len(row.input_ids) for row in rendered]
    order = sorted(range(len(samples)), key=lambda index: report.lengths[index])
    chosen = dict.fromkeys((order[-1], order[len(order) // 2], order[0]))
    for index in chosen:
        row, sample = rendered[index], samples[index]
        learnt = sum(label != IGNORE_INDEX for label in row.labels)
        preview = Preview(sample.sample_id, row.text, _token_counts(row.modality_ids), learnt)
        report.previews.append(preview)
        show_preview(preview)
    new = _new_tokens(settings)
    most = [settings.data.max_length, _model_length(unwrap(loaded.model).config, new)]
    report.limit = min((limit for limit in most if limit is not None), default=None)
    show_lengths(report.lengths, report.limit, new)
    check_lengths(samples, report.lengths, report.limit)


def _token_counts(modality_ids: Sequence[int]) -> dict[str, int]:
    from mmemo.models.backbone import MODALITY_ID

    counts = {name: modality_ids.count(value) for name, value in MODALITY_ID.items()}
    return {name: count for name, count in counts.items() if count}


def _new_tokens(settings: Any) -> int:
    rollout = getattr(settings, "rollout", None)
    if rollout is not None:
        return int(rollout.max_completion_length)
    generation = getattr(settings, "generation", None)
    return 0 if generation is None else int(generation.max_new_tokens)


def _model_length(config: Any, new_tokens: int) -> int | None:
    """Prompt tokens that leave room for an answer within the LM's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions) - new_tokens


def _memory(
    settings: Any, samples: Sequence[Sample], loaded: Any, report: CheckReport
) -> MemoryEstimate:
    from mmemo.models.adapters import unwrap

    text_config = unwrap(loaded.model).config.get_text_config()
    longest = max(report.lengths)
    number_size = {"float32": 4}.get(getattr(settings.model, "dtype", "float32"), 2)
    train, run = getattr(settings, "train", None), getattr(settings, "run", None)
    if train is None:
        return memory.estimate_generation(
            loaded.model,
            text_config,
            batch_size=int(getattr(settings, "per_device_eval_batch_size", 1)),
            length=longest,
            new_tokens=_new_tokens(settings),
            number_size=number_size,
        )
    rollout = getattr(settings, "rollout", None)
    if rollout is not None:  # a prompt and all of its completions are one packed row
        answer = rollout.num_generations * rollout.max_completion_length
        longest += answer
        budget = settings.grpo.max_tokens_per_batch or longest * train.per_device_train_batch_size
        prompts = min(train.per_device_train_batch_size, max(1, budget // longest))
    else:
        rendered = [render(loaded.processor, sample, generation=False) for sample in samples]
        answer = max(sum(label != IGNORE_INDEX for label in row.labels) for row in rendered)
        prompts = train.per_device_train_batch_size
    return memory.estimate_training(
        loaded.model,
        text_config,
        batch_size=prompts,
        length=longest,
        answer_length=answer,
        number_size=2 if train.bf16 else number_size,
        gradient_checkpointing=train.gradient_checkpointing,
        ranks=getattr(run, "processes", 1),
        zero_stage=_zero_stage(getattr(run, "deepspeed", None)),
    )


def _zero_stage(file: str | None) -> int:
    if file is None:
        return 0
    try:
        values: Any = json.loads(content.find(file).read_text(encoding="utf-8"))
        return int(values.get("zero_optimization", {}).get("stage", 0))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: is not a DeepSpeed JSON config ({error})") from error


def _available(settings: Any) -> tuple[str, int] | None:
    """Name and free bytes of the memory that a run would use."""
    import torch

    run = getattr(settings, "run", None)
    if torch.cuda.is_available() and not getattr(run, "use_cpu", False):
        return "GPU", torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else ("RAM", int(free.split()[1]) * 1024)


def _check_disk(settings: Any, samples: Sequence[Sample], loaded: Any, report: CheckReport) -> None:
    """Forecast the store from a few clips; nothing is written."""
    from mmemo.media.encode import forecast
    from mmemo.models.adapters import unwrap

    bad = {clip.path for clip in report.bad}
    clips = [
        sample
        for sample in _clips(samples).values()
        if not bad & {ref.path for ref in sample.media.values()}
    ]
    kept = getattr(getattr(settings, "run", None), "save_total_limit", 1) or 1
    if hasattr(settings, "train") and report.memory is not None:
        report.checkpoint_bytes = 12 * report.memory.trainable * kept
    if settings.store.enabled and clips:
        step = math.ceil(len(clips) / _FORECAST_CLIPS)
        found = forecast(
            clips[::step],
            unwrap(loaded.model),
            None,
            media_root=Path(settings.data.media_root),
            limits=settings.decode,
        )
        report.store_bytes = round(found.bytes * len(clips) / len(clips[::step]))
    folder = Path(settings.store.path or settings.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    budget = settings.store.budget_gb
    show_disk(
        report.store_bytes,
        report.checkpoint_bytes,
        free=shutil.disk_usage(folder).free,
        budget=None if budget is None else round(budget * 1e9),
    )
