"""A native model under several ranks: ``python -m tests.train.native_ranks_job FOLDER``

Two ranks with one row each, or one rank that takes one after the other, train each case and write
``FOLDER/<ranks>/<case>-<engine>``. Rows ask about picture and sound, the sound alone, or nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmemo.config import parse
from mmemo.models.qwen.branch import SPARE
from mmemo.stages import config_class, stage
from mmemo.train.distributed import Ranks, leave
from tests.models.native_files import FED, save_omni
from tests.models.qwen.kinds import KINDS, train_tokenizer
from tests.train import test_native
from tests.train.grpo.tiny import reward
from tests.train.rank_job import STAGES
from tests.train.test_native_face import FACE

LORA = {"r": 4, "lora_dropout": 0.0}
SOFT = {"weight_penalty": 1.0, "load_penalty": 0.1, "routing": "soft"}
"""Soft, since a rounding error could pick another expert."""
FACES = {"frames": 4, "face": {"detector": "none", "size": 32}}


def prepare(folder: Path) -> None:
    """Clips, rows, pairs and the released models."""
    rows = test_native.write_rows(folder / "rows")
    test_native.write_pairs(rows)
    lines: list[str] = []
    for number, line in enumerate((rows / "test_conflict.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if number % 2 == 0:  # rows with and without a face on either rank
            row["faces"] = [f"clips/{number % test_native.CLIPS}.mp4"]
            row["messages"][0]["content"] = "<face>" + row["messages"][0]["content"]
        lines.append(json.dumps(row) + "\n")
    (rows / "faces.jsonl").write_text("".join(lines), encoding="utf-8")
    save_omni(folder / "omni")
    save_omni(folder / "wide", inner=128)
    kind = KINDS["qwen2_5_omni"]
    tokenizer = train_tokenizer({**kind.names, "spare": SPARE[0]})
    kind.make(tokenizer).save_pretrained(folder / "spare")
    tokenizer.save_pretrained(folder / "spare")


def cases(folder: Path) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """Name, stage, values and engines."""
    fed = {"path": str(folder / "omni"), "native": FED, "sampling": {"frames": 4}, "lora": LORA}
    data = {"media_root": str(folder / "rows")}
    drawn = {
        "rewards": [reward("even")],
        "rollout": {"num_generations": 3, "max_completion_length": 6, "temperature": 0.7},
        "grpo": {"beta": 0.04},
    }
    pairs = {
        "data": {**data, "manifests": [str(folder / "rows/pairs.jsonl")]},
        "objective": {"terms": [{"kind": "avem_dpo"}]},
    }
    yield "sft", "sft", {"model": fed}, tuple(STAGES)
    yield "grpo", "grpo", {"model": fed, **drawn}, tuple(STAGES)
    yield "dpo", "dpo", {"model": fed, **pairs}, tuple(STAGES)
    experts = {**LORA, "experts": SOFT}
    yield "experts", "sft", {"model": {**fed, "lora": experts}}, ("plain", "zero3")
    four = {"path": str(folder / "wide"), "quantization": "nf4"}
    yield "nf4", "sft", {"model": {**fed, **four}}, ("plain", "zero3")
    face = {**fed, "path": str(folder / "spare"), "face": FACE, "sampling": FACES}
    faces = {**data, "manifests": [str(folder / "rows/faces.jsonl")]}
    learnt = {"trainable": ["lm", "connectors"], "data": faces}
    yield "face", "sft", {"model": face, **learnt}, ("plain", "zero3")


def values_of(folder: Path, out: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    found = test_native.train(folder, folder / "omni")
    found["train"] = {
        **found["train"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2 // ranks,
    }
    found["run"] = {"logging_steps": 1, "save_steps": 100, "threads": 1, "use_cpu": True}
    return {**found, "output_dir": str(out), **changes}


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = Ranks(cpu=True)
    for name, kind, changes, engines in cases(folder):
        for engine in engines:
            if ranks.size == 1 and engine != "plain":
                continue  # the reference of all
            out = folder / str(ranks.size) / f"{name}-{engine}"
            values = values_of(folder, out, ranks.size, **changes)
            values["run"]["deepspeed"] = STAGES[engine]
            torch.manual_seed(0)
            stage(kind).runner(parse(config_class(kind), values))
    leave()


if __name__ == "__main__":
    main()
