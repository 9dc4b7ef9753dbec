"""Runs forked from a process that has imported the libraries: the same bytes, codes and deaths."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mmemo.experiments.study import COLD
from mmemo.experiments.warm import IMPORTED, WarmProcess

OWN = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
WORLD = """name: warm
output_dir: {out}
stages:
  - {{name: world, stage: world, config: {config}, overrides: ["size.train_clips={clips}"]}}
"""
SIZES = """output_dir: ${run}/world
size: {val_clips: 6, test_clips: 6, train_speakers: 2, val_speakers: 2, test_speakers: 2}
workers: 1
"""


def write(folder: Path, clips: int = 6) -> Path:
    """A pipeline that renders a few clips, or many."""
    folder.mkdir(parents=True)
    config, file = folder / "world.yaml", folder / "pipeline.yaml"
    config.write_text(SIZES)
    file.write_text(WORLD.format(out=folder / "run", config=config, clips=clips))
    return file


def wait(process: WarmProcess, seconds: float = 120) -> int:
    end = time.monotonic() + seconds
    while (code := process.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return code


def test_what_is_imported_is_there() -> None:
    assert all(importlib.util.find_spec(name) for name in IMPORTED)


def test_a_warm_run_equals_a_cold_one(tmp_path: Path) -> None:
    warm, cold = write(tmp_path / "warm"), write(tmp_path / "cold")
    assert wait(WarmProcess(warm, tmp_path / "log.txt", OWN)) == 0
    assert "done" in (tmp_path / "log.txt").read_text()
    environment = {**os.environ, **OWN}
    subprocess.run([*COLD, "pipeline", str(cold)], check=True, capture_output=True, env=environment)

    def clips(name: str) -> dict[str, bytes]:
        root = tmp_path / name / "run/world"
        found = sorted([*root.rglob("*.mp4"), *root.rglob("*.jsonl")])
        return {
            p.relative_to(root).as_posix(): p.read_bytes() for p in found if "events" not in p.name
        }

    assert len(clips("warm")) > 4
    assert clips("warm") == clips("cold")


def test_an_error_is_a_code_and_a_line_of_the_log(tmp_path: Path) -> None:
    file = write(tmp_path / "bad")
    file.write_text(file.read_text().replace("stage: world", "stage: wrold"))
    assert wait(WarmProcess(file, tmp_path / "log.txt", OWN)) == 2
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith("error: ")


def test_signals_reach_a_run(tmp_path: Path) -> None:
    killed = WarmProcess(write(tmp_path / "a", 4000), tmp_path / "a.txt", OWN)
    stopped = WarmProcess(write(tmp_path / "b", 4000), tmp_path / "b.txt", OWN)
    while not all((tmp_path / f"{name}/run/world").is_dir() for name in "ab"):
        time.sleep(0.05)
    killed.kill()
    stopped.send_signal(signal.SIGTERM)
    assert wait(killed) == -signal.SIGKILL
    assert wait(stopped) not in (0, None)
    stopped.send_signal(signal.SIGTERM)  # it has ended: nothing happens


SCRIPT = """
import sys, time
from pathlib import Path
from mmemo.experiments.warm import WarmProcess
if __name__ == "__main__":
    process = WarmProcess(Path(sys.argv[1]), Path(sys.argv[2]), {"OMP_NUM_THREADS": "1"})
    print(process._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a process")
def test_a_run_dies_with_its_study(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(SCRIPT)
    file = write(tmp_path / "long", 4000)
    study = subprocess.Popen(
        [sys.executable, str(script), str(file), str(tmp_path / "log.txt")], stdout=subprocess.PIPE
    )
    assert study.stdout is not None
    run = psutil.Process(int(study.stdout.readline()))
    while not (tmp_path / "long/run/world").is_dir():
        time.sleep(0.05)
    study.kill()
    study.wait()
    gone, alive = psutil.wait_procs([run], timeout=30)
    assert [one.pid for one in gone] == [run.pid]
    assert not alive
