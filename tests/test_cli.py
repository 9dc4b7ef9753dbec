"""The command line as a user meets it: real processes, one-sentence errors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmemo.cli import app, main
from mmemo.console import console
from mmemo.errors import DataError
from mmemo.stages import STAGES, stage

ROOT = Path(__file__).parent.parent
PIPELINE = "train_configs/quickstart/pipeline.yaml"


def mmemo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmemo.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize(
    "command", [*STAGES, "pipeline", "study", "check", "compare", "labels", "schema"]
)
def test_each_command_has_help_with_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    shown = " ".join(done.stdout.split())
    assert f"Example: mmemo {command} " in shown
    if command in STAGES:
        assert "Needs: " in shown
        assert "Writes: " in shown


def test_help_lists_every_command_with_what_it_does() -> None:
    done = mmemo("--help")
    assert done.returncode == 0
    for command in (*STAGES, "pipeline", "study", "check", "compare", "schema", "version"):
        assert f"│ {command} " in done.stdout


def test_labels_prints_the_sets_a_set_and_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    runner = CliRunner()
    for arguments, words in (
        ([], ("mer2023", "mer2024, mer23", "EmoNet")),
        (["ravdess"], ("RAVDESS", "06", "fearful", "恐惧", "scared", "116°", "russell")),
        (["iemocap6", "iemocap4"], ("iemocap4 counts excited as happy", "(dropped)")),
    ):
        done = runner.invoke(app, ["labels", *arguments])
        assert done.exit_code == 0
        assert all(word in done.stdout for word in words), done.stdout
    assert "happy and excited become happy; iemocap4 has no label for frustrated" in done.stdout
    wrong = mmemo("labels", "mer203")
    assert wrong.returncode == 2
    assert "there is no label set 'mer203'; did you mean 'mer2023'?" in wrong.stderr


def test_a_name_that_the_terminal_cannot_show_is_still_a_sentence(tmp_path: Path) -> None:
    """A Chinese name on a terminal of ASCII, brackets, and a name that is no text at all."""
    name = "悲 [a]".encode() + b"\xff.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "mmemo.cli", "sft", name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert rb"\u60b2 [a]\udcff.yaml" in done.stderr
    assert b"Traceback" not in done.stderr


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    lines = [line.partition("#")[0] for line in text.splitlines() if line.startswith("mmemo ")]
    return [shlex.split(line) for line in lines]


def test_the_configs_of_the_readmes_commands_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert {command[1] for command in commands} >= {"check", "encode", "sft", "export", "schema"}
    runner = CliRunner()
    for _, command, *rest in commands:
        if command not in {"check", "encode", "sft", "grpo"}:
            continue
        alone = [text for text in rest if text not in ("--processes", "2")]
        done = runner.invoke(app, [command, *alone])
        # Everything but the data is there: the manifest is the user's.
        assert isinstance(done.exception, DataError), (command, rest, done.output)
        assert ".jsonl: cannot be read" in str(done.exception)


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    done = mmemo("sft", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nowhere.yaml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sfft", "a.yaml"], "no command 'sfft'; did you mean 'sft'"),
        (["towers", "a.yaml"], "stage 'towers' is now called 'encoders'"),
        (["world", "a.yaml", "extra"], "extra"),
        (["schema", "sfft"], "did you mean 'sft'"),
        (["world", "a.yaml"], "did you mean 'seed'"),
        (["world", "a.yaml", "--seed=[1"], "not valid YAML"),
        (["world", "a.yaml", "--seed", "3"], "write --seed=3"),
        (["world", "a.yaml", "--sead=1", "--seed=x"], 'valid integer, not "x"'),
        (["world", "latin.yaml"], "UTF-8"),
        (["world", "good.yaml", "--output_dir=a.yaml/world"], "a.yaml/world"),
        (["pipeline", PIPELINE, "--output_dir=a.yaml/run"], "a.yaml/run"),
        (["check", "a.yaml", "--stage", "sftt"], "did you mean 'sft'"),
        (["check", PIPELINE, "--stages.0.stage=wrld"], "did you mean 'world'"),
        (["check", PIPELINE, "--stages.0.verb=wrld"], "write stage: instead of verb:"),
        (["encoders", "old.yaml"], "write encoders: instead"),
        (["compare", "nowhere", "elsewhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["world", "good.yaml", "--run", "there"], "write --output_dir=DIR"),
        (["check", "good.yaml", "--stage", "world", "--run", "there"], "--output_dir=DIR"),
        (["eval", "eval/ravdess.py", "--run", "there"], "--output-dir DIR"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "a.yaml").write_text("sead: 1\n")
    (tmp_path / "good.yaml").write_text("output_dir: world\nseed: 1\n")
    (tmp_path / "old.yaml").write_text("towers: {}\n")
    (tmp_path / "latin.yaml").write_bytes("name: Zoë\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmemo", *arguments])
    # In this process: the other tests here start the program itself.
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in shown
    assert says in shown


def test_a_pipeline_is_checked_stage_by_stage() -> None:
    done = CliRunner().invoke(app, ["check", PIPELINE])
    assert done.exit_code == 0, done.exception
    assert "emotion (sft): runs/quickstart/emotion" in done.stdout
    assert "valid configs" in done.stdout


@pytest.mark.parametrize("stage", [*STAGES, "pipeline", "study"])
def test_schema_is_json_schema(stage: str) -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema", stage]).stdout)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


def test_a_benchmark_is_given_all_options_of_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that click reads itself, too, which are not left in its other arguments."""
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "mmemo.evaluation.script.run_zero_shot", lambda _, argv: asked.append(list(argv))
    )
    values = {"N": "2", "N,...": "1,2", "hf|vllm": "vllm"}
    options = stage("eval").options
    given = [
        text
        for one in options
        for text in ([one.flag] if one.metavar is None else [one.flag, values[one.metavar]])
    ]
    rest = ["--data", "D", "--model", "M", "--generation.max_new_tokens=4"]
    done = CliRunner().invoke(app, ["eval", "eval/ravdess.py", *given, *rest])
    assert done.exit_code == 0, done.output
    assert sorted(asked[0]) == sorted([*given, *rest])
    CliRunner().invoke(app, ["eval", "eval/ravdess.py", *rest])
    assert asked[1] == rest
