"""What ranks must have in common is compared before anything is loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemo.errors import TrainingError
from mmemo.train.preflight import difference, preflight
from tests.train.tiny import sft_config

ONE: dict[str, Any] = {
    "host": "a",
    "code": "c1",
    "versions": {"mmemo": "1", "torch": "2"},
    "config": {"train": {"seed": 1, "bf16": True}, "data": {"manifests": ["x"]}},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"mmemo": "1", "torch": "3"}}, "rank 1 on b has torch 3, and rank 0 on a"),
        ({"versions": {"mmemo": "1"}}, "torch None"),
        ({"code": "c2"}, "runs other code of mmemo"),
        ({"config": {**ONE["config"], "train": {"seed": 2, "bf16": True}}}, r"\(train.seed\)"),
        ({"config": {**ONE["config"], "train": {"seed": 1}}}, r"\(train.bf16\)"),
        ({"config": {**ONE["config"], "new": {}}}, r"\(new\)"),
    ],
)
def test_the_difference_is_named(change: dict[str, Any], said: str) -> None:
    assert difference([ONE, {**ONE, "host": "b"}]) is None
    found = difference([ONE, {**ONE, "host": "b", **change}])
    assert found is not None
    assert re.search(said, found)


class TwoRanks:
    """Rank 0 of two; ``other`` says what rank 1 answers to a text."""

    rank, size, is_main = 0, 2, True

    def __init__(self, other: Callable[[str], str]) -> None:
        self.other = other

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self.other(text)]

    def broadcast_text(self, text: str) -> str:
        return text


def test_hosts_and_what_is_free(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")

    def other(text: str) -> str:
        return text.replace('"host": "', '"host": "other-')

    found = preflight(config, tmp_path / "out", TwoRanks(other))  # type: ignore[arg-type]
    assert [one["ranks"] for one in found] == [[0], [1]]
    assert all(one["shared_store"] and one["disk_gib"] > 0 for one in found)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    blind = TwoRanks(lambda text: "" if text == "1" else text)
    with pytest.raises(TrainingError, match="put output_dir on a file system that all nodes share"):
        preflight(config, tmp_path / "out", blind)  # type: ignore[arg-type]


def test_a_store_of_each_nodes_own_is_allowed(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", store={"path": str(tmp_path / "local")})
    asked: list[str] = []

    def other(text: str) -> str:
        if text != "1":
            return text.replace('"host": "', '"host": "other-')
        asked.append(text)
        return "" if len(asked) == 2 else text  # first output_dir, then the store

    found = preflight(config, tmp_path / "out", TwoRanks(other))  # type: ignore[arg-type]
    assert [one["shared_store"] for one in found] == [True, False]


ROOT = Path(__file__).parents[2]


def test_a_hostfile_starts_each_node(tmp_path: Path) -> None:
    """By a stand-in for ssh that runs the command here, and one for mmemo that shows it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mmemo").write_text('#!/bin/sh\necho "$ON $NODE_RANK/$NNODES at $MASTER_ADDR: $*"\n')
    (tools / "login").write_text('#!/bin/sh\nON=$1 && export ON && shift && exec sh -c "$*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nn1 slots=2\n\nn2 slots=4\n")
    made = subprocess.run(
        [ROOT / "launch/multi_node.sh", "sft", "a b.yaml", "--train.seed=1"],
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOSTFILE": str(hosts),
            "SSH": str(tools / "login"),
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert made.returncode == 0, made.stderr
    given = "--run.deepspeed=ds_configs/zero2.json"
    assert sorted(made.stdout.splitlines()) == [
        f"n1 0/2 at n1: sft a b.yaml --train.seed=1 --processes 2 {given}",
        f"n2 1/2 at n1: sft a b.yaml --train.seed=1 --processes 4 {given}",
    ]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s[hb]*")), ids=lambda p: p.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    assert shutil.which("bash")
    subprocess.run(["bash", "-n", script], check=True)
