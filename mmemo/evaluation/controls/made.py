"""``made`` of ``results.json``: everything that decides an evaluation's numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.answers.parsing import PARSER_VERSION
from mmemo.config import dump
from mmemo.data.adapter import adapter_of_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Benchmark, Question
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.controls.training import training_of
from mmemo.evaluation.controls.wording import wording_record
from mmemo.evaluation.predictions import key_of
from mmemo.models.adapters.lora import quantized_as, unwrap
from mmemo.models.build import Loaded
from mmemo.run_log import versions
from mmemo.statistics import INTERVALS

# A prompt repeats each media token many times, which would hide the text of its example.
_RUN_OF_TOKENS = re.compile(r"(<\|\w+\|>)\1+")
_SELECTION = ("tiers", "groups", "limit", "video_key_means", "max_length")
_DECODING = ("max_seconds", "backend", "edit")


def made_of(
    config: EvalConfig,
    benchmark: Benchmark,
    loaded: Loaded,
    fingerprint: str,
    questions: Sequence[Question],
    prompts: Sequence[str],
) -> dict[str, Any]:
    """How the numbers are made, as JSON values.

    Args:
        fingerprint: the model's.
        prompts: the rendered prompts of ``questions``.
    """
    number = config.controls.wording
    wording = wording_record(benchmark, questions, number) if number else {}
    decode = dump(config.decode)
    return {
        "model": {
            "path": config.model.path,
            "fingerprint": fingerprint,
            "adapter": config.model.adapter,
            "dtype": str(unwrap(loaded.model).config.dtype).removeprefix("torch."),
            "quantization": quantized_as(loaded.model),
        },
        "training": training_of(config, questions),
        "data": _data(config.data),
        "benchmark": {
            "file": benchmark.file,
            "sha256": benchmark.sha256,
            "params": dict(benchmark.params),
            "labels": _labels(benchmark, questions),
        },
        "sampling": dump(loaded.processor.sampling),
        "decode": {name: decode[name] for name in _DECODING if name in decode},
        "prompts": {
            "sha256": key_of(list(prompts)),
            "example": _RUN_OF_TOKENS.sub(_shorten, prompts[0]),
            **({"wording": wording} if wording else {}),
        },
        "generation": dump(config.generation),
        "batch_size": config.per_device_eval_batch_size,
        "seed": config.seed,
        "parser": PARSER_VERSION,
        "bootstrap": dump(config.bootstrap),
        "intervals": INTERVALS,
        "versions": versions(),
    }


def _data(config: DataConfig) -> dict[str, Any]:
    """The manifests, the adapters and options that made them, and which rows of them are asked."""
    names = config.manifests
    adapters = {name: adapter_of_manifest(Path(name)) for name in names}
    known = {name: record for name, record in adapters.items() if record is not None}
    plain, given = dump(DataConfig(manifests=names)), dump(config)
    selection = {name: given[name] for name in _SELECTION if given[name] != plain[name]}
    return {
        "manifests": names,
        "sha256": {name: content.sha256(Path(name)) for name in names},
        "media_root": config.media_root,
        "modalities": config.modalities,
        **({"adapters": known} if known else {}),
        **({"selection": selection} if selection else {}),
    }


def _labels(benchmark: Benchmark, questions: Sequence[Question]) -> Mapping[str, Any]:
    """For each task with labels, the name of their registered set if they are of one, and a hash of
    the labels with all forms that an answer may say for them: a set's version."""
    found: dict[str, dict[str, Mapping[str, Sequence[str]]]] = {}
    for question in questions:
        if question.labels is not None:
            own = found.setdefault(question.task, {})
            own[" ".join(question.labels.labels)] = question.labels.aliases
    named: dict[str, Any] = {}
    for task, sets in found.items():
        declared = benchmark.tasks[task].labels if task in benchmark.tasks else None
        forms = {
            name: {label: list(words) for label, words in aliases.items()}
            for name, aliases in sets.items()
        }
        named[task] = {
            "set": declared if isinstance(declared, str) else None,
            "sha256": key_of(forms)[:16],
        }
    return named


def _shorten(found: re.Match[str]) -> str:
    return f"{found.group(1)}×{len(found.group(0)) // len(found.group(1))}"
