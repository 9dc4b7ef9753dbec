"""Studies: what is shared is made once, runs resume, failures are told, numbers are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmemo.errors import ConfigError
from mmemo.experiments.study import check_study, run_study

ROOT = Path(__file__).parent.parent.parent
CHILD = (sys.executable, "-m", "tests.experiments.study_child")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds, two arms. ``b`` adds 1 to what ``a`` makes, and seed 1 adds 10 to both."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STUDY_LOG", str(tmp_path / "log"))
    (tmp_path / "own.yaml").write_text("source: ${run}/world\nvalue: ${seed}0\n")
    (tmp_path / "arm.yaml").write_text("source: ${run}/sft\n")
    (tmp_path / "eval.yaml").write_text("source: ${run}/grpo\n")
    (tmp_path / "study.yaml").write_text(f"""
name: toy
output_dir: {tmp_path}/out
seeds: [0, 1]
shared:
  - {{name: world, stage: toy-make, overrides: [value=5]}}
start:
  - {{name: sft, stage: toy-make, config: own.yaml}}
stages:
  - {{name: grpo, stage: toy-make, config: arm.yaml}}
  - {{name: evaluation, stage: toy-eval, config: eval.yaml}}
arms:
  a: {{}}
  b: {{overrides: {{grpo: [value=1]}}}}
reference: a
metrics:
  score: {{stage: evaluation, path: n, better: higher}}
""")
    return tmp_path / "study.yaml"


def run(study: Path, *overrides: str) -> dict[str, Any]:
    run_study(study, list(overrides), command=CHILD)
    return read(study)


def read(study: Path) -> dict[str, Any]:
    return json.loads((study.parent / "out/results.json").read_text())


def calls(study: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (study.parent / "log").read_text().splitlines())


def scores(results: dict[str, Any]) -> dict[tuple[str, int], float]:
    return {(run["arm"], run["seed"]): run["metrics"]["score"] for run in results["runs"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_shared_is_made_once_and_a_second_run_does_nothing(
    study: Path, workers: int
) -> None:
    results = run(study, f"--workers={workers}")
    assert scores(results) == {("a", 0): 5, ("b", 0): 6, ("a", 1): 15, ("b", 1): 16}
    assert [(run["seed"], run["arm"]) for run in results["runs"]] == [
        (0, "a"), (0, "b"), (1, "a"), (1, "b"),
    ]  # fmt: skip
    made = calls(study)
    assert set(made.values()) == {1}
    assert len(made) == 1 + 2 + 2 * 4
    again = run(study, f"--workers={workers}")
    assert calls(study) == made
    for key in ("runs", "summary", "config"):
        assert again[key] == results[key]


def test_an_arm_that_changes_redoes_only_its_own_runs(study: Path) -> None:
    run(study)
    study.write_text(study.read_text().replace("value=1]", "value=2]"))
    results = run(study)
    assert scores(results)["b", 1] == 17
    again = {name for name, count in calls(study).items() if count > 1}
    assert again == {f"{seed}/b/{stage}" for seed in (0, 1) for stage in ("grpo", "evaluation")}


def test_a_failed_run_is_told_and_the_others_go_on(study: Path) -> None:
    study.write_text(study.read_text().replace("value=1]", "value=1, mood=fail]"))
    with pytest.raises(SystemExit) as stop:
        run(study)
    assert stop.value.code == 1
    results = read(study)
    status = {(run["arm"], run["seed"]): run["status"] for run in results["runs"]}
    assert status == {("a", 0): "done", ("b", 0): "failed", ("a", 1): "done", ("b", 1): "failed"}
    assert results["runs"][1]["error"] == "the stage is sad; cheer it up"
    assert "failed: b, seed 1" in (study.parent / "out/table.md").read_text()
    before = calls(study)
    (study.parent / "log.mended").touch()
    assert scores(run(study))["b", 1] == 16
    assert set(calls(study) - before) == {
        f"{seed}/b/{stage}" for seed in (0, 1) for stage in ("grpo", "evaluation")
    }


def test_a_start_that_fails_leaves_its_arms_waiting(study: Path) -> None:
    text = study.read_text().replace(
        "config: own.yaml}", "config: own.yaml, overrides: [mood=fail]}"
    )
    study.write_text(text)
    with pytest.raises(SystemExit):
        run(study)
    results = read(study)
    assert {run["status"] for run in results["runs"]} == {"waiting"}
    assert [entry["status"] for entry in results["shared"]] == ["done", "failed", "failed"]


def test_a_metric_that_is_not_there_fails_its_run(study: Path) -> None:
    with pytest.raises(SystemExit):
        run(study, "--metrics.score.path=m")
    assert "has no number at 'm'" in read(study)["runs"][0]["error"]
    assert scores(run(study, "--metrics.score.path=n"))["a", 0] == 5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("value=1]", "valu=1]", r"seed 0, arm b, stage 'grpo'.*did you mean 'value'"),
        ("{grpo: [", "{gropo: [", r"arm 'b' overrides stage 'gropo'.*did you mean 'grpo'"),
        ("a: {}", "a: {skip: [grop]}", r"arm 'a' skips stage 'grop'.*did you mean 'grpo'"),
        ("reference: a", "reference: c", r"comparison names arm 'c'"),
        ("stage: evaluation", "stage: evaluatoin", r"metric 'score', arm 'a'.*'evaluation'"),
        ("name: grpo", "name: sft", r"stage name 'sft' is used twice|overrides stage 'grpo'"),
        ("config: eval.yaml", "config: evil.yaml", r"arm a, stage 'evaluation': 'evil.yaml'"),
        ("seeds: [0, 1]", "seeds: [1, 1]", r"different numbers"),
    ],
)
def test_a_mistake_shows_before_anything_runs(study: Path, old: str, new: str, says: str) -> None:
    assert old in study.read_text()
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=says):
        run(study)
    assert not (study.parent / "log").exists()


def test_check_lists_the_runs_and_makes_nothing(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_study(study, [])
    said = capsys.readouterr().out
    assert "seed 1, arm b: grpo, evaluation" in said
    assert "7 pipelines" in said
    assert not (study.parent / "out").exists()


def test_report_makes_the_table_of_what_is_done(study: Path) -> None:
    run(study)
    (study.parent / "out/seeds/1/b/evaluation/results.json").unlink()
    (study.parent / "out/table.md").unlink()
    before = calls(study)
    run_study(study, [], command=CHILD, report=True)
    assert calls(study) == before
    assert [run["status"] for run in read(study)["runs"]] == ["done", "done", "done", "waiting"]
    assert "1 run of 4 not done yet" in (study.parent / "out/table.md").read_text()


def test_published_results_say_nothing_of_the_machine(study: Path) -> None:
    folder = study.parent / "published"
    run(study, f"--publish={folder}")
    assert {file.name for file in folder.iterdir()} == {"results.json", "table.md", "score.png"}
    text = (folder / "results.json").read_text()
    assert str(study.parent / "out") not in text
    assert os.uname().nodename not in text


STUDY = """
import sys
from pathlib import Path
from mmemo.experiments.study import run_study
from mmemo.stages import register
from tests.experiments.toy_stages import EVAL, MAKE
for stage in (MAKE, EVAL):
    register(stage)
command = (sys.executable, "-m", "tests.experiments.study_child")
run_study(Path(sys.argv[1]), [], command=command)
"""


def started(study: Path, marker: str = "value=1]") -> tuple[subprocess.Popen[str], int]:
    """A study as a process, once its first arm ``b``, which ``marker`` begins, sleeps; the process
    id of that run."""
    asleep = marker.replace("value=1]", "value=1, mood=sleep]")
    study.write_text(study.read_text().replace(marker, asleep))
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(study)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    log = study.parent / "log"
    while not log.exists() or "0/b/grpo" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    line = next(line for line in log.read_text().splitlines() if line.startswith("0/b/grpo"))
    return process, int(line.split()[1])


def gone(pid: int) -> bool:
    """True once a process has ended; waits a little for it."""
    for _ in range(250):
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def finish(study: Path) -> None:
    """Run what is left and look that nothing else was redone."""
    before = calls(study)
    (study.parent / "log.awake").touch()
    assert scores(run(study)) == {("a", 0): 5, ("b", 0): 6, ("a", 1): 15, ("b", 1): 16}
    again = {name for name in calls(study) - before if before[name]}
    assert again == {"0/b/grpo"}


def test_sigkill_leaves_no_run_behind_and_only_what_is_missing_is_redone(study: Path) -> None:
    process, child = started(study)
    process.kill()
    process.wait()
    assert gone(child)
    finish(study)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_the_runs_and_says_how_to_go_on(
    study: Path, number: signal.Signals, code: int
) -> None:
    process, child = started(study)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == code
    assert f"to resume: mmemo study {study}" in said
    assert gone(child)
    saved = study.parent / "out/seeds/0/b/grpo/saved.tmp"
    assert saved.exists() == (number == signal.SIGINT)
    assert read(study)["runs"][1]["status"] == "waiting"
    finish(study)
