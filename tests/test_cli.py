"""The command line as a user meets it: real processes, one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmemo.cli import VERBS


def mmemo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmemo.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("verb", [*VERBS, "pipeline", "check", "schema"])
def test_each_verb_has_help(verb: str) -> None:
    done = mmemo(verb, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    done = mmemo("sft", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nowhere.yaml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sfft", "a.yaml"], "sfft"),
        (["world", "a.yaml", "extra"], "extra"),
        (["schema", "sfft"], "verbs:"),
        (["world", "a.yaml"], "did you mean 'seed'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "a.yaml").write_text("sead: 1\n")
    done = mmemo(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("verb", [*VERBS, "pipeline"])
def test_schema_is_json_schema(verb: str) -> None:
    schema = json.loads(mmemo("schema", verb).stdout)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
