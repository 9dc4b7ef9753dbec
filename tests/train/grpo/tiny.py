"""A tiny GRPO stage on the rows of :mod:`tests.train.tiny`: a few seconds a run."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

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


def finished(found: dict[str, Any]) -> str:
    process = start(found)
    process.join()
    assert process.exitcode == 0
    return sha256(Path(found["output_dir"]) / "final" / "adapter_model.safetensors")


def last_step(out: Path) -> int:
    try:
        return len((out / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return -1


def kill_after(found: dict[str, Any], step: int, delay: float = 0.0) -> bool:
    out = Path(found["output_dir"])
    process = start(found)
    while process.is_alive() and last_step(out) < step:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> None:
    """``python -m tests.train.grpo.tiny CONFIG``: what a rank runs."""
    run_grpo(load_config(GrpoConfig, Path(sys.argv[1])))
    leave()


if __name__ == "__main__":
    main()
