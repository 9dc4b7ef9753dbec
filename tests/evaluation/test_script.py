"""Benchmarks run as scripts: what the command line stands for, and a whole evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemo.errors import ConfigError
from mmemo.evaluation.script import run_zero_shot, zero_shot_config
from tests.evaluation.world import save_model, write_world

FILE = "eval/world_conflict.py"


def test_the_command_line_is_a_config() -> None:
    config = zero_shot_config(
        Path(FILE).resolve(),
        [
            *("--model", "hub/a-model", "--data", "a.json", "b.json", "--media-root", "clips"),
            *("--generation.max_new_tokens=5", "--data.limit=3"),
        ],
        {"data": {"modalities": ["video"], "limit": 9}, "per_device_eval_batch_size": 2},
    )
    assert config.model.path == config.name == "hub/a-model"
    assert config.output_dir == "runs/world_conflict/hub-a-model"
    assert config.benchmark.path == FILE
    assert config.data.manifests == ["a.json", "b.json"]
    assert (config.data.media_root, config.data.modalities) == ("clips", ["video"])
    assert (config.data.limit, config.generation.max_new_tokens) == (3, 5)
    assert config.per_device_eval_batch_size == 2


def test_the_command_line_says_where_results_go_and_what_the_run_is_called(tmp_path: Path) -> None:
    arguments = [
        "--model",
        "m",
        "--data",
        "a.json",
        "--output-dir",
        str(tmp_path),
        "--name",
        "ours",
    ]
    config = zero_shot_config(FILE, arguments, {"benchmark": {"params": {"split": "test"}}})
    assert (config.output_dir, config.name) == (str(tmp_path), "ours")
    assert config.data.media_root == "."
    assert config.benchmark.params == {"split": "test"}


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        (["--generation.max_token=5"], "did you mean 'max_new_tokens'"),
        (["--generation.max_new_tokens", "5"], "write --section.key=value"),
    ],
)
def test_what_is_not_understood_is_named(further: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        zero_shot_config(FILE, ["--model", "m", "--data", "a.json", *further])


def test_a_model_and_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--model"):
        zero_shot_config(FILE, ["--data", "a.json"])
    with pytest.raises(SystemExit):
        zero_shot_config(FILE, ["--model", "m"])
    assert "--data" in capsys.readouterr().err


def test_it_evaluates_and_says_where_the_results_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, model = write_world(tmp_path / "world", 4), save_model(tmp_path / "model")
    arguments = [
        *("--model", str(model), "--data", str(world / "test_conflict.jsonl")),
        *("--media-root", str(world), "--output-dir", str(tmp_path / "out")),
        *("--generation.max_new_tokens=4", "--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    run_zero_shot(FILE, arguments)
    assert (tmp_path / "out/results.json").exists()
    assert "results.json" in capsys.readouterr().out.replace("\n", "")
    arguments[3] = str(tmp_path / "nowhere.json")
    with pytest.raises(SystemExit, match=r"^error: .*nowhere.json"):
        run_zero_shot(FILE, arguments)
