"""A pipeline that is killed again and again ends with the very bytes of one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

STAGES = """
name: killed
output_dir: {root}
stages:
  - name: world
    stage: world
    config: train_configs/quickstart/world.yaml
    overrides: [workers=1, size.train_clips=12, size.val_clips=6, size.test_clips=6,
                size.train_speakers=4, size.val_speakers=2, size.test_speakers=2]
  - name: encoders
    stage: encoders
    config: train_configs/quickstart/encoders.yaml
    overrides: [encoders.face.max_steps=4, encoders.video.max_steps=4, encoders.audio.max_steps=4]
  - name: attribute
    stage: sft
    config: train_configs/quickstart/attribute.yaml
    overrides: [train.max_steps=8, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: expression
    stage: sft
    config: train_configs/quickstart/expression.yaml
    overrides: [train.max_steps=6, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: emotion
    stage: sft
    config: train_configs/quickstart/emotion.yaml
    overrides: [train.max_steps=10, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: grpo
    stage: grpo
    config: train_configs/quickstart/grpo.yaml
    overrides:
      - train.max_steps=6
      - run.save_steps=2
      - train.per_device_train_batch_size=2
      - rollout.max_completion_length=8
  - name: pairs
    stage: pairs
    config: train_configs/quickstart/pairs.yaml
    overrides: ["report.allow=[length, text]"]   # of twelve clips
  - name: dpo
    stage: dpo
    config: train_configs/quickstart/dpo.yaml
    overrides: [train.max_steps=6, run.save_steps=2, train.per_device_train_batch_size=2]
  - name: evaluation
    stage: eval
    config: train_configs/quickstart/eval.yaml
    overrides: [generation.max_new_tokens=8, per_device_eval_batch_size=2]
"""


STAGE_NAMES = (
    *("world", "encoders", "attribute", "expression", "emotion"),
    *("grpo", "pairs", "dpo", "evaluation"),
)


def start(folder: Path) -> subprocess.Popen[bytes]:
    file = folder / "pipeline.yaml"
    file.write_text(STAGES.format(root=folder / "run"))
    return subprocess.Popen(
        [sys.executable, "-m", "mmemo.cli", "pipeline", str(file)],
        stdout=(folder / "output").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    process = start(folder)
    assert process.wait(timeout=600) == 0, (folder / "output").read_text()[-3000:]


def digests(folder: Path) -> dict[str, str]:
    names = [
        "attribute/final/model.safetensors",
        "expression/final/model.safetensors",
        "emotion/final/model.safetensors",
        "grpo/final/adapter_model.safetensors",
        "pairs/pairs.jsonl",
        "dpo/final/adapter_model.safetensors",
        "world/manifests/train_emotion.jsonl",
    ]
    return {n: hashlib.sha256((folder / "run" / n).read_bytes()).hexdigest() for n in names}


def running(folder: Path) -> str | None:
    """The stage that the pipeline says it is in."""
    try:
        stages = json.loads((folder / "run/state.json").read_text())["stages"]
    except FileNotFoundError:
        return None
    return next((name for name, entry in stages.items() if entry["status"] == "running"), None)


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    """Killed once in each stage, at a random moment of it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole)
    chance = random.Random(3)
    kills: list[str] = []
    for stage in STAGE_NAMES:
        process = start(killed)
        while running(killed) != stage and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.8))
        with suppress(ProcessLookupError):  # it is done already
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills.append(stage)
    assert len(kills) >= 4
    finish(killed)
    assert digests(killed) == digests(whole)
    scores = [json.loads((f / "run/evaluation/results.json").read_text()) for f in (whole, killed)]
    assert scores[0]["tasks"] == scores[1]["tasks"]
