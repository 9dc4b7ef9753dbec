"""What every training stage has from its base: a new one is a config, its parts and a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmemo import checkpoint
from mmemo.config import Config, parse, read_yaml
from mmemo.errors import ConfigError, TrainingError
from mmemo.run_log import RunRecord
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.train import run_dpo
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import run_sft
from mmemo.train.stage import RunContext, StageParts, TrainStage, commit_final, open_run
from mmemo.train.trainer import Trainer
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.grpo.tiny import grpo_config
from tests.train.tiny import sft_config
from tests.train.toy import Model, Rows, Squares


class ToyConfig(Config):
    output_dir: str
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()


class ToyStage(TrainStage[ToyConfig]):
    kind = "toy"

    def __init__(self, config: ToyConfig, context: RunContext, note: str = "") -> None:
        super().__init__(config, context)
        self.note = note

    @classmethod
    def check_config(cls, config: ToyConfig) -> None:
        if config.run.deepspeed is not None:
            raise ConfigError("a toy trains without DeepSpeed")

    def details(self) -> dict[str, Any]:
        return {"note": self.note}

    def build(self) -> StageParts:
        rows, model = Rows(batch_size=self.rows_per_step), Model()
        deciding = {"train": self.config.train.model_dump(mode="json")}

        def before(trainer: Trainer) -> None:
            self.context.record.event("before", step=trainer.state.step)

        def save(trainer: Trainer) -> Path:
            def write(folder: Path) -> None:
                save_file(dict(model.named_parameters()), folder / "model.safetensors")

            final = self.context.folder / "final"
            commit_final(final, write, trainer, 1 << 16, self.context)
            return final

        return StageParts(
            model=model,
            objective=Squares(),
            data=rows,
            identity=self.identity(deciding, {"data": "abc"}, [["row", 1]]),
            save=save,
            before_training=before,
        )


def config(folder: Path, **train: Any) -> ToyConfig:
    values = {"max_steps": 4, "per_device_train_batch_size": 2, **train}
    run = {"save_steps": 2, "logging_steps": 1, "threads": 1, "use_cpu": True}
    return parse(ToyConfig, {"output_dir": str(folder), "train": values, "run": run})


def test_a_stage_trains_saves_and_records(tmp_path: Path) -> None:
    final = ToyStage.start(config(tmp_path / "run"), note="first")
    assert final == tmp_path / "run" / "final"
    assert checkpoint.verify(final).meta["step"] == 4
    record = RunRecord(tmp_path / "run")
    kinds = [event["kind"] for event in record.events()]
    assert kinds == [
        *("toy", "before", "train_start"),
        *("checkpoint", "checkpoint", "train_done", "final"),
    ]
    (opened,) = record.events("toy")
    assert (opened["note"], opened["ranks"]) == ("first", 1)
    assert opened["config"] == read_yaml(tmp_path / "run" / "config.yaml", {})
    assert {"mmemo", "python", "torch", "transformers", "peft"} == set(opened["versions"])


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wrong = config(tmp_path / "run")
    wrong = wrong.model_copy(update={"run": parse(RunConfig, {"deepspeed": "x.json"})})
    with pytest.raises(ConfigError, match="without DeepSpeed"):
        ToyStage.start(wrong)
    assert not (tmp_path / "run").exists()


def test_a_folder_has_one_run_at_a_time_and_is_free_afterwards(tmp_path: Path) -> None:
    chosen = config(tmp_path / "run")
    with open_run(chosen) as context:
        assert context.folder == tmp_path / "run"
        assert context.record.path.parent == tmp_path / "run"
    ToyStage.start(chosen)


def test_another_number_of_rows_in_a_step_is_refused(tmp_path: Path) -> None:
    """Of accumulation and ranks only the product counts, so neither stands there by itself."""
    ToyStage.start(config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"settings: config\.train\.rows_per_step: 2 -> 4\. Undo"):
        ToyStage.start(config(tmp_path / "run", gradient_accumulation_steps=2))


def test_another_run_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    prepared: list[int] = []

    class Preparing(ToyStage):
        def build(self) -> StageParts:
            made = super().build()
            return replace(made, before_training=lambda trainer: prepared.append(1))

    Preparing.start(config(tmp_path / "run"))
    assert prepared == [1]
    with pytest.raises(ConfigError, match="was made with other settings"):
        Preparing.start(config(tmp_path / "run", gradient_accumulation_steps=2))
    assert prepared == [1]
    Preparing.start(config(tmp_path / "run"))
    assert prepared == [1, 1]


def test_what_a_run_holds_is_closed_when_it_fails(tmp_path: Path) -> None:
    closed: list[str] = []

    class Failing(ToyStage):
        def build(self) -> StageParts:
            self.context.exits.callback(closed.append, "store")
            raise TrainingError("no rows")

    with pytest.raises(TrainingError, match="no rows"):
        Failing.start(config(tmp_path / "run"))
    assert closed == ["store"]


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_clips_are_encoded_on_the_device_that_trains(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """On a GPU machine, encoders that are still on the CPU would take hours and say nothing."""
    devices: set[str] = set()

    class Reached(Exception):
        pass

    def encode(samples: Any, backbone: Any, *_: Any, **__: Any) -> None:
        devices.update(weight.device.type for weight in backbone.parameters())
        raise Reached

    class OnMeta(Ranks):
        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            self.device = torch.device("meta")

    monkeypatch.setattr("mmemo.train.stage.ensure_features", encode)
    monkeypatch.setattr("mmemo.train.stage.Ranks", OnMeta)
    out = tmp_path / "run"
    write_pairs(rows)
    starts: dict[str, Callable[[], Path]] = {
        "sft": lambda: run_sft(sft_config(rows, out)),
        "dpo": lambda: run_dpo(dpo_config(rows, out, dpo={"reference": "adapter_off"})),
        "grpo": lambda: run_grpo(grpo_config(rows, out)),
    }
    with pytest.raises(Reached):
        starts[stage]()
    assert devices == {"meta"}
