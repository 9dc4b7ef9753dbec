"""A tiny benchmark with real clips and a tiny random model: what evaluations are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmemo.config import parse
from mmemo.evaluation.config import EvalConfig
from mmemo.models.build import ModelConfig, load_model
from tests.media_files import write_clip
from tests.models.parts import TEXTS, shake, values

EMOTIONS = ["happy", "sad", "angry", "fear", "surprise"]
SUBSETS = ["video_aligned", "audio_aligned", "consistent"]
CLIPS = 3


def write_world(root: Path, rows: int = 10) -> Path:
    """Clips and ``test_conflict.jsonl``; each row asks about one of three clips."""
    for index in range(CLIPS):
        write_clip(root / f"clips/{index}.mp4", seconds=1.0, fps=4, tone=200.0 + 90 * index)
    lines = [json.dumps(row_of(index)) + "\n" for index in range(rows)]
    (root / "test_conflict.jsonl").write_text("".join(lines))
    return root


def row_of(index: int) -> dict[str, Any]:
    """Row ``index``: its subset, labels and speaker go round."""
    clip = f"clips/{index % CLIPS}.mp4"
    conflict = SUBSETS[index % 3]
    truth, other = EMOTIONS[index % 5], EMOTIONS[(index + 2) % 5]
    return {
        "sample_id": f"test-{index:03d}",
        "messages": [
            {"role": "user", "content": f"<video><audio><face>{TEXTS[0]} ({index})"},
            {"role": "assistant", "content": f"<answer>{truth}</answer>"},
        ],
        "videos": [clip],
        "audios": [clip],
        "faces": [clip],
        "label": truth,
        "modality_labels": {
            "video": other if conflict == "audio_aligned" else truth,
            "audio": other if conflict == "video_aligned" else truth,
        },
        "group": {"speaker": f"s{index % 4}", "gender": "fm"[index % 2]},
        "conflict": conflict,
        "tier": "emotion",
    }


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny model with weights that depend on its input."""
    loaded = load_model(parse(ModelConfig, values(seed=seed, **changes)), TEXTS)
    shake(loaded.model)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def config_of(world: Path, model: Path, out: Path, **changes: Any) -> EvalConfig:
    """An evaluation of ``model`` on ``world``."""
    return parse(
        EvalConfig,
        {
            "output_dir": str(out),
            "model": {"path": str(model)},
            "data": {"manifests": [str(world / "test_conflict.jsonl")], "media_root": str(world)},
            "store": {"path": str(world / "features")},
            "decode": {"workers": 1},
            "generation": {"max_new_tokens": 8},
            "per_device_eval_batch_size": 3,
            "bootstrap": {"resamples": 100},
            **changes,
        },
    )
