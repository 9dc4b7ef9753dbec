"""On-policy rounds as a pipeline: a model answers, its answers are pairs, and a new LoRA learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmemo.experiments.pipeline import check_pipeline, read_pipeline, run_pipeline
from mmemo.pairs.steps import StepFile
from tests.evaluation.world import save_model, write_world
from tests.train.grpo.tiny import reward

SHIPPED = Path("train_configs/quickstart/on_policy.yaml")
PAIRS = [
    "data.manifests=[${run}/world/test_conflict.jsonl]",
    f"source.reward={json.dumps(reward('short'))}",
    "source.rollout.max_completion_length=120",
    "source.rollout.num_generations=4",
    "source.rollout.temperature=1.0",
    "source.min_gap=1e-6",
    "source.readable=false",  # the model is untrained
    "source.per_device_batch_size=2",
    "report={allow: [text, length, duplicates]}",
    "negatives={kinds: {noise: 1}}",
    "decode.workers=1",
]
DPO = [
    "model.lora={r: 4, lora_alpha: 8, lora_dropout: 0.0}",
    "train.max_steps=2",
    "run.logging_steps=1",
    "train.per_device_train_batch_size=2",
    "train.learning_rate=1e-2",
    "decode.workers=1",
]


def pipeline(folder: Path) -> Path:
    """The shipped pipeline without its evaluations, on a tiny world, with what that changes."""
    run = folder / "run"
    write_world(run / "world", 6)
    save_model(run / "dpo/final")
    found, _ = read_pipeline(SHIPPED, [])
    stages: list[dict[str, Any]] = []
    for stage in found.stages[:4]:
        extra = PAIRS if stage.stage == "pairs" else DPO
        stages.append({**stage.model_dump(), "overrides": [*stage.overrides, *extra]})
        stages[-1]["config"] = f"train_configs/quickstart/{stage.config}"
    path = folder / "on_policy.yaml"
    values = {"name": "rounds", "output_dir": str(run), "seed": 0, "stages": stages}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def outputs(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("pairs_1", "dpo_1", "pairs_2", "dpo_2")
        for path in (*(run / name).glob("pairs.jsonl"), *(run / name).glob("final/*.safetensors"))
    }


def test_the_shipped_pipeline_chains_its_rounds() -> None:
    check_pipeline(SHIPPED, [])
    _, configs = read_pipeline(SHIPPED, [])
    dumped: dict[str, Any] = {name: config.model_dump() for name, config in configs.items()}
    last = "runs/quickstart/dpo/final"
    for number in (1, 2):
        pairs, dpo = dumped[f"pairs_{number}"], dumped[f"dpo_{number}"]
        assert pairs["source"]["model"]["path"] == dpo["model"]["path"] == last
        assert dpo["model"]["adapter"] == "merge"
        assert dpo["model"]["lora"]["r"] > 0
        folder = f"runs/quickstart/pairs_{number}"
        assert pairs["output_dir"] == folder
        assert dpo["data"]["manifests"] == [f"{folder}/pairs.jsonl"]
        last = f"runs/quickstart/dpo_{number}/final"
        assert dumped[f"evaluation_round_{number}"]["model"]["path"] == last


@pytest.mark.fault
def test_two_rounds_resume_after_a_cut_and_each_samples_from_the_last_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline(tmp_path / "whole")
    run_pipeline(whole, [])
    expected = outputs(tmp_path / "whole/run")
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 2
    run = tmp_path / "whole/run"
    answers = [(run / f"pairs_{n}/answers.jsonl").read_text().splitlines() for n in (1, 2)]
    # The first line is the fingerprint of the model that answers.
    assert answers[0][0] != answers[1][0]
    assert answers[0][1:] != answers[1][1:]
    for number in (1, 2):
        lines = (run / f"dpo_{number}/metrics.jsonl").read_text().splitlines()
        # Each round starts at its own reference: the merged model of the round before.
        assert json.loads(lines[0])["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-5)
    base = json.loads((run / "dpo_2/final/adapter_config.json").read_text())
    assert base["r"] == 4

    # Stopped in the middle of the second round's answers.
    add, left = StepFile.add, iter(range(4))

    def cut(self: StepFile, found: Mapping[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, found)

    other = pipeline(tmp_path / "cut")
    monkeypatch.setattr(StepFile, "add", cut)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(other, [])
    monkeypatch.setattr(StepFile, "add", add)
    kept = (tmp_path / "cut/run/pairs_2/answers.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 2
    run_pipeline(other, [])
    assert outputs(tmp_path / "cut/run") == expected
