"""The two promises of the quickstart: it works, and what is done is not redone."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from mmemo.evaluation.overview import read_run

ROOT = Path(__file__).parent.parent


def quickstart() -> tuple[str, float]:
    started = time.monotonic()
    done = subprocess.run(
        ["launch/quickstart.sh"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode()
    assert done.returncode == 0, output[-4000:]
    return output, time.monotonic() - started


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_the_quickstart_trains_a_model_that_needs_both_channels() -> None:
    output, seconds = quickstart()
    print(f"quickstart: {seconds:.0f} s")
    report = ROOT / "runs/quickstart/report.html"
    assert "runs/quickstart/report" in output
    assert report.stat().st_size > 100_000
    runs = read_run(ROOT / "runs/quickstart").runs
    ours, others = runs[0].block, runs[1:]
    print(json.dumps({run.name: run.block["average"] for run in runs}))
    assert 0.6 <= ours["conflict_average"]["value"] <= 0.9
    assert {run.name for run in others} >= {"text only", "audio only", "video only"}
    for run in others:
        assert ours["average"]["low"] > run.block["average"]["high"], run.name

    output, again = quickstart()
    stages = re.findall(r"\[(\d+)/(\d+)\]", output)
    assert output.count("done before, nothing changed") == int(stages[-1][1])
    assert again < 60
