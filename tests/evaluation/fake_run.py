"""A finished run folder with invented answers and real clips: what reports are tested on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mmemo.evaluation.parsing import PARSER_VERSION
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult, read_results, write_results
from mmemo.evaluation.scoring import (
    ScoreValues,
    constant_rows,
    score_means,
    score_rows,
    score_task,
)
from mmemo.evaluation.statistics import BootstrapConfig
from tests.media_files import write_clip

EMOTIONS = ["happy", "sad", "angry", "fear", "surprise", "neutral"]
BOOTSTRAP = BootstrapConfig(resamples=200)
QUESTION = "Which emotion does the person feel? Answer with one word."


def invent_rows(
    skill: float, *, n: int = 90, seed: int = 0, speakers: int = 10, side: str | None = None
) -> list[Row]:
    """``n`` answers to one fixed set of questions. ``skill`` is the chance to be right; ``side``
    (``audio`` or ``video``) answers that channel's label instead of the truth."""
    questions, answers = random.Random(1), random.Random(seed)
    rows: list[Row] = []
    for index in range(n):
        conflict = ("video_aligned", "audio_aligned", "consistent")[index % 3]
        truth, other = questions.sample(EMOTIONS[:5], 2)
        labels = {
            "video": other if conflict == "audio_aligned" else truth,
            "audio": other if conflict == "video_aligned" else truth,
            "text": "neutral",
        }
        speaker = f"t{index % speakers:02d}"
        said: str | None = truth if side is None else labels[side]
        if answers.random() > skill:
            said = answers.choice([*EMOTIONS, None])
        status = "ok" if said else answers.choice(["refused", "malformed"])
        rows.append(
            {
                "key": f"{index:064x}",
                "sample_id": f"test-{speaker}-{index:04d}-emotion-0",
                "task": "emotion",
                "labels": EMOTIONS,
                "question": QUESTION,
                "raw": f"<think>The brows & the pitch <b>agree</b>.</think><answer>{said}</answer>",
                "status": status,
                "answer": said,
                "truth": truth,
                "score": float(said == truth),
                "conflict": conflict,
                "modality_labels": labels,
                "group": {"speaker": speaker, "gender": "fm"[index % speakers % 2]},
                "media": {"video": f"clips/{index % 4:04d}.mp4"},
                "start": None,
                "end": None,
            }
        )
    return rows


def probe_rows(rows: list[Row], seed: int = 3) -> list[Row]:
    """Yes-or-no answers about the same clips."""
    answers = random.Random(seed)
    probes: list[Row] = []
    for index, row in enumerate(rows[:40]):
        said, truth = answers.choice(["yes", "yes", "no"]), ["yes", "no"][index % 2]
        changes = {"task": "probe_cue", "labels": ["yes", "no"], "answer": said, "truth": truth}
        name = row["sample_id"].replace("emotion", "probe")
        probes.append({**row, **changes, "status": "ok", "sample_id": name, "conflict": None,
                       "score": float(said == truth)})  # fmt: skip
    return probes


def write_evaluation(folder: Path, rows: list[Row], media_root: Path, **extra: Any) -> EvalResult:
    """``predictions.jsonl`` and ``results.json`` as the runner writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "predictions.jsonl").write_text("".join(lines))
    main = [row for row in rows if row["task"] == "emotion"]
    values: dict[str, Any] = {
        "name": folder.name,
        "role": "model",
        "n": len(rows),
        "excluded": {"questions": 1, "clips": 1},
        "bounds": {"asked": len(main) + 1, "worst": 0.5, "best": 0.8},
        "tasks": score_rows(rows, BOOTSTRAP),
        "baselines": {
            "majority": {
                "label": "sad",
                "counts": {"angry": 11, "sad": 31},
                "manifests": {"world/train_emotion.jsonl": "e" * 64},
                "block": score_task(constant_rows(main, "sad"), BOOTSTRAP),
            }
        },
        "made": {
            "model": {"path": "runs/x/sft/final", "fingerprint": "f" * 64},
            "data": {"manifests": [], "media_root": str(media_root), "modalities": None},
            "benchmark": {"file": "eval/world_conflict.py", "sha256": "b" * 64},
            "sampling": {"frames": 8, "sample_rate": 16000, "face": {"detector": "boxes"}},
            "prompts": {"sha256": "c" * 64, "example": QUESTION},
            "generation": {"do_sample": False, "max_new_tokens": 64},
            "batch_size": 16,
            "seed": 0,
            "parser": PARSER_VERSION,
            "bootstrap": BOOTSTRAP.model_dump(),
            "versions": {"mmemo": "0.1.0", "torch": "2.13.0"},
        },
    }
    return write_results(folder, {**values, **extra})


def add_scores(folder: Path, values: ScoreValues, *, sha256: str = "d" * 64) -> EvalResult:
    """Give a finished evaluation of one task scores, as the runner writes them."""
    result = read_results(folder)
    rows = result.rows()
    lines = [
        {"key": row["key"], "scores": {name: values[name][place] for name in values}}
        for place, row in enumerate(rows)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"path": "reward/x.py:x", "sha256": sha256, "params": {"need": 2}, "failed": 0}
    (task,) = result.tasks
    found = json.loads(json.dumps(result.values))
    found["made"]["scores"] = dict.fromkeys(values, how)
    found["tasks"][task]["scores"] = score_means(rows, values, BOOTSTRAP)
    return write_results(folder, found)


def make_run(root: Path) -> Path:
    """A pipeline folder: world, three training stages, four evaluations."""
    world = root / "world"
    for index in range(4):
        write_clip(world / f"clips/{index:04d}.mp4", seconds=1.5, tone=180.0 + 60 * index)
    stages: dict[str, Any] = {"world": {"status": "done", "verb": "world", "seconds": 61.2}}
    for number, name in enumerate(["attribute", "expression", "emotion"]):
        noise = random.Random(number)
        (root / name).mkdir()
        with (root / name / "metrics.jsonl").open("w") as handle:
            for step in range(1, 121):
                loss = (2.2 - 0.4 * number) * math.exp(-step / 40) + 0.3 + noise.gauss(0, 0.08)
                handle.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-3}) + "\n")
        stages[name] = {"status": "done", "verb": "sft", "seconds": 45.0 + number}
    bad = {"path": "clips/0099.mp4", "kind": "truncated", "detail": "moov atom not found"}
    (root / "attribute" / "bad_clips.jsonl").write_text(json.dumps(bad) + "\n")
    manifest = world / "test_conflict.jsonl"
    rows = invent_rows(0.75)
    manifest.write_text(
        "".join(
            json.dumps({"videos": [r["media"]["video"]], "group": r["group"], "tier": "emotion",
                        "conflict": r["conflict"]}) + "\n" for r in rows
        )
    )  # fmt: skip
    probes = probe_rows(rows)
    write_evaluation(root / "eval", [*rows, *probes], world, name="curriculum SFT")
    for name, title, skill, side in (
        ("eval_text", "text only", 0.05, None),
        ("eval_audio", "audio only", 0.6, "audio"),
        ("eval_video", "video only", 0.6, "video"),
    ):
        invented = invent_rows(skill, seed=7, side=side)
        write_evaluation(root / name, invented, world, name=title, role="baseline")
    for name in ("eval", "eval_text", "eval_audio", "eval_video"):
        stages[name] = {"status": "done", "verb": "eval", "seconds": 12.0}
    (root / "state.json").write_text(json.dumps({"stages": stages}))
    config = {"data": {"manifests": [str(manifest)]}}
    event = {"kind": "stage_started", "stage": "eval", "config": config}
    (root / "events.jsonl").write_text(json.dumps(event) + "\n")
    return root
