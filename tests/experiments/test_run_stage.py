"""A stage runs here or as several ranks, and its folder says which stage it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmemo.config import Config, load_config
from mmemo.errors import ConfigError, TrainingError
from mmemo.experiments.run_stage import run_stage, run_values
from mmemo.run_log import RunRecord
from mmemo.stages import Stage
from mmemo.train import distributed
from mmemo.train.nodes import LAUNCHED


class Ranked(Config):
    processes: int = 1


class ToyConfig(Config):
    output_dir: str
    run: Ranked = Ranked()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[ToyConfig]:
    """Configs that the toy was run with in this process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return []


def toy(ran: list[ToyConfig], *, ranks: bool = True) -> Stage:
    return Stage("toy", config=ToyConfig, run=ran.append, ranks=ranks)


def recorded(folder: Path) -> list[str]:
    return [event["stage"] for event in RunRecord(folder, enabled=False).events("stage")]


def test_one_process_runs_here(ran: list[ToyConfig], tmp_path: Path) -> None:
    run_values(toy(ran), {"output_dir": str(tmp_path)})
    assert ran == [ToyConfig(output_dir=str(tmp_path))]
    assert recorded(tmp_path) == ["toy"]


def test_ranks_are_launched_with_the_resolved_config(
    ran: list[ToyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[list[str], int]] = []
    monkeypatch.setattr(
        distributed, "launch", lambda argv, n, **_: launched.append((list(argv), n))
    )
    config = ToyConfig(output_dir=str(tmp_path), run=Ranked(processes=3))
    run_stage(toy(ran), config)
    assert launched == [(["toy", str(tmp_path / "launch.yaml")], 3)]
    assert load_config(ToyConfig, tmp_path / "launch.yaml") == config
    assert ran == []
    run_stage(toy(ran, ranks=False), config)  # a stage without ranks runs here, whatever it says
    assert (len(launched), len(ran)) == (1, 1)


def test_a_rank_runs_here_and_only_the_first_one_records(
    ran: list[ToyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(output_dir=str(tmp_path), run=Ranked(processes=2))
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        run_stage(toy(ran), config)
        assert recorded(tmp_path) == ["toy"] * (rank == "0")
    assert len(ran) == 2


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
SRUN |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2"}


def test_tasks_of_srun_are_ranks_of_a_training_stage_alone(
    ran: list[ToyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    config = ToyConfig(output_dir=str(tmp_path))
    shared = Stage("toy", config=ToyConfig, run=ran.append, shares=True)
    run_stage(shared, config)  # each task does all of it, as it would without Slurm
    assert "WORLD_SIZE" not in os.environ
    run_stage(toy(ran), config)
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("2", "1")
    assert len(ran) == 2


def test_another_launcher_leaves_no_evaluation_unfinished(
    ran: list[ToyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    shared = Stage("toy", config=ToyConfig, run=ran.append, shares=True)
    with pytest.raises(ConfigError, match="without torchrun"):
        run_stage(shared, ToyConfig(output_dir=str(tmp_path)))
    assert ran == []
    monkeypatch.setenv(LAUNCHED, "1")
    run_stage(shared, ToyConfig(output_dir=str(tmp_path)))
    assert len(ran) == 1


def test_a_refused_run_leaves_no_trace_in_the_folder(tmp_path: Path) -> None:
    def refuse(_: ToyConfig) -> None:
        raise TrainingError("another run is training here")

    with pytest.raises(TrainingError):
        run_stage(
            Stage("toy", config=ToyConfig, run=refuse, ranks=True),
            ToyConfig(output_dir=str(tmp_path / "run")),
        )
    assert not (tmp_path / "run").exists()
    RunRecord(tmp_path / "run").event("later")  # nothing was kept for it
    assert recorded(tmp_path / "run") == []


def test_the_stage_stands_before_what_it_did(tmp_path: Path) -> None:
    def work(config: ToyConfig) -> None:
        record = RunRecord(Path(config.output_dir))
        record.event("first")
        record.event("second")

    run_stage(
        Stage("toy", config=ToyConfig, run=work, ranks=True), ToyConfig(output_dir=str(tmp_path))
    )
    events = RunRecord(tmp_path, enabled=False).events()
    assert [event["kind"] for event in events] == ["stage", "first", "second"]
    assert events[0]["config"]["output_dir"] == str(tmp_path)
