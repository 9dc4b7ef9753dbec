"""A pipeline that is killed again and again ends with the very bytes of one that is not."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = """
name: killed
output_dir: {root}
stages:
  - name: world
    verb: world
    config: train_configs/quickstart/world.yaml
    overrides: [workers=1, size.train_clips=12, size.val_clips=6, size.test_clips=6,
                size.train_speakers=4, size.val_speakers=2, size.test_speakers=2]
  - name: towers
    verb: towers
    config: train_configs/quickstart/towers.yaml
    overrides: [towers.face.max_steps=4, towers.video.max_steps=4, towers.audio.max_steps=4]
  - name: attribute
    verb: sft
    config: train_configs/quickstart/attribute.yaml
    overrides: [train.max_steps=8, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: expression
    verb: sft
    config: train_configs/quickstart/expression.yaml
    overrides: [train.max_steps=6, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: emotion
    verb: sft
    config: train_configs/quickstart/emotion.yaml
    overrides: [train.max_steps=10, run.save_steps=2, train.per_device_train_batch_size=4]
  - name: evaluation
    verb: eval
    config: train_configs/quickstart/eval.yaml
    overrides: [generation.max_new_tokens=8, per_device_eval_batch_size=2]
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    file = folder / "pipeline.yaml"
    file.write_text(STAGES.format(root=folder / "run"))
    return subprocess.Popen(
        [sys.executable, "-m", "mmemo.cli", "pipeline", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    process = start(folder)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()[-3000:]


def digests(folder: Path) -> dict[str, str]:
    names = [
        "attribute/final/model.safetensors",
        "expression/final/model.safetensors",
        "emotion/final/adapter_model.safetensors",
        "world/manifests/train_emotion.jsonl",
    ]
    return {n: hashlib.sha256((folder / "run" / n).read_bytes()).hexdigest() for n in names}


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole)
    chance = random.Random(3)
    kills = 0
    for _ in range(6):
        process = start(killed)
        try:
            process.wait(timeout=chance.uniform(9, 22))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    finish(killed)
    assert digests(killed) == digests(whole)
    ours = (killed / "run/evaluation/results.json").read_text().count("\n")
    assert ours == (whole / "run/evaluation/results.json").read_text().count("\n")
