"""A face branch on a native model through the stages, by config files: faces are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.evaluation.results import read_results
from mmemo.models.qwen.branch import SPARE
from mmemo.world.render import run_world
from tests.models.native_files import FED
from tests.models.qwen.kinds import KINDS, train_tokenizer
from tests.train.test_native import run, stage, train
from tests.world.conftest import small

FACE: dict[str, Any] = {
    "encoder_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "preprocessor": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    },
    "spatial_tokens": 2,
    "tokens": 2,
}
SAMPLING = {"frames": 2, "face": {"detector": "boxes", "size": 32}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the world, of which only the face is shown, and a released model."""
    found = tmp_path_factory.mktemp("native_face")
    run_world(small(found / "rows"))
    lines: list[str] = []
    file = found / "rows/manifests/train_emotion.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = row["modality_labels"]["video"]
        kept = {k: row[k] for k in ("sample_id", "faces", "face_boxes", "group")}
        row = {**kept, "prompt": "<face>Which emotion?", "label": label}
        lines.append(json.dumps({**row, "completion": f"<answer>{label}</answer>"}) + "\n")
    (found / "rows/test_conflict.jsonl").write_text("".join(lines), encoding="utf-8")
    kind = KINDS["qwen2_5_vl"]
    tokenizer = train_tokenizer({**kind.names, "spare": SPARE[0]})
    kind.make(tokenizer).save_pretrained(found / "vl")
    tokenizer.save_pretrained(found / "vl")
    return found


def sft(folder: Path, **data: Any) -> dict[str, Any]:
    model = {"native": FED, "sampling": SAMPLING, "face": FACE}
    values = train(
        folder,
        folder / "vl",
        model=model,
        trainable=["lm", "connectors"],
        train={"max_steps": 100, "per_device_train_batch_size": 18, "learning_rate": 5e-3},
        run={"logging_steps": 10, "save_steps": 100},
    )
    return {**values, "data": {**values["data"], **data}}


def last_loss(out: Path) -> float:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["loss"]


def test_what_is_learnt_is_the_face(folder: Path) -> None:
    """Every row asks the same: without the face, only the shares of the labels can be told."""
    seen = run(folder, "sft", "seen", **sft(folder))
    blind = run(folder, "sft", "blind", **sft(folder, modalities=[]))
    assert last_loss(seen) < 0.5 * last_loss(blind)
    asked: dict[str, Any] = {
        "benchmark": "eval/world_conflict.py",
        "model": {"path": str(seen / "final")},
        "generation": {"max_new_tokens": 12},
    }
    done = run(folder, "eval", "answers", **stage(folder, **asked))
    found = read_results(done).tasks["emotion"]
    assert found["metrics"]["war"]["value"] > 0.8
