"""The verbs: which config each takes, and which function does its work. Loaded when needed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from mmemo.config import Config
from mmemo.errors import ConfigError

# verb -> (module, config class, function that does the work)
VERBS: dict[str, tuple[str, str, str]] = {
    "world": ("mmemo.world.render", "WorldConfig", "run_world"),
    "towers": ("mmemo.train.encoders", "EncodersConfig", "run_encoders"),
    "encode": ("mmemo.features.encode", "EncodeConfig", "run_encode"),
    "pairs": ("mmemo.pairs.build", "PairsConfig", "run_pairs"),
    "sft": ("mmemo.train.sft", "SftConfig", "run_sft"),
    "grpo": ("mmemo.train.grpo.train", "GrpoConfig", "run_grpo"),
    "dpo": ("mmemo.train.dpo.train", "DpoConfig", "run_dpo"),
    "reward-model": ("mmemo.train.reward_model", "RewardModelConfig", "run_reward_model"),
    "eval": ("mmemo.evaluation.runner", "EvalConfig", "run_eval"),
    "export": ("mmemo.export", "ExportConfig", "run_export"),
    "report": ("mmemo.report.page", "ReportConfig", "run_report"),
}

# files made of verbs -> (module, config class)
OF_VERBS = {
    "pipeline": ("mmemo.experiments.pipeline", "PipelineConfig"),
    "study": ("mmemo.experiments.study", "StudyConfig"),
}


def config_class(verb: str) -> type[Config]:
    """The config class of a verb, of ``pipeline`` or of ``study``."""
    if verb not in VERBS and verb not in OF_VERBS:
        raise ConfigError(f"no verb '{verb}'; verbs: {', '.join([*VERBS, *OF_VERBS])}")
    module, name = (VERBS.get(verb) or OF_VERBS[verb])[:2]
    return getattr(importlib.import_module(module), name)


def config_classes() -> dict[str, type[Config]]:
    """The config class of each verb that can be a stage."""
    return {verb: config_class(verb) for verb in VERBS}


def runner(verb: str) -> Callable[..., Any]:
    """The function that does a verb's work."""
    quiet()
    module, _, name = VERBS[verb]
    return getattr(importlib.import_module(module), name)


def quiet() -> None:
    """Keep libraries' bars and advice from hiding our own; their errors still show."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has to guess
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def overrides(arguments: Sequence[str]) -> list[str]:
    """What a command line has beside its own options: ``--section.key=value``.

    Raises:
        ConfigError: something else stands there.
    """
    for place, text in enumerate(arguments):
        if text.startswith("--") and "=" in text:
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else "value"
        hint = f"write {text}={following}" if text.startswith("--") else "remove it"
        raise ConfigError(
            f"'{text}' is not understood; {hint}, or see --help (overrides look like "
            "--section.key=value)"
        )
    return list(arguments)


def guess_verb(values: dict[str, Any]) -> str:
    """The verb whose config class knows most of the keys; ties go to the first named here."""
    if "arms" in values:
        return "study"
    if "stages" in values:
        return "pipeline"
    candidates = ["sft", "grpo", "dpo", "eval", "encode", "towers", *VERBS]
    return max(candidates, key=lambda verb: len(set(values) & set(config_class(verb).model_fields)))
