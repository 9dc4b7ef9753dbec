"""Supervised fine-tuning on real clips: what comes out, and that no kill changes a bit of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo import checkpoint
from mmemo.checkpoint import OneRank
from mmemo.config import parse
from mmemo.errors import ConfigError, TrainingError
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord
from mmemo.train.distributed import run_lock
from mmemo.train.sft import SftConfig, run_sft
from tests.train.tiny import sft_config, sft_values, start

LORA = {"r": 4, "lora_dropout": 0.1}
"""With dropout, so that the result depends on every random number drawn."""


def lora_model(**more: Any) -> dict[str, Any]:
    from tests.models.parts import values

    return {**values(), "lora": LORA, **more}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_full_model_learns_and_loads_again(rows: Path, tmp_path: Path) -> None:
    config = sft_config(
        rows,
        tmp_path / "run",
        train={"max_steps": 12, "learning_rate": 1e-2},
        run={"save_steps": 100},
        eval_data={"manifests": [str(rows / "rows.jsonl")], "media_root": str(rows), "limit": 8},
    )
    final = run_sft(config)
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert any("eval_loss" in line for line in metrics(tmp_path / "run"))
    checkpoint.verify(final)
    again = load_model(parse(ModelConfig, {"path": str(final)}))
    assert again.processor.sampling.frames == 4
    record = RunRecord(tmp_path / "run")
    (event,) = record.events("final")
    assert event["files"]["model.safetensors"] == sha256(final / "model.safetensors")
    assert record.events("sft")[0]["config"]["train"]["max_steps"] == 12


def test_the_next_stage_goes_on_from_the_last_and_only_named_parts_learn(
    rows: Path, tmp_path: Path
) -> None:
    first = run_sft(sft_config(rows, tmp_path / "first", train={"max_steps": 1}))
    second = run_sft(
        sft_config(
            rows,
            tmp_path / "second",
            model={"path": str(first)},
            curriculum={"tiers": ["emotion"], "replay_share": 0.25},
            trainable=["audio"],
            train={"max_steps": 2},
        )
    )
    before, after = (load_file(f / "model.safetensors") for f in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".connectors.audio." in name for name in changed)
    assert set(before) == set(after)


def test_a_scratch_tokenizer_knows_the_texts_of_later_tiers(rows: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        if line["tier"] == "emotion":
            line["messages"][1]["content"] = "zygomaticus zygomaticus zygomaticus"
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = sft_config(
        rows,
        tmp_path / "run",
        data={"manifests": [str(manifest)]},
        curriculum={"tiers": ["attribute"]},
        train={"max_steps": 1},
    )
    final = run_sft(config)
    tokenizer = load_model(parse(ModelConfig, {"path": str(final)})).processor.tokenizer
    assert len(tokenizer.encode(" zygomaticus", add_special_tokens=False)) <= 2


def test_an_adapter_is_a_peft_folder_that_loads_on_its_base(rows: Path, tmp_path: Path) -> None:
    final = run_sft(sft_config(rows, tmp_path / "run", model=lora_model(), train={"max_steps": 3}))
    names = {path.name for path in final.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= names
    saved = load_file(final / "adapter_model.safetensors")
    assert any("lora_B" in name and weight.any() for name, weight in saved.items())
    assert any("connectors" in name for name in saved)
    load_model(parse(ModelConfig, {"path": str(final)}))


def test_a_bad_clip_is_left_out_named_and_counted(rows: Path, tmp_path: Path) -> None:
    lines = (rows / "rows.jsonl").read_text().splitlines()
    bad = {**json.loads(lines[0]), "sample_id": "bad-row", "videos": ["clips/bad.mp4"]}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "clips").mkdir()
    for clip in (rows / "clips").iterdir():
        (folder / "clips" / clip.name).write_bytes(clip.read_bytes())
    (folder / "clips" / "bad.mp4").write_text("<html>no such video</html>")
    (folder / "rows.jsonl").write_text("\n".join([*lines[:8], json.dumps(bad)]) + "\n")
    config = sft_config(
        folder, tmp_path / "run", train={"max_steps": 2}, decode={"max_bad_share": 0.5}
    )
    run_sft(config)
    record = RunRecord(tmp_path / "run")
    assert record.events("ingest")[0]["rows_left_out"] == 1
    listed = (tmp_path / "run" / "bad_clips.jsonl").read_text()
    assert "bad-row" in listed
    with pytest.raises(TrainingError, match="max_bad_share"):
        run_sft(sft_config(folder, tmp_path / "strict", decode={"max_bad_share": 0.01}))


def test_a_changed_manifest_is_refused_on_resume(rows: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text((rows / "rows.jsonl").read_text())
    config = sft_config(
        rows,
        tmp_path / "run",
        data={"manifests": [str(manifest)], "media_root": str(rows)},
        train={"max_steps": 2},
    )
    run_sft(config)
    manifest.write_text(manifest.read_text().replace("angry", "tired"))
    with pytest.raises(ConfigError, match=r"inputs\..*rows\.jsonl.*resume_from_checkpoint=force"):
        run_sft(config)


def test_recomputed_activations_and_half_precision_learn_the_same(
    rows: Path, tmp_path: Path
) -> None:
    train: dict[str, dict[str, Any]] = {
        "plain": {},
        "recomputed": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }
    losses: dict[str, list[float]] = {}
    for name, change in train.items():
        final = run_sft(sft_config(rows, tmp_path / name, train={"max_steps": 4, **change}))
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
        saved = load_file(final / "model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=3e-2)
    assert losses["bf16"] != losses["plain"]


def test_without_a_store_the_same_model_comes_out(rows: Path, tmp_path: Path) -> None:
    finals = [
        run_sft(
            sft_config(
                rows,
                tmp_path / name,
                store={"path": str(rows / "features"), "enabled": enabled},
                train={"max_steps": 2},
            )
        )
        for name, enabled in (("on", True), ("off", False))
    ]
    first, second = (sha256(final / "model.safetensors") for final in finals)
    assert first == second


def test_two_runs_cannot_share_a_folder(rows: Path, tmp_path: Path) -> None:
    config = sft_config(rows, tmp_path)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(tmp_path, OneRank()):  # type: ignore[arg-type]
            os.write(told, b"x")
            time.sleep(60)
    os.read(ready, 1)
    try:
        with pytest.raises(TrainingError, match="another run is training here"):
            run_sft(config)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run_sft(sft_config(rows, tmp_path, train={"max_steps": 1}))


def test_deepspeed_needs_the_store(rows: Path, tmp_path: Path) -> None:
    values = sft_values(
        rows, tmp_path, store={"enabled": False}, run={"deepspeed": "ds_configs/zero2.json"}
    )
    with pytest.raises(ConfigError, match=r"store\.enabled=true"):
        run_sft(parse(SftConfig, values))


def kill_values(rows: Path, out: Path) -> dict[str, Any]:
    return sft_values(
        rows,
        out,
        model=lora_model(),
        train={"max_steps": 12, "per_device_train_batch_size": 3},
        run={"save_steps": 2},
    )


def finished(values: dict[str, Any]) -> str:
    """Run to the end; the adapter's SHA-256."""
    process = start(values)
    process.join()
    assert process.exitcode == 0
    return sha256(Path(values["output_dir"]) / "final" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a run that nobody stopped, and the hash of what it learnt."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, finished(kill_values(rows, folder))


def kill_when(values: dict[str, Any], moment: str, step: int, delay: float) -> bool:
    """Start, SIGKILL ``delay`` seconds after the moment, and say whether it was still running."""
    out = Path(values["output_dir"])
    process = start(values)
    while process.is_alive():
        if moment == "saving" and any(out.glob(f"checkpoint-{step}.tmp-*")):
            break
        if moment == "step" and _last_step(out) >= step:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _last_step(out: Path) -> int:
    try:
        return len((out / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return -1


def test_sigkill_in_a_step_and_in_a_save_changes_no_bit(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str]
) -> None:
    _, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    assert kill_when(cut, "step", 3, 0.0)
    assert kill_when(cut, "saving", 6, 0.0)
    assert finished(cut) == want
    steps = [event["step"] for event in RunRecord(tmp_path / "cut").events("resume")]
    assert steps[-1] >= 4
    left = [path.name for path in (tmp_path / "cut").iterdir() if ".tmp-" in path.name]
    assert left == []


@pytest.mark.fault
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(6))
def test_sigkill_at_random_moments_changes_no_bit(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str], seed: int
) -> None:
    """Each run is killed four times, half of them while it saves; no kill costs more than one
    save interval."""
    draw = random.Random(seed)
    _, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    killed = 0
    for _ in range(4):
        before = _last_step(tmp_path / "cut")
        step = draw.randrange(max(before, 0) + 1, 12) if before < 11 else 12
        moment = draw.choice(["step", "saving"])
        step += step % 2 if moment == "saving" else 0
        killed += kill_when(cut, moment, step, draw.choice([0.0, draw.random() * 0.05]))
        reached = _last_step(tmp_path / "cut")
        found = checkpoint.latest_valid(tmp_path / "cut")
        assert not found.refused
        assert reached - (found.checkpoint.step if found.checkpoint else 0) <= 2
    assert killed >= 2
    assert finished(cut) == want


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_ends_with_its_code_and_goes_on(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str], number: signal.Signals
) -> None:
    _, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    process = start(cut)
    while _last_step(tmp_path / "cut") < 3:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    (event,) = RunRecord(tmp_path / "cut").events("stopped")
    found = checkpoint.latest_valid(tmp_path / "cut").checkpoint
    assert found is not None
    assert found.step == event["step"] >= 3
    assert finished(cut) == want
