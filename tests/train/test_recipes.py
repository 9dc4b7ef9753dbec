"""The recipes of papers run as shipped on a tiny model of the same class and clips of the world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmemo import checkpoint
from mmemo.experiments.pipeline import read_pipeline, run_pipeline
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import ModelConfig, load_model
from mmemo.world.render import run_world
from tests.models.native_files import FED
from tests.models.qwen.test_face import release
from tests.train.grpo.tiny import reward
from tests.train.test_native_face import FACE
from tests.world.conftest import small

ROOT = Path("train_configs")
CHEAP = [
    *("train.max_steps=2", "train.gradient_accumulation_steps=1", "run.logging_steps=1"),
    *("train.per_device_train_batch_size=2", "run.threads=1", "decode.workers=1"),
    *("run.deepspeed=null", "run.use_cpu=true", "train.warmup_steps=0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the world, and a released model with two tokens to spare."""
    found = tmp_path_factory.mktemp("recipes")
    run_world(small(found / "rows"))
    release("qwen2_5_omni", found / "omni")
    return found


def run(folder: Path, name: str, rows: dict[str, str], changes: dict[str, list[str]]) -> Path:
    """The shipped pipeline with other paths and sizes."""
    given, _ = read_pipeline(ROOT / name / "pipeline.yaml", [])
    stages: list[dict[str, Any]] = []
    for one in given.stages:
        data = [
            f"data.manifests=[{folder}/rows/manifests/{rows[one.name]}.jsonl]",
            f"data.media_root={folder}/rows",
            f"store.path={folder}/store",
        ]
        stages.append(one.model_dump())
        stages[-1]["config"] = str(ROOT / name / str(one.config))
        stages[-1]["overrides"] = [*one.overrides, *CHEAP, *data, *changes.get(one.name, [])]
    file = folder / f"{name}.yaml"
    values = {"name": name, "output_dir": str(folder / name), "stages": stages}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    run_pipeline(file, [])
    return folder / name


def steps(out: Path) -> list[dict[str, Any]]:
    assert checkpoint.verify(out / "final").meta["step"] == 2
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def fed(folder: Path) -> list[str]:
    return [
        f"model.path={folder}/omni",
        *(f"model.native.{name}={value}" for name, value in FED.items()),
        "model.sampling.frames=2",
    ]


def test_omni_emotion_runs_in_its_three_phases(folder: Path) -> None:
    """The first trains the connector alone, the others the adapter too."""
    rows = {"align": "train_expression", "instruct": "train_attribute", "review": "train_emotion"}
    face = [f"model.face={json.dumps(FACE)}", "model.sampling.face={detector: boxes, size: 32}"]
    small_lora = "model.lora={r: 4, lora_dropout: 0.0}"
    changes = {"align": [*fed(folder), *face, small_lora, "train.learning_rate=1e-2"]}
    out = run(folder, "omni_emotion", rows, changes)
    said: list[torch.Tensor] = []
    for stage in rows:
        steps(out / stage)
        final = out / stage / "final"
        learnt = [x for n, x in load_file(final / "adapter_model.safetensors").items() if "_B" in n]
        assert any(bool(x.any()) for x in learnt) == (stage != "align")
        connector = load_file(final / "mmemo_face/connectors.safetensors")
        said.append(torch.cat([x.flatten() for _, x in sorted(connector.items())]))
    assert not torch.equal(said[0], said[1])
    assert not torch.equal(said[1], said[2])
    last: Any = unwrap(load_model(ModelConfig(path=str(out / "review/final"))).model)
    assert last.modalities == ("video", "audio", "face")


def test_r1_omni_runs_from_its_cold_start_to_rlvr(folder: Path) -> None:
    """The whole language model learns, and the KL is from the cold start's."""
    rows = {"cold_start": "train_emotion", "rlvr": "rl_prompts"}
    length = ["rollout.max_completion_length=8", "rollout.num_generations=4"]
    # A model that cannot speak gets none of the recipe's rewards.
    length += [f"rewards.1.path={reward('even')['path']}", "rewards.1.name=even"]
    length += ["train.learning_rate=1e-3"]
    changes = {"cold_start": fed(folder), "rlvr": length}
    out = run(folder, "r1_omni", rows, changes)
    steps(out / "cold_start")
    logged = steps(out / "rlvr")
    assert logged[-1]["kl"] > 0
    lines = (out / "rlvr/completions.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])["rewards"]) == {"outcome", "even"}
    weights = [load_file(out / name / "final/model.safetensors") for name in rows]
    moved = {n for n, x in weights[0].items() if not torch.equal(x, weights[1][n])}
    assert moved
    assert not [n for n in moved if "visual" in n or "audio_tower" in n]
