"""A server that mmemo starts: its command line, its GPUs, its environment, and its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.vllm.config import VllmConfig
from mmemo.generation.vllm.server import Started, command, devices, environment


def section(**values: Any) -> VllmConfig:
    return parse(VllmConfig, values)


def line(config: VllmConfig, gpus: list[str]) -> list[str]:
    mode, sizes = "raw_logprobs", {"rank": 16, "max_length": 4096}
    return command(config, "the-model", 8001, gpus, mode=mode, **sizes)


def value(arguments: list[str], name: str) -> str:
    """What counts: the last."""
    return arguments[len(arguments) - arguments[::-1].index(name)]


def again_and_again(call: Callable[[], None]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        call()
        time.sleep(0.05)


def test_the_command_line_says_what_drawing_needs() -> None:
    made = line(section(gpus=[4, 5], arguments=["--max-model-len", "512"]), ["4", "5"])
    assert made[:3] == [".venv-vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    for name, wanted in {
        "--model": "the-model",
        "--port": "8001",
        "--host": "127.0.0.1",
        "--tensor-parallel-size": "2",
        "--max-lora-rank": "16",
        "--logprobs-mode": "raw_logprobs",
        "--max-model-len": "512",  # the user's own wins
    }.items():
        assert value(made, name) == wanted
    assert {"--enable-lora", "--enable-scale-out"} <= set(made)
    assert "--enable-sleep-mode" not in made
    beside = line(section(colocate=True), ["0"])
    assert {"--enable-sleep-mode", "--gpu-memory-utilization"} <= set(beside)
    assert "--tensor-parallel-size" not in beside


def test_a_server_sees_its_own_gpus_and_is_no_rank() -> None:
    apart, beside, none = section(gpus=[4, 5]), section(colocate=True), section(gpus=[])
    seen = {"CUDA_VISIBLE_DEVICES": "2,3", "RANK": "1", "WORLD_SIZE": "2", "HOME": "/home/me"}
    seen |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "node0", "PYTHONPATH": "."}
    # Those that train are hidden from it by their own variable.
    assert devices(apart, seen, 0) == ["4", "5"]
    assert devices(beside, seen, 1) == ["3"]
    assert devices(beside, {}, 1) == ["1"]
    assert devices(none, seen, 0) == []
    found = environment(seen, ["4", "5"])
    assert found["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert found["HOME"] == "/home/me"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "PYTHONPATH", "TORCHELASTIC_RUN_ID"} & {*found}


def test_a_server_that_ends_is_said_and_one_that_runs_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    failing = Started([sys.executable, "-c", "raise SystemExit('no GPU')"], os.environ, log)
    with pytest.raises(RolloutError, match=r"ended with exit code 1; .*vllm\.log says why"):
        again_and_again(failing.check_alive)
    assert "no GPU" in log.read_text()
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    running = Started([sys.executable, "-c", program], os.environ, log)
    while not pid.exists() or not pid.read_text():
        running.check_alive()
        time.sleep(0.05)
    running.stop()
    with pytest.raises(RolloutError, match="ended with exit code"):
        running.check_alive()
    with pytest.raises(ProcessLookupError):  # its own child, too
        again_and_again(lambda: os.kill(int(pid.read_text()), 0))


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch/vllm_env\.sh, or set rollout\.vllm\.python"):
        Started(["/no/python", "-m", "x"], {}, tmp_path / "vllm.log")
