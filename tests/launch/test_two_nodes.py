"""Two nodes: network namespaces with an address each, by the shipped launchers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.dpo.tiny import dpo_values, write_pairs
from tests.train.grpo.tiny import grpo_values
from tests.train.tiny import sft_values, write_rows

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def write_pipeline(folder: Path) -> Path:
    """SFT, GRPO and DPO, each on what the one before has trained."""
    rows = folder / "rows"
    write_rows(rows)
    write_pairs(rows)
    steps: dict[str, Any] = {
        "train": {"per_device_train_batch_size": 2, "max_steps": 8},
        "run": {"logging_steps": 1, "save_steps": 2, "threads": 1, "use_cpu": True},
    }
    configs = {
        "sft": sft_values(rows, folder / "x", **steps),
        "grpo": grpo_values(rows, folder / "x", **steps),
        "dpo": dpo_values(rows, folder / "x", **steps),
    }
    before = None
    for name, values in configs.items():
        values["output_dir"] = "${run}/" + name
        values["store"] = {"path": "${run}/features"}
        if before is not None:
            values["model"] = {"path": "${run}/" + before + "/final"}
            values["model"]["lora"] = {"r": 4, "lora_dropout": 0.0}
            if before != "sft":
                values["model"]["adapter"] = "merge"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        before = name
    pipeline = folder / "pipeline.yaml"
    stages = [{"name": name, "stage": name, "config": f"{name}.yaml"} for name in configs]
    text = yaml.safe_dump({"name": "two nodes", "output_dir": "x", "seed": 0, "stages": stages})
    pipeline.write_text(text, encoding="utf-8")
    return pipeline


@pytest.mark.timeout(600)
def test_a_killed_node_changes_no_byte(tmp_path: Path) -> None:
    made = subprocess.run(
        [ROOT / "launch/two_nodes_local.sh", write_pipeline(tmp_path), tmp_path / "runs"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count(": equal") >= 3
