"""``mmemo encode`` fills the store for every stage that reads clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.config import Config, parse, read_yaml, save_resolved
from mmemo.errors import DataError
from mmemo.evaluation.runner import run_eval
from mmemo.experiments.study import VARIABLES
from mmemo.run_log import RunRecord
from mmemo.stages import COMPOSITES, guess, stage, stage_of
from mmemo.train.dpo.train import run_dpo
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import run_sft
from tests.evaluation.world import config_of, save_model, write_world
from tests.media_files import write_clip
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.grpo.tiny import grpo_config
from tests.train.tiny import sft_config, write_rows


def encodable(path: Path) -> bool:
    name = guess(read_yaml(path, later=VARIABLES))
    return name not in COMPOSITES and stage(name).encodable


SHIPPED = [path for path in sorted(Path("train_configs").rglob("*.yaml")) if encodable(path)]


def test_configs_of_every_encodable_stage_are_shipped() -> None:
    assert {guess(read_yaml(path, later=VARIABLES)) for path in SHIPPED} >= {
        *("sft", "grpo", "dpo", "eval")
    }


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_config_can_be_encoded_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    """Everything is understood; only the data, which is the user's or an earlier stage's, is not
    there."""
    run = ["--run", "runs/x"] if "${run}" in path.read_text() else []
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["encode", str(path), *run])
    assert isinstance(done.exception, DataError), done.output
    assert "cannot be read" in str(done.exception)


def encode(config: Config, *options: str) -> str:
    """``mmemo encode`` with a stage's config."""
    file = Path(config.model_dump()["output_dir"]).with_suffix(".yaml")
    save_resolved(config, file)
    done = CliRunner().invoke(app, ["encode", str(file), *options])
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.stdout.split())


def ingests(folder: Path) -> list[dict[str, Any]]:
    return RunRecord(folder, enabled=False).events("ingest")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    write_pairs(folder)
    return folder


def on_other_clips(rows: Path, tmp: Path, name: str) -> dict[str, Any]:
    """An ``eval_data`` section whose clips lie elsewhere and are others."""
    write_rows(tmp / "other")
    write_pairs(tmp / "other")
    for number, clip in enumerate(sorted((tmp / "other/clips").iterdir())):
        write_clip(clip, seconds=0.5, size=(32, 32), tone=900.0 + 60 * number)
    return {"manifests": [str(tmp / f"other/{name}")], "media_root": str(tmp / "other")}


def stage_config(kind: str, rows: Path, tmp: Path) -> Config:
    """A config of one step, with a store of its own beside its folder."""
    out = tmp / "run"
    more: dict[str, Any] = {"train": {"max_steps": 1}, "store": {"path": str(tmp / "features")}}
    if kind == "sft":
        return sft_config(rows, out, eval_data=on_other_clips(rows, tmp, "rows.jsonl"), **more)
    if kind == "grpo":
        return grpo_config(rows, out, **more)
    if kind == "dpo":
        other = on_other_clips(rows, tmp, "pairs.jsonl")
        return dpo_config(rows, out, "avem_dpo", eval_data=other, **more)
    world = write_world(tmp / "world", rows=4)
    return config_of(world, save_model(tmp / "model"), out)


@pytest.mark.parametrize("kind", ["sft", "grpo", "dpo", "eval"])
def test_the_stage_then_finds_every_feature(rows: Path, tmp_path: Path, kind: str) -> None:
    config: Any = stage_config(kind, rows, tmp_path)
    assert stage_of(config) is stage(kind)
    forecast = encode(config, "--dry-run")
    assert "size on disk" in forecast
    assert not (tmp_path / "run").exists()
    shown = encode(config)
    assert "features made" in shown
    done = ingests(tmp_path / "run/encode")
    assert sum(one["new"] for one in done) > 0
    # The stage's own folder is left to the stage, but for the record of what was encoded.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["encode"]
    {"sft": run_sft, "grpo": run_grpo, "dpo": run_dpo, "eval": run_eval}[kind](config)
    later = ingests(tmp_path / "run")
    assert later
    assert [one["new"] for one in later] == [0] * len(later)
    assert sum(one["reused"] for one in later) > 0


def test_negatives_are_encoded_where_a_term_reads_them(rows: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    lines = (rows / "pairs.jsonl").read_text().splitlines()[:1]
    few.write_text("\n".join(lines) + "\n")
    data = {"manifests": [str(few)], "media_root": str(rows)}
    for terms, parts in (("avem_dpo", 2), ("dpo", 1)):
        config = dpo_config(rows, tmp_path / terms, terms, data=data)
        found = stage("dpo").read_inputs(config).parts
        assert [part.title for part in found] == ["", "negatives"][:parts]


def test_an_encode_config_of_its_own_still_works(rows: Path, tmp_path: Path) -> None:
    config = sft_config(rows, tmp_path / "run")
    own = {key: config.model_dump()[key] for key in ("output_dir", "model", "data", "decode")}
    made = parse(stage("encode").config_class, {**own, "store": {"path": str(tmp_path / "f")}})
    assert "features made" in encode(made)
    assert (tmp_path / "run/config.yaml").exists()
