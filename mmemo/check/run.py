"""``mmemo check``: validate a config and everything it names, without training.

Rows, files, prompts as the model will see them, token lengths, memory and disk. What a run would
stumble over hours later is refused here, in the same words.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.check import memory
from mmemo.check.media import MediaCheck
from mmemo.check.memory import MemoryEstimate
from mmemo.check.view import (
    Preview,
    show_disk,
    show_lengths,
    show_memory,
    show_preview,
)
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
from mmemo.data.curriculum import CurriculumConfig, plan_epoch, stage_rows
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.media.clip import BadClip

_MEASURED = 16
"""Clips that are encoded to measure prompts whose length depends on the clip."""


@dataclass
class CheckReport:
    """What was found. Lengths are in tokens, sizes in bytes."""

    rows: int = 0
    clips: int = 0
    bad: list[BadClip] = field(default_factory=list[BadClip])
    lengths: list[int] = field(default_factory=list[int])
    answer: int = 0
    limit: int | None = None
    previews: list[Preview] = field(default_factory=list[Preview])
    memory: MemoryEstimate | None = None
    store_bytes: int | None = None
    checkpoint_bytes: int | None = None
    packed: tuple[int, int] | None = None
    """Of a pair: tokens that are learnt from together, and those whose logits are needed."""


def run_check(config: Config, *, probe: bool = False) -> CheckReport:
    """Check a sft, eval or encode config (or any with ``data``) and print what a run would meet.

    Args:
        probe: also read every packet of every file, and compare it with what the rows ask of it;
            else a few clips are decoded.

    Raises:
        ConfigError, DataError, EvaluationError: as the run itself would.
        MediaError: more clips cannot be used than ``decode.max_bad_share`` allows.
        DataError: a prompt does not fit the model or ``data.max_length``.
    """
    settings: Any = config
    report = CheckReport()
    if not hasattr(settings, "data"):
        console.print("The config is valid. It reads no rows, so there is nothing more to check.")
        return report
    if hasattr(settings, "test_data"):  # graded text: no clip is read
        from mmemo.train.reward_model import check_reward_model

        check_reward_model(settings)
        return report
    samples = read_samples(settings)
    report.rows = len(samples)
    parts = [MediaCheck(settings.data, samples, settings.decode), *_further_parts(settings)]
    if getattr(settings, "majority_from", None) is not None:
        load_samples(settings.majority_from)
    report.clips = parts[0].clips
    for part in parts:
        if part.title:
            console.print(f"{part.title}:")
        part.files(probe=probe)
        report.bad += part.bad
    if hasattr(settings, "rewards"):
        from mmemo.train.grpo.train import check_grpo

        check_grpo(settings, samples)
    if not hasattr(settings, "model"):
        return report
    loaded = _load(settings, samples)
    if hasattr(settings, "benchmark"):
        from mmemo.evaluation.generate import check_change

        check_change(loaded.model, settings.generation)
    _check_prompts(settings, samples, loaded, report)
    for part in parts[1:]:
        rows = _render(settings, part.data, part.samples, loaded, generation=False)
        lengths = [len(row.input_ids) for row in rows.values()]
        limit = _limit(settings, part.data.max_length, loaded)
        check_lengths([part.samples[index] for index in rows], lengths, limit)
    if hasattr(settings, "objective"):
        from mmemo.train.dpo.train import check_dpo

        report.packed = check_dpo(settings, loaded, report.limit)
    report.memory = _memory(settings, loaded, report)
    show_memory(report.memory, _available(settings))
    _check_clips(settings, parts, loaded, report)
    _check_plan(settings, parts[0], report)
    console.print("[green]Everything checked fits together.[/green]")
    return report


def read_samples(settings: Any) -> list[Sample]:
    """The rows that a run with this config works on: the benchmark's questions for an
    evaluation, the stage's tiers and what it replays for training, else all rows."""
    benchmark = getattr(settings, "benchmark", None)
    if benchmark is not None:
        from mmemo.evaluation.benchmark import load_benchmark, tell_excluded, validate
        from mmemo.evaluation.generate import check_generation
        from mmemo.evaluation.reward_scores import load_scores

        found = load_benchmark(benchmark.path, benchmark.params)
        selected = found.select(settings.data)
        questions = found.ask(selected, settings.data)
        validate(found, questions)
        load_scores(settings.scores, questions)
        check_generation(settings.generation, questions)
        console.print(f"{benchmark.path}: {len(questions)} questions; the right answer scores 1.")
        tell_excluded(selected)
        return [replace(question.sample, turns=question.turns) for question in questions]
    samples = _rows(settings, settings.data)
    curriculum: CurriculumConfig | None = getattr(settings, "curriculum", None)
    if curriculum is None:
        return samples
    own = set(stage_rows(samples, curriculum))
    earlier = curriculum.earlier() if curriculum.replay_share > 0 else []
    return [
        sample for index, sample in enumerate(samples) if index in own or sample.tier in earlier
    ]


def _rows(settings: Any, data: DataConfig) -> list[Sample]:
    """The rows of a data section; a pair is one row, with its chosen answer."""
    if not hasattr(settings, "objective"):
        return load_samples(data)
    from mmemo.train.dpo.train import chosen_rows

    return chosen_rows(data)


def _further_parts(settings: Any) -> list[MediaCheck]:
    """What is read beside the rows of ``data``: ``eval_data``, and the clips of negatives."""
    parts: list[MediaCheck] = []
    for title, data in (("", settings.data), ("eval_data", getattr(settings, "eval_data", None))):
        if data is None:
            continue
        if title:
            rows = _rows(settings, data)
            parts.append(MediaCheck(data, rows, settings.decode, title=title))
        if hasattr(settings, "objective"):
            from mmemo.train.dpo.train import negative_rows

            title = f"{title}: negatives".removeprefix(": ")
            rows = negative_rows(settings, data)
            parts += [MediaCheck(data, rows, settings.decode, title=title)] if rows else []
    return parts


def _load(settings: Any, samples: Sequence[Sample]) -> Any:
    from mmemo.models.build import load_model, set_trainable

    texts = [turn.text for sample in samples for turn in sample.turns]
    if hasattr(settings, "objective"):  # a tokenizer from scratch is trained on these too
        from mmemo.data.preference import load_preferences
        from mmemo.train.dpo.dataset import pair_texts

        texts = pair_texts(load_preferences(settings.data))
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
    generation = not hasattr(settings, "train") or hasattr(settings, "rollout")
    rendered = _render(settings, settings.data, samples, loaded, generation=generation)
    measured = {index: len(row.input_ids) for index, row in rendered.items()}
    longest = max(measured.values(), default=0)
    report.lengths = [measured.get(index, longest) for index in range(len(samples))]
    order = sorted(rendered, key=lambda index: measured[index])
    chosen = dict.fromkeys((order[-1], order[len(order) // 2], order[0])) if order else {}
    for index in chosen:
        row, sample = rendered[index], samples[index]
        learnt = _learnt(row)
        preview = Preview(sample.sample_id, row.text, _token_counts(row.modality_ids), learnt)
        report.previews.append(preview)
        show_preview(preview)
    report.answer = max((_learnt(row) for row in rendered.values()), default=0)
    report.limit = _limit(settings, settings.data.max_length, loaded)
    if len(rendered) < len(samples):
        console.print(
            f"{len(rendered)} of {len(samples)} prompts are measured: how long one is depends on "
            "its clip, and only some were encoded."
        )
    show_lengths(list(measured.values()), report.limit, _new_tokens(settings))
    check_lengths([samples[index] for index in rendered], list(measured.values()), report.limit)


def _learnt(row: Rendered) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels)


def _render(
    settings: Any, data: Any, samples: Sequence[Sample], loaded: Any, *, generation: bool
) -> dict[int, Rendered]:
    """Rows by their place in ``samples``: all of them, or those without a clip and a few others
    where the clip decides the length. Nothing is written."""
    processor: Renderer = loaded.processor
    media = [index for index, sample in enumerate(samples) if sample.media]
    tried = media[:: max(1, math.ceil(len(media) / _MEASURED))] if sized_by_clip(processor) else []
    found = {
        index: render(processor, sample, generation=generation)
        for index, sample in enumerate(samples)
        if not (tried and sample.media)
    }
    if not tried:
        return found
    from mmemo.features.source import FeatureSource
    from mmemo.models.adapters.lora import unwrap

    root = Path(data.media_root)
    with FeatureSource(samples, unwrap(loaded.model), None, root, settings.decode) as source:
        for index in tried:
            with suppress(MediaError):  # named with the other clips that cannot be used
                clip = source.get(samples[index])
                found[index] = render(processor, samples[index], generation=generation, clip=clip)
    return dict(sorted(found.items()))


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


def _limit(settings: Any, max_length: int | None, loaded: Any) -> int | None:
    """Tokens that fit: as the config allows, and with room for an answer in the LM's positions."""
    from mmemo.models.adapters.lora import unwrap

    text_config = unwrap(loaded.model).config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    room = None if positions is None else int(positions) - _new_tokens(settings)
    return min((limit for limit in (max_length, room) if limit is not None), default=None)


def _memory(settings: Any, loaded: Any, report: CheckReport) -> MemoryEstimate:
    from mmemo.models.adapters.lora import unwrap

    text_config = unwrap(loaded.model).config.get_text_config()
    longest = max(report.lengths)
    number_size = next(loaded.model.parameters()).element_size()
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
    stage = _zero_stage(getattr(run, "deepspeed", None))
    rollout = getattr(settings, "rollout", None)
    if rollout is not None:  # a prompt and all of its completions are one packed row
        answer = rollout.num_generations * rollout.max_completion_length
        longest += answer
        budget = settings.grpo.max_tokens_per_batch or longest * train.per_device_train_batch_size
        prompts = min(train.per_device_train_batch_size, max(1, budget // longest))
    elif report.packed is not None:
        longest, answer = report.packed
        prompts = train.per_device_train_batch_size
    else:
        answer = report.answer
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
        zero_stage=stage if rollout is None else min(stage, 2),  # drawn from whole weights
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


def _check_plan(settings: Any, part: MediaCheck, report: CheckReport) -> None:
    """An epoch of the rows that are left: replay finds rows, difficulties are there."""
    curriculum: CurriculumConfig | None = getattr(settings, "curriculum", None)
    if curriculum is None:
        return
    left = {sample.sample_id for sample in part.kept}
    rows = [
        (s, n) for s, n in zip(part.samples, report.lengths, strict=True) if s.sample_id in left
    ]
    train = settings.train
    size = train.per_device_train_batch_size * train.gradient_accumulation_steps
    size *= getattr(settings.run, "processes", 1)
    samples, lengths = [row[0] for row in rows], [row[1] for row in rows]
    plan_epoch(samples, curriculum, lengths, size, train.seed, 0)


def _check_clips(
    settings: Any, parts: Sequence[MediaCheck], loaded: Any, report: CheckReport
) -> None:
    """Try a few clips, which also tells what the features take; nothing is written."""
    from mmemo.models.adapters.lora import unwrap

    kept = getattr(getattr(settings, "run", None), "save_total_limit", 1) or 1
    if hasattr(settings, "train") and report.memory is not None:
        report.checkpoint_bytes = 12 * report.memory.trainable * kept
    sizes = [part.try_some(unwrap(loaded.model), settings.store) for part in parts]
    if settings.store.enabled and sum(part.clips for part in parts):
        report.store_bytes = sum(sizes)
    report.bad = [clip for part in parts for clip in part.bad]
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
