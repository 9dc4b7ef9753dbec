"""Tuning with an equal budget, runs on other arms' models, and studies that go on from results."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from mmemo.errors import ConfigError, MmemoError
from mmemo.experiments import study_runner
from mmemo.experiments.pipeline import run_pipeline
from mmemo.experiments.study import run_study
from tests.experiments.study_child import toy
from tests.experiments.test_study import CHILD, ROOT, calls, read, run, started


class InThisProcess:
    """A run as the study sees it, without the half second that starting a process takes."""

    def __init__(self, command: Sequence[str], *, stdout: BinaryIO, **_: Any) -> None:
        self.code = 0
        try:
            run_pipeline(Path(command[-1]), [], run=toy)
        except MmemoError as error:
            stdout.write(f"error: {error}\n".encode())
            self.code = 2

    def poll(self) -> int:
        return self.code


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world for each seed (value: the seed), two arms and a tuned setting.

    The score of an arm is the seed plus the setting plus what the arm adds; ``b`` has a grid of its
    own, in which the best point is the first.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STUDY_LOG", str(tmp_path / "log"))
    fake = SimpleNamespace(Popen=InThisProcess, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(study_runner, "subprocess", fake)
    (tmp_path / "world.yaml").write_text("value: ${seed}\n")
    (tmp_path / "arm.yaml").write_text("source: ${run}/world\n")
    (tmp_path / "eval.yaml").write_text("source: ${run}/grpo\n")
    (tmp_path / "study.yaml").write_text(f"""
name: toy
output_dir: {tmp_path}/out
publish: {tmp_path}/published
seeds: [10, 20]
tuning:
  seeds: [100]
  grid: [{{grpo: [value=1]}}, {{grpo: [value=3]}}, {{grpo: [value=2]}}]
  maximise: score
start:
  - {{name: world, stage: toy-make, config: world.yaml}}
stages:
  - {{name: grpo, stage: toy-make, config: arm.yaml}}
  - {{name: evaluation, stage: toy-eval, config: eval.yaml}}
arms:
  plain: {{skip: [grpo], overrides: {{evaluation: ["source=${{run}}/world"]}}}}
  a: {{}}
  b: {{grid: [{{grpo: [value=9]}}, {{grpo: [value=9]}}, {{grpo: [value=4]}}]}}
reference: plain
metrics:
  score: {{stage: evaluation, path: n, better: higher}}
""")
    return tmp_path / "study.yaml"


def tuning(study: Path) -> dict[str, Any]:
    return json.loads((study.parent / "out/tuning.json").read_text())


def scores(results: dict[str, Any]) -> dict[tuple[str, int], float]:
    return {(run["arm"], run["seed"]): run["metrics"]["score"] for run in results["runs"]}


BY_HAND = {
    ("plain", 10): 10, ("a", 10): 13, ("b", 10): 19,
    ("plain", 20): 20, ("a", 20): 23, ("b", 20): 29,
}  # fmt: skip


def test_every_arm_is_tuned_on_a_world_of_its_own_and_uses_its_best_point(study: Path) -> None:
    results = run(study)
    assert scores(results) == BY_HAND
    found = tuning(study)["arms"]
    assert found["a"]["chosen"] == 2
    assert [point["score"] for point in found["a"]["points"]] == [101, 103, 102]
    assert found["b"]["chosen"] == 1  # of equal points the first
    assert "plain" not in found
    assert results["tuned"] == {"a": {"grpo": ["value=3"]}, "b": {"grpo": ["value=9"]}}
    text = (study.parent / "published/tuning.md").read_text()
    assert "| a | `value=3` | 103 | chosen |" in text
    made = calls(study)
    assert set(made.values()) == {1}
    # The world of each of three seeds, six points of two stages, and four tuned runs of two
    # stages and two of one.
    assert len(made) == 3 + 6 * 2 + 2 * (2 + 2 + 1)
    run(study)
    assert calls(study) == made


def test_a_grid_that_changes_tunes_again_and_redoes_only_what_the_choice_changes(
    study: Path,
) -> None:
    run(study)
    before = calls(study)
    study.write_text(study.read_text().replace("{grpo: [value=2]}]", "{grpo: [value=5]}]"))
    results = run(study)
    assert scores(results) == {**BY_HAND, ("a", 10): 15, ("a", 20): 25}
    redone = {name for name in calls(study) - before if before[name]}
    assert redone == {f"{x}/{stage}" for x in ("a/3", "10/a", "20/a") for stage in STAGES}


STAGES = ("grpo", "evaluation")


def test_a_point_that_fails_is_left_out_and_an_arm_without_any_is_not_run(study: Path) -> None:
    text = study.read_text().replace("{grpo: [value=3]}", "{grpo: [value=3, mood=fail]}")
    study.write_text(text.replace("[value=9]", "[mood=fail]").replace("[value=4]", "[mood=fail]"))
    with pytest.raises(SystemExit):
        run(study)
    results = read(study)
    assert scores({"runs": [r for r in results["runs"] if r["arm"] == "a"]}) == {
        ("a", 10): 12, ("a", 20): 22,
    }  # fmt: skip
    failed = {r["arm"]: r["error"] for r in results["runs"] if r["status"] == "failed"}
    assert failed == {"b": "no point of its tuning grid gave a number; see tuning.md"}
    assert "| failed |" in (study.parent / "out/tuning.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds: [100]", "seeds: [20]", r"seed 20 is used to tune and to test"),
        (", {grpo: [value=4]}]", "]", r"arm 'b' has 2 points in its grid where the others have 3"),
        ("maximise: score", "maximise: scor", r"`tuning.maximise` names 'scor'.*'score'"),
        ("better: higher", "better: lower", r"better lower; name a metric with `sum_of`"),
        ("[{grpo: [value=9]}", "[{gro: [value=9]}", r"the grid of arm 'b' names stage 'gro'"),
        ("[{grpo: [value=9]}", "[{grpo: [valu=9]}", r"arm b, point 1, stage 'grpo'.*'value'"),
        ("path: n,", "path: n, min_of: [score],", r"give one of: stage and path, min_of, sum_of"),
        ("{skip: [grpo]", "{of: c, skip: [grpo]", r"arm 'plain' is of arm 'c'"),
    ],
)
def test_a_mistake_shows_before_anything_runs(study: Path, old: str, new: str, says: str) -> None:
    assert old in study.read_text()
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=says):
        run(study)
    assert not (study.parent / "log").exists()


def test_a_study_goes_on_from_published_results_in_an_empty_folder(study: Path) -> None:
    first = run(study)
    before = calls(study)
    shutil.rmtree(study.parent / "out")
    again = run(study)
    assert calls(study) == before
    assert scores(again) == scores(first)
    assert [r["fingerprint"] for r in again["runs"]] == [r["fingerprint"] for r in first["runs"]]
    # In another place too: no fingerprint depends on where the study's folder is.
    run_study(study, [f"--output_dir={study.parent}/elsewhere"], command=CHILD)
    assert calls(study) == before


def test_published_runs_of_another_config_are_run_again_and_told(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(study)
    before = calls(study)
    shutil.rmtree(study.parent / "out")
    (study.parent / "eval.yaml").write_text("source: ${run}/grpo\nvalue: 1\n")
    results = run(study, "--arms.b.grid=[]", '--arms.b.overrides={grpo: ["value=0"]}')
    said = capsys.readouterr().out
    assert "6 runs in the results made with another config, and run again" in said
    assert scores(results)["a", 10] == 14
    assert scores(results)["b", 10] == 11
    assert (calls(study) - before)["10/a/evaluation"] == 1


def test_a_file_that_a_setting_names_counts_by_its_content(study: Path) -> None:
    given = study.parent / "given"
    given.mkdir()
    (given / "results.json").write_text('{"n": 1}')
    own = f"a: {{overrides: {{grpo: [mood={given}/results.json]}}}}"
    text = study.read_text().replace("a: {}", own)
    study.write_text(text)
    first = run(study)
    (given / "results.json").write_text('{"n": 2}')
    again = run(study)
    changed = [
        one["arm"]
        for one, two in zip(first["runs"], again["runs"], strict=True)
        if one["fingerprint"] != two["fingerprint"]
    ]
    assert changed == ["a", "a"]


def test_fresh_takes_nothing_from_published_results(study: Path) -> None:
    run(study)
    before = calls(study)
    shutil.rmtree(study.parent / "out")
    run_study(study, [], command=CHILD, fresh=True)
    assert calls(study) == Counter({name: 2 * count for name, count in before.items()})


def test_a_metric_that_is_new_is_read_again_or_run_again(study: Path) -> None:
    run(study)
    before = calls(study)
    results = run(study, "--metrics.twice={sum_of: {score: 2.0}}")
    assert {r["metrics"]["twice"] for r in results["runs"] if r["arm"] == "a"} == {26, 46}
    shutil.rmtree(study.parent / "out")
    run(study, "--metrics.twice={sum_of: {score: 2.0}}")
    assert calls(study) == before
    shutil.rmtree(study.parent / "out")
    # Another number of the same file was never published.
    run(study, "--metrics.other={stage: evaluation, path: n}")
    assert (calls(study) - before)["10/a/grpo"] == 1


def test_after_a_kill_published_runs_are_not_repeated_elsewhere(study: Path) -> None:
    text = study.read_text().replace("a: {}", "a: {grid: [], overrides: {grpo: [value=1]}}")
    own = "b: {grid: [], overrides: {grpo: [value=1]}}"
    text = re.sub(r"b: \{.*\}", own, text).replace("[10, 20]", "[0, 20]")
    study.write_text(text.replace("reference: plain", "reference: plain\nkeep: results"))
    process, _ = started(study, marker=own[:40])
    process.kill()
    process.wait()
    before = calls(study)
    assert before["0/a/evaluation"] == 1
    shutil.rmtree(study.parent / "out")
    (study.parent / "log.awake").touch()
    results = run(study)
    assert {r["status"] for r in results["runs"]} == {"done"}
    assert calls(study)["0/a/evaluation"] == calls(study)["0/plain/evaluation"] == 1


def test_keeping_results_deletes_what_is_large_and_redoes_nothing(study: Path) -> None:
    results = run(study, "--keep=results")
    out, before = study.parent / "out", calls(study)
    assert not list(out.rglob("*.bin"))
    assert not list(out.rglob("store"))
    assert (out / "seeds/10/a/evaluation/results.json").exists()
    assert scores(run(study, "--keep=results")) == scores(results)
    assert calls(study) == before
    # An arm that changes has its start made again.
    study.write_text(study.read_text().replace("[value=3]", "[value=6]"))
    assert scores(run(study, "--keep=results"))["a", 10] == 16
    assert (calls(study) - before)["10/start/world"] == 1
    assert not (calls(study) - before)["10/b/grpo"]
    assert not list(out.rglob("*.bin"))


def test_an_arm_of_another_runs_on_its_model_with_its_choice(study: Path) -> None:
    text = study.read_text().replace(
        "  b: {grid: [{grpo: [value=9]}, {grpo: [value=9]}, {grpo: [value=4]}]}",
        "  later: {of: a, skip: [grpo], overrides: {evaluation: [value=100]},\n"
        "    grid: [{evaluation: [value=50]}, {evaluation: [value=70]}, {evaluation: [value=0]}]}",
    )
    study.write_text(text)
    results = run(study, "--keep=results")
    assert scores(results)["later", 10] == 10 + 3 + 70
    assert tuning(study)["arms"]["later"]["points"][0]["score"] == 100 + 3 + 50
    assert calls(study)["10/a/grpo"] == 1
    assert not list((study.parent / "out").rglob("*.bin"))


def test_metrics_of_others(study: Path) -> None:
    results = run(
        study,
        "--metrics.fixed={stage: world, path: n}",
        "--metrics.worse={min_of: [score, fixed], better: higher, margin: 1.0}",
        "--metrics.trade={sum_of: {score: 1.0, fixed: -0.5}}",
    )
    last = results["runs"][-1]["metrics"]
    assert last == {"score": 29, "fixed": 20, "worse": 20, "trade": 19}
    rows = results["summary"]["worse"]["comparisons"]
    assert [row["kept"] for row in rows] == [None, None]  # the same in every seed
    assert "worse kept" in (study.parent / "out/table.md").read_text()
