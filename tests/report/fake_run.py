"""A finished run folder with invented answers and real clips: what reports are tested on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import PARSER_VERSION
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult, read_results, write_results
from mmemo.evaluation.scoring import (
    ScoreValues,
    constant_rows,
    score_means,
    score_rows,
    score_task,
)
from mmemo.statistics import INTERVALS, BootstrapConfig
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
            "model": {"path": "org/emotion-model", "fingerprint": "f" * 64},
            "data": {"manifests": [], "media_root": str(media_root), "modalities": None},
            "benchmark": {"file": "eval/world_conflict.py", "sha256": "b" * 64},
            "sampling": {"frames": 8, "sample_rate": 16000, "face": {"detector": "boxes"}},
            "prompts": {"sha256": "c" * 64, "example": QUESTION},
            "generation": {"do_sample": False, "max_new_tokens": 64},
            "batch_size": 16,
            "seed": 0,
            "parser": PARSER_VERSION,
            "bootstrap": BOOTSTRAP.model_dump(),
            "intervals": INTERVALS,
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
    stages: dict[str, Any] = {"world": {"status": "done", "stage": "world", "seconds": 61.2}}
    for number, name in enumerate(["attribute", "expression", "emotion"]):
        noise = random.Random(number)
        (root / name).mkdir()
        with (root / name / "metrics.jsonl").open("w") as handle:
            for step in range(1, 121):
                loss = (2.2 - 0.4 * number) * math.exp(-step / 40) + 0.3 + noise.gauss(0, 0.08)
                handle.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-3}) + "\n")
        stages[name] = {"status": "done", "stage": "sft", "seconds": 45.0 + number}
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
        stages[name] = {"status": "done", "stage": "eval", "seconds": 12.0}
    (root / "state.json").write_text(json.dumps({"stages": stages}))
    config = {"data": {"manifests": [str(manifest)]}}
    event = {"kind": "stage_started", "stage": "eval", "config": config}
    (root / "events.jsonl").write_text(json.dumps(event) + "\n")
    return root


REWARDS = {"format": 0.3, "outcome": 1.0, "grounding": 0.5}


def add_grpo(root: Path, name: str = "grpo", *, gamed: bool = False, same: bool = False) -> Path:
    """A GRPO stage run by hand in a finished run: its events, numbers and completions, as the
    trainer writes them. ``gamed``: grounding comes to pay wrong answers. ``same``: one prompt is
    logged throughout."""
    folder, chance = root / name, random.Random(0)
    folder.mkdir()
    manifest = root / f"world/{name}.jsonl"
    rows = [(f"train-{at}", ("sad", "angry")[at % 2], f"clips/{at % 4:04d}.mp4") for at in range(9)]
    manifest.write_text(
        "".join(
            json.dumps({"sample_id": sample, "label": label, "videos": [clip],
                        "group": {"speaker": "p01"}}) + "\n" for sample, label, clip in rows
        )
    )  # fmt: skip
    config = {
        "data": {"manifests": [str(manifest)], "media_root": str(root / "world")},
        "trust": {"outcome": "outcome", "trusted": ["grounding"], "gate": {"threshold": 0.4}},
        "rollout": {"num_generations": 4, "temperature": 1.0},
        "watch": {"outcome": None},
    }
    rewards = [
        {"name": one, "path": f"reward/{one}.py:{one}", "weight": weight}
        for one, weight in REWARDS.items()
    ]
    event = {"time": 1.0, "kind": "grpo", "config": config, "rewards": rewards}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    with (folder / "metrics.jsonl").open("w") as handle:
        for step in range(2, 42, 2):
            share = step / 40 if gamed else 0.0
            handle.write(json.dumps(grpo_line(step, share, chance)) + "\n")
    with (folder / "completions.jsonl").open("w") as handle:
        for step in range(2, 42, 2):
            for at in (0,) if same else (step % 9, (step + 1) % 9):
                sample, label, _ = rows[at]
                group = said_by_a_group(step, sample, label)
                handle.write(json.dumps(group) + "\n")
    return folder


def grpo_line(step: int, gamed: float, chance: random.Random) -> dict[str, float]:
    """One log line; the gate opens at step 10. ``gamed``: 0 to 1, how far the policy games."""

    def near(value: float) -> float:
        return value + chance.gauss(0, 0.01)

    line = {"step": step, "loss": near(0.0), "entropy": near(0.7), "kl": 0.001 * step,
            "completions/mean_length": 34 * (1 + gamed), "completions/min_length": 9.0,
            "completions/max_length": 60.0, "completions/clipped_ratio": 0.0,
            "hack/length_drift": gamed, "hack/distinct_label_rate": near(0.1),
            "hack/top_label_share": near(0.3), "hack/unreadable_rate": near(0.05),
            "hack/unscored_rate": 0.0, "hack/zero_variance_share": 0.0625,
            "trust/gate_accuracy": near(0.6), "trust/gate_strength": float(step > 10)}  # fmt: skip
    for name in REWARDS:
        asked = name != "grounding" or step > 10
        line[f"hack/{name}/unscored_rate"] = 0.0 if asked else 1.0
        if asked:
            line[f"rewards/{name}/mean"] = near(0.6 - 0.3 * gamed * (name == "outcome"))
            line[f"rewards/{name}/std"] = near(0.4)
            line[f"rewards/{name}/within_std"] = near(0.3)
            line[f"rewards/{name}/advantage_share"] = near(1 / 3)
            if name != "outcome":
                line[f"hack/{name}/outcome_correlation"] = near(0.3 - gamed * (name != "format"))
    if step > 10:
        line |= {"trust/mean_tau": near(0.95), "trust/share_distrusted": near(0.3)}
    return line


def said_by_a_group(step: int, sample: str, label: str) -> dict[str, Any]:
    """Four completions of one prompt: right, wrong, cut off, and one that names nothing."""
    texts = [f"<think>{step} & <b>brows</b></think><answer>{a}</answer>"
             for a in ("fear", label, "nothing")]  # fmt: skip
    return {
        "step": step,
        "sample_id": sample,
        "prompt": "<video><audio>What does the person feel?",
        "label": label,
        "completions": [*texts, "<think>The brows and the brows and"],
        "ended": [True, True, True, False],
        "rewards": {"format": [1.0, 1.0, 1.0, 0.0], "outcome": [0.0, 1.0, 0.0, 0.0],
                    "grounding": [None if step <= 10 else 0.25] * 4},
        "advantages": [-0.4, 1.4, -0.3, -0.7],
    }  # fmt: skip
