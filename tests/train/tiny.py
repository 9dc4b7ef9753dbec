"""A tiny stage on real clips: real files, towers, processor and model, in under a second a step."""

from __future__ import annotations

import json
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmemo.config import load_config, parse
from mmemo.train.distributed import leave
from mmemo.train.sft import SftConfig, run_sft
from tests import children
from tests.media_files import write_clip
from tests.models.parts import values

ANSWERS = ["angry", "happy", "sad", "neutral"]


def write_rows(folder: Path, clips: int = 6, rows: int = 24) -> Path:
    """Clips of differing sound, and a manifest of questions about all or one of their streams."""
    (folder / "clips").mkdir(parents=True)
    for number in range(clips):
        write_clip(
            folder / "clips" / f"{number}.mp4",
            seconds=0.5,
            size=(32, 32),
            tone=200.0 + 60 * number,
        )
    lines: list[str] = []
    for number in range(rows):
        clip = f"clips/{number % clips}.mp4"
        asked = [("video", "audio", "face"), ("face",), ("audio",), ()][number % 4]
        answer = ANSWERS[number % len(ANSWERS)]
        question = "Which emotion? " + "Look and listen closely. " * (number % 3)
        row: dict[str, Any] = {
            "sample_id": f"row-{number:03d}",
            "messages": [
                {"role": "user", "content": "".join(f"<{name}>" for name in asked) + question},
                {
                    "role": "assistant",
                    "content": f"<think>{'it is so. ' * (number % 4)}</think>"
                    f"<answer>{answer}</answer>",
                },
            ],
            "tier": "attribute" if number % 2 else "emotion",
        }
        row.update({f"{name}s": [clip] for name in asked})
        lines.append(json.dumps(row))
    manifest = folder / "rows.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def sft_values(rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a stage on :func:`write_rows`; ``train={...}`` and others are merged in."""
    found: dict[str, Any] = {
        "output_dir": str(out),
        "model": values(),
        "data": {"manifests": [str(rows / "rows.jsonl")], "media_root": str(rows)},
        "trainable": ["lm", "connectors", "fusion"],
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
        },
        "run": {"logging_steps": 1, "save_steps": 2, "threads": 1},
        "store": {"path": str(rows / "features")},
        "decode": {"workers": 1},
    }
    for key, change in changes.items():
        both = key != "model" and isinstance(change, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **change} if both else change
    return found


def sft_config(rows: Path, out: Path, **changes: Any) -> SftConfig:
    return parse(SftConfig, sft_values(rows, out, **changes))


def start(found: dict[str, Any]) -> BaseProcess:
    """Start a stage in a process of its own, which can be killed."""
    return children.start(_run, json.dumps(found))


def _run(text: str) -> None:
    run_sft(parse(SftConfig, json.loads(text)))


def main() -> None:
    """``python -m tests.train.tiny CONFIG``: what a rank runs."""
    run_sft(load_config(SftConfig, Path(sys.argv[1])))
    leave()


if __name__ == "__main__":
    main()
