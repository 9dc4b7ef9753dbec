"""A tiny GRPO stage on the rows of :mod:`tests.train.tiny`: a few seconds a run."""

from __future__ import annotations

import json
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmemo.config import load_config, parse
from mmemo.train.distributed import leave
from mmemo.train.grpo.train import GrpoConfig, run_grpo
from tests import children
from tests.models.parts import values

REWARDS = Path(__file__).parent / "toy_rewards.py"


def reward(name: str, **changes: Any) -> dict[str, Any]:
    return {"path": f"{REWARDS}:{name}", "name": name, **changes}


def lora_model(**more: Any) -> dict[str, Any]:
    return {**values(), "lora": {"r": 4, "lora_dropout": 0.1}, **more}


def grpo_values(rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a run; sections given in ``changes`` are merged in."""
    found: dict[str, Any] = {
        "output_dir": str(out),
        "model": lora_model(),
        "data": {"manifests": [str(rows / "rows.jsonl")], "media_root": str(rows)},
        "rewards": [reward("even")],
        "rollout": {"num_generations": 4, "max_completion_length": 8},
        "trainable": ["lm", "connectors"],
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        "run": {"logging_steps": 1, "save_steps": 2, "threads": 1},
        "store": {"path": str(rows / "features")},
        "decode": {"workers": 1},
    }
    for key, change in changes.items():
        both = key != "model" and isinstance(change, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **change} if both else change
    return found


def grpo_config(rows: Path, out: Path, **changes: Any) -> GrpoConfig:
    return parse(GrpoConfig, grpo_values(rows, out, **changes))


def start(found: dict[str, Any]) -> BaseProcess:
    """Start a run in a process of its own, which can be killed."""
    return children.start(_run, json.dumps(found))


def _run(text: str) -> None:
    run_grpo(parse(GrpoConfig, json.loads(text)))


def main() -> None:
    """``python -m tests.train.grpo.tiny CONFIG``: what a rank runs."""
    run_grpo(load_config(GrpoConfig, Path(sys.argv[1])))
    leave()


if __name__ == "__main__":
    main()
