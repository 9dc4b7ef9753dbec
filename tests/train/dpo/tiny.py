"""A tiny preference stage on the clips of :mod:`tests.train.tiny`: a few seconds a run."""

from __future__ import annotations

import json
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmemo.config import load_config, parse
from mmemo.train.distributed import leave
from mmemo.train.dpo.train import DpoConfig, run_dpo
from tests import children
from tests.models.parts import values

QUESTIONS = ("joint", "audio", "video", "joint")
FEELINGS = ("angry", "happy", "sad", "neutral")


def write_pairs(folder: Path, count: int = 16, clips: int = 6) -> Path:
    """``pairs.jsonl``: one, the other or both rejected answers, of different lengths; negatives
    that are other clips, and some made of features; questions about both channels or one."""
    lines: list[str] = []
    for number in range(count):
        clip, other = (f"clips/{n % clips}.mp4" for n in (number, number + 1))
        query = QUESTIONS[number % 4]
        good, bad = FEELINGS[number % 4], FEELINGS[(number + 1) % 4]
        asked = ("video", "audio", "face")
        row: dict[str, Any] = {
            "sample_id": f"pair-{number:03d}",
            "prompt": [
                {
                    "role": "user",
                    "content": "".join(f"<{name}>" for name in asked)
                    + "Which emotion? "
                    + "Look and listen closely. " * (number % 3),
                }
            ],
            "query_modality": query,
            **dict.fromkeys(asked, clip),
            "chosen": f"<think>{'it is so. ' * (number % 4)}</think><answer>{good}</answer>",
        }
        if number % 3 != 1:
            row["rejected_spurious"] = f"<think>the room is blue.</think><answer>{bad}</answer>"
        if number % 3 != 2:
            row["rejected_hallucinated"] = f"<think>{'loud ' * (1 + number % 2)}</think>{bad}"
        if number % 2:
            row["negative_kind"] = "noise"
        elif query == "audio":
            row["audio_negative"] = other
        else:
            row |= {"video_negative": other}
            row |= {"audio_negative": other} if query == "joint" else {}
        if query != "joint":
            row["irrelevant_kind"] = "noise"
        lines.append(json.dumps(row))
    manifest = folder / "pairs.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def dpo_values(rows: Path, out: Path, *terms: Any, **changes: Any) -> dict[str, Any]:
    """Plain values of a run; sections given in ``changes`` are merged in. A term is its kind or
    its values."""
    found: dict[str, Any] = {
        "output_dir": str(out),
        "model": {**values(), "lora": {"r": 4, "lora_dropout": 0.0}},
        "data": {"manifests": [str(rows / "pairs.jsonl")], "media_root": str(rows)},
        "objective": {
            "terms": [{"kind": t} if isinstance(t, str) else t for t in terms or ("avem_dpo",)]
        },
        "trainable": ["lm", "connectors"],
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        "run": {"logging_steps": 1, "save_steps": 100, "threads": 1},
        "store": {"path": str(rows / "features")},
        "decode": {"workers": 1},
    }
    for key, change in changes.items():
        both = key != "model" and isinstance(change, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **change} if both else change
    return found


def dpo_config(rows: Path, out: Path, *terms: Any, **changes: Any) -> DpoConfig:
    return parse(DpoConfig, dpo_values(rows, out, *terms, **changes))


def start(found: dict[str, Any]) -> BaseProcess:
    """Start a run in a process of its own, which can be killed."""
    return children.start(_run, json.dumps(found))


def _run(text: str) -> None:
    run_dpo(parse(DpoConfig, json.loads(text)))


def main() -> None:
    """``python -m tests.train.dpo.tiny CONFIG``: what a rank runs."""
    run_dpo(load_config(DpoConfig, Path(sys.argv[1])))
    leave()


if __name__ == "__main__":
    main()
