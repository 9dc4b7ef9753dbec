"""The reward model's stage: it learns, goes on to the same bits, and is honest about its grades."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo import checkpoint
from mmemo.config import load_config, parse
from mmemo.errors import ConfigError, DataError
from mmemo.rewards.judge.calibration import refusal
from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig, scorer_digest
from mmemo.rewards.judge.rubric import DIMENSIONS
from mmemo.stages import guess
from mmemo.train.reward_model import (
    RewardModelConfig,
    build_scorer,
    check_reward_model,
    item_of,
    load_graded,
    run_reward_model,
    scorer_texts,
)
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans

SIZE = {"train_clips": 60, "test_clips": 12, "train_speakers": 6, "test_speakers": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graded manifests, without clips."""
    path = tmp_path_factory.mktemp("graded")
    size = {**SIZE, "graded_answers": 4, "graded_contrasts": 1}
    config = parse(WorldConfig, {"output_dir": "unused", "size": size})
    made = manifests(config, make_plans(config))
    for name in ("train_graded", "test_graded"):
        text = "".join(json.dumps(row) + "\n" for row in made[name])
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return path


def config_of(folder: Path, out: Path, **sections: Any) -> RewardModelConfig:
    scratch = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2}
    values: dict[str, Any] = {
        "output_dir": str(out),
        "model": {"text": {"scratch": {**scratch, "vocab_size": 700}}, "max_length": 512},
        "data": {"manifests": [str(folder / "train_graded.jsonl")]},
        "test_data": {"manifests": [str(folder / "test_graded.jsonl")]},
        "train": {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3},
        "run": {"use_cpu": True, "save_steps": 2, "logging_steps": 1, "threads": 1},
        "bootstrap": {"resamples": 100},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return parse(RewardModelConfig, values)


def test_it_learns_and_says_how_well(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps of a tiny scorer: far above chance where the text alone tells the grade."""
    config = config_of(folder, tmp_path, train={"max_steps": 60})
    final = run_reward_model(config)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["n"] == 60
    assert found["speakers"] == 4
    complete = found["dimensions"]["caption_completeness"]["spearman"]
    assert complete["value"] > 0.4
    assert complete["low"] is not None
    assert (tmp_path / "calibration.png").exists()
    # Too few steps to read the facts, which is measured, printed and kept with the model.
    swapped, constant = found["swapped"], found["constant"]
    assert swapped["drop"]["value"] == pytest.approx(swapped["own"] - swapped["other"], abs=1e-3)
    assert swapped["drop"]["low"] <= swapped["drop"]["value"] <= swapped["drop"]["high"]
    assert 0.2 <= constant["reward"] <= 1
    assert (constant["tried"], constant["clips"]) == (8, 12)
    assert found["passed"] is (refusal(found) is None)
    assert found == json.loads((final / "calibration.json").read_text())
    assert found["model"]["sha256"] == scorer_digest(final)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Beside another clip's facts, right answers lose" in printed
    assert ("is refused as a reward" in printed) is not found["passed"]
    assert checkpoint.verify(final, extra_ok=True).files
    assert not [path for path in final.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    whole = config_of(folder, tmp_path / "whole")
    run_reward_model(whole)
    cut = tmp_path / "cut"
    run_reward_model(config_of(folder, cut))
    shutil.rmtree(cut / "checkpoint-4")
    shutil.rmtree(cut / "final")
    run_reward_model(config_of(folder, cut))
    events = [json.loads(text)["kind"] for text in (cut / "events.jsonl").read_text().splitlines()]
    assert "resume" in events
    for name in ("heads.safetensors", "backbone/model.safetensors"):
        one, other = (load_file(base / "final" / name) for base in (tmp_path / "whole", cut))
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (
        json.loads((base / "calibration.json").read_text())["dimensions"]
        for base in (tmp_path / "whole", cut)
    )
    assert one == other
    changed = config_of(folder, cut, train={"learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="learning_rate"):
        run_reward_model(changed)


def test_adapters_on_a_saved_model_are_merged_into_the_result(folder: Path, tmp_path: Path) -> None:
    plain = config_of(folder, tmp_path / "plain", train={"max_steps": 1})
    start = run_reward_model(plain) / "backbone"
    lora = {"text": str(start), "lora": {"r": 2, "lora_dropout": 0.0}, "max_length": 512}
    config = config_of(folder, tmp_path / "lora", model=lora, train={"learning_rate": 0.05})
    scorer, _ = build_scorer(config.model, [])
    learns = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learns if name.startswith("backbone."))
    assert {"direction.weight", "thresholds"} <= learns
    final = run_reward_model(config)
    assert not (final / "backbone" / "adapter_config.json").exists()
    before, after = (load_file(path / "model.safetensors") for path in (start, final / "backbone"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    judge = LocalJudge(LocalJudgeConfig(model=str(final), use_cpu=True, rounded=False))
    graded = judge.grade([item_of(row) for row in load_graded(config.test_data)])
    assert all(one is not None for one in graded)


def test_a_speaker_in_both_sets_is_refused(folder: Path, tmp_path: Path) -> None:
    same = {"manifests": [str(folder / "train_graded.jsonl")]}
    with pytest.raises(DataError, match="is in both data and test_data"):
        run_reward_model(config_of(folder, tmp_path, test_data=same))


def test_rows_without_facts_to_swap_are_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    rows = [json.loads(text) for text in (folder / "test_graded.jsonl").read_text().splitlines()]
    lines = [json.dumps(row) for row in rows[:4]]
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(lines))
    with pytest.raises(DataError, match="all rows have the same facts"):
        check_reward_model(config_of(folder, tmp_path, test_data={"manifests": [str(one)]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": 3}, "field 'candidate': must be the graded text"),
        ({"grades": {"factual_alignment": 3}}, "field 'grades': must have a whole number"),
        ({"grades": dict.fromkeys(DIMENSIONS, 6)}, "field 'grades'"),
        ({"grades": dict.fromkeys(DIMENSIONS, True)}, "field 'grades'"),
        ({"grades": None}, "field 'grades'"),
    ],
)
def test_wrong_rows_are_named(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [json.loads(text) for text in (folder / "train_graded.jsonl").read_text().splitlines()]
    rows[2].update(change)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    config = config_of(folder, tmp_path / "out", data={"manifests": [str(bad)]})
    with pytest.raises(DataError, match=message) as raised:
        run_reward_model(config)
    assert raised.value.line == 3


def test_what_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without DeepSpeed"):
        run_reward_model(config_of(folder, tmp_path, run={"deepspeed": "ds_configs/zero2.json"}))
    with pytest.raises(ConfigError, match=r"model\.text: 'no/such-folder/x' cannot be loaded"):
        build_scorer(config_of(folder, tmp_path, model={"text": "no/such-folder/x"}).model, [])
    short = config_of(folder, tmp_path, model={"max_length": 64})
    with pytest.raises(DataError, match="question and facts fill"):
        check_reward_model(short)
    long = config_of(folder, tmp_path, model={"max_length": 4096})
    with pytest.raises(ConfigError, match="more than the 1024 tokens"):
        check_reward_model(long)


def test_check_reads_everything_and_trains_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, tmp_path / "none")
    check_reward_model(config)
    assert "300 graded answers of 6 speakers" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert scorer_texts(load_graded(config.data))


def test_the_shipped_recipe_is_valid_and_its_verb_is_guessed() -> None:
    path = Path("train_configs/quickstart/reward_model.yaml")
    config = load_config(RewardModelConfig, path, variables={"run": "runs/x", "seed": "0"})
    assert guess(config.model_dump()) == "reward-model"
