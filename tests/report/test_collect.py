"""What a run folder says of its stages, and whom its model was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemo.evaluation.results import read_results, write_results
from mmemo.report.collect import read_run, read_stages
from tests.report.fake_run import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def manifest(path: Path, *speakers: str | None) -> dict[str, Any]:
    """A config whose data are rows of these speakers."""
    rows = [
        {"videos": ["c.mp4"], "group": {} if name is None else {"speaker": name}}
        for name in speakers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"manifests": [str(path)]}}


def note(folder: Path, **event: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as handle:
        handle.write(json.dumps({"time": 1.0, **event}) + "\n")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A pipeline's folder whose training is known, of speakers that are not in the evaluation."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = manifest(tmp_path / "others.jsonl", "other0", "other1")
    for name in ("attribute", "expression", "emotion"):
        note(run, kind="stage_started", stage=name, config=config)
    assert read_run(run).held_out
    return run


def test_nobody_is_held_out_from_a_stage_that_was_run_by_hand(run: Path, tmp_path: Path) -> None:
    """It has no entry in the pipeline's state, and may not have logged a step yet."""
    config = manifest(tmp_path / "same.jsonl", "t00")
    note(run / "mine", kind="stage", stage="sft", config=config)
    overview = read_run(run)
    assert not overview.held_out
    assert [(s.kind, s.config) for s in overview.stages if s.name == "mine"] == [("sft", config)]


@pytest.mark.parametrize("kind", ["sft", "grpo", "dpo", "reward_model", "towers", "encoders"])
def test_records_of_older_versions_name_the_stage(run: Path, tmp_path: Path, kind: str) -> None:
    note(run / "mine", kind=kind, config=manifest(tmp_path / "same.jsonl", "t00"))
    assert not read_run(run).held_out
    (run / "mine/events.jsonl").unlink()
    note(run / "mine", kind=kind, config=manifest(tmp_path / "same.jsonl", "other9"))
    assert read_run(run).held_out


def a_folder_of_unknown_making(run: Path, tmp: Path) -> None:
    note(run / "mine", kind="x")


def a_stage_that_is_not_registered(run: Path, tmp: Path) -> None:
    note(run / "mine", kind="stage", stage="gone.py:STAGE", config=manifest(tmp / "m", "t00"))


def a_rerun_by_hand_on_other_rows(run: Path, tmp: Path) -> None:
    note(run / "emotion", kind="stage", stage="sft", config=manifest(tmp / "m.jsonl", "t00"))


def a_training_stage_without_a_config(run: Path, tmp: Path) -> None:
    state = json.loads((run / "state.json").read_text())
    state["stages"]["more"] = {"status": "done", "stage": "dpo"}
    (run / "state.json").write_text(json.dumps(state))


def rows_without_a_speaker(run: Path, tmp: Path) -> None:
    config = manifest(tmp / "m.jsonl", "other0", None)
    note(run / "mine", kind="stage", stage="sft", config=config)


def a_manifest_that_is_gone(run: Path, tmp: Path) -> None:
    note(run / "mine", kind="sft", config={"data": {"manifests": ["gone.jsonl"]}})


def a_start_from_another_run(run: Path, tmp: Path) -> None:
    """The stage's own rows are of others, and the model that it starts from knows the speaker."""
    before = tmp / "before/sft"
    note(before, kind="sft", config=manifest(tmp / "m.jsonl", "t00"))
    config = {**manifest(tmp / "n.jsonl", "other0"), "model": {"path": str(before / "final")}}
    (before / "final").mkdir()
    note(run / "mine", kind="stage", stage="sft", config=config)


def an_encoder_from_another_run(run: Path, tmp: Path) -> None:
    note(tmp / "before", kind="towers", config=manifest(tmp / "m.jsonl", "t00"))
    (tmp / "before/face").mkdir()
    model = {"face": {"encoder": str(tmp / "before/face"), "tokens": 2}}
    config = {**manifest(tmp / "n.jsonl", "other0"), "model": model}
    note(run / "mine", kind="stage", stage="sft", config=config)


def a_model_of_another_run_is_evaluated(run: Path, tmp: Path) -> None:
    note(tmp / "before", kind="sft", config=manifest(tmp / "m.jsonl", "t00"))
    (tmp / "before/final").mkdir()
    values = read_results(run / "eval").values
    values["made"]["model"]["path"] = str(tmp / "before/final")
    write_results(run / "eval", values)


def the_model_is_of_a_run_that_is_gone(run: Path, tmp: Path) -> None:
    values = read_results(run / "eval").values
    values["made"]["model"]["path"] = str(tmp / "gone/final")
    write_results(run / "eval", values)


@pytest.mark.parametrize(
    "change",
    [
        a_folder_of_unknown_making,
        a_stage_that_is_not_registered,
        a_rerun_by_hand_on_other_rows,
        a_training_stage_without_a_config,
        rows_without_a_speaker,
        a_manifest_that_is_gone,
        a_start_from_another_run,
        an_encoder_from_another_run,
        a_model_of_another_run_is_evaluated,
        the_model_is_of_a_run_that_is_gone,
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_not_known_counts_as_training(
    run: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    change(run, tmp_path)
    assert not read_run(run).held_out


@pytest.mark.parametrize("stage", ["eval", "encode", "pairs", "world"])
def test_stages_that_train_nothing_change_nothing(run: Path, tmp_path: Path, stage: str) -> None:
    note(run / "mine", kind="stage", stage=stage, config=manifest(tmp_path / "m.jsonl", "t00"))
    assert read_run(run).held_out


def test_folders_of_older_versions_are_known_by_their_traces(run: Path) -> None:
    note(run / "by_hand", kind="benchmark", file="eval/x.py")
    note(run / "encode", kind="ingest", clips=3)
    note(run / "pairs", kind="manifests", rows=3)
    kinds = {stage.name: stage.kind for stage in read_stages(run)}
    assert (kinds["by_hand"], kinds["encode"], kinds["pairs"]) == ("eval", "encode", "pairs")
    assert read_run(run).held_out


def test_a_stage_that_was_replaced_no_longer_counts(run: Path, tmp_path: Path) -> None:
    same = manifest(tmp_path / "same.jsonl", "t00")
    note(run, kind="stage_started", stage="emotion", config=same)
    assert not read_run(run).held_out
    note(run, kind="stage_replaced", stage="emotion")
    note(run, kind="stage_started", stage="emotion", config=manifest(tmp_path / "n.jsonl", "o"))
    assert read_run(run).held_out


def test_rows_that_only_validate_are_not_trained_on(run: Path, tmp_path: Path) -> None:
    same = manifest(tmp_path / "same.jsonl", "t00")["data"]
    config = {**manifest(tmp_path / "n.jsonl", "other0"), "eval_data": same, "test_data": same}
    note(run / "mine", kind="stage", stage="reward-model", config=config)
    assert read_run(run).held_out
