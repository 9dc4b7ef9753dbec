"""From a small world to pairs of its truth to a preference run, in which margins rise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.pairs.build import run_pairs
from mmemo.pairs.config import PairsConfig
from mmemo.run_log import RunRecord
from mmemo.train.dpo.train import run_dpo
from mmemo.world.config import WorldConfig
from mmemo.world.render import run_world
from tests.models.parts import values
from tests.train.dpo.tiny import dpo_config
from tests.world.conftest import SMALL


def test_a_world_its_pairs_and_a_run(tmp_path: Path) -> None:
    world = tmp_path / "world"
    sizes = {**SMALL, "train_clips": 16}
    run_world(parse(WorldConfig, {"output_dir": str(world), "size": sizes, "workers": 1}))
    names = ("train_emotion", "train_expression")
    pairs = run_pairs(
        parse(
            PairsConfig,
            {
                "output_dir": str(tmp_path / "pairs"),
                "data": {
                    "manifests": [str(world / f"manifests/{name}.jsonl") for name in names],
                    "media_root": str(world),
                },
                "source": {"kind": "truth", "closed_vocabulary": True},
                "negatives": {"kinds": {"different_label": 0.5, "noise": 0.5}},
                "report": {"allow": ["text", "length"]},
            },
        )
    )
    model: dict[str, Any] = {
        **values(sampling={"frames": 4, "face": {"detector": "boxes", "size": 32}}),
        "lora": {"r": 8, "lora_dropout": 0.0},
    }
    config = dpo_config(
        pairs.parent,
        tmp_path / "run",
        "avem_dpo",
        model=model,
        data={"media_root": str(world)},
        train={"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
    )
    run_dpo(config)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-12:]  # batches of 8 differ
    assert first["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-6)
    margins = [line["avem_dpo/rewards/margins"] for line in last]
    assert sum(margins) / len(margins) > 0.05
    accuracies = [line["avem_dpo/rewards/accuracies"] for line in last]
    assert sum(accuracies) / len(accuracies) > 0.65
    (counted,) = RunRecord(tmp_path / "run").events("pairs")
    assert counted["counted"]["avem_dpo"] == counted["pairs"] > 16
