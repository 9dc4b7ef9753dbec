"""Pipeline: skipped when unchanged, resumed when cut, redone when inputs or outputs change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mmemo import stages
from mmemo.config import Config, dump
from mmemo.errors import ConfigError, MmemoError
from mmemo.experiments.pipeline import (
    PipelineState,
    is_finished,
    run_pipeline,
    settings_known_to,
)
from tests.experiments.toy_stages import MAKE, ToyConfig


class Toy:
    """A runner that writes one file and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail_at: str | None = None
        self.seen_partial: list[str] = []  # stages that started in a folder with earlier work

    def __call__(self, stage: str, values: dict[str, Any]) -> None:
        folder = Path(values["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        self.calls.append(folder.name)
        self.seen_partial += [folder.name] if (folder / "partial").exists() else []
        (folder / "partial").write_text("x")
        if folder.name == self.fail_at:
            raise MmemoError("cut")
        source = Path(values["source"]).read_text() if values.get("source") else ""
        (folder / "out.txt").write_text(f"{source}{values.get('value', 0):g}")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("value: 1\n")
    (tmp_path / "b.yaml").write_text("source: ${run}/a/out.txt\n")
    (tmp_path / "p.yaml").write_text(
        f"name: toy\noutput_dir: {tmp_path}/run\nstages:\n"
        "  - {name: a, stage: toy-make, config: a.yaml}\n"
        "  - {name: b, stage: toy-make, config: b.yaml}\n"
        "  - {name: c, stage: toy-eval, config: b.yaml, overrides: [value=3]}\n"
    )
    return tmp_path / "p.yaml"


def test_a_second_run_does_nothing(pipeline: Path) -> None:
    toy = Toy()
    root = run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c"]
    assert (root / "c/out.txt").read_text() == "13"
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c"]


def test_a_changed_config_reruns_it_and_what_reads_from_it(pipeline: Path) -> None:
    toy = Toy()
    root = run_pipeline(pipeline, [], run=toy)
    (pipeline.parent / "a.yaml").write_text("value: 2\n")
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c"] * 2
    assert (root / "b/out.txt").read_text() == "20"
    assert toy.seen_partial == ["c"]  # another changed stage starts in an empty folder
    assert (root / "replaced/a-1/out.txt").read_text() == "1"


def test_a_changed_evaluation_goes_on_in_its_folder(pipeline: Path) -> None:
    """Its answers know what they depend on: those that a change does not touch are kept."""
    toy = Toy()
    root = run_pipeline(pipeline, [], run=toy)
    (root / "c/out.txt").write_text("XX")  # not while it was: that is not the run's own work
    run_pipeline(pipeline, [], run=toy)
    assert (root / "replaced/c-1/out.txt").read_text() == "XX"
    assert not toy.seen_partial
    pipeline.write_text(pipeline.read_text().replace("value=3", "value=4"))
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c", "c", "c"]
    assert toy.seen_partial == ["c"]
    assert (root / "c/out.txt").read_text() == "14"
    assert not (root / "replaced/c-2").exists()


def test_damaged_or_missing_outputs_are_made_again(pipeline: Path) -> None:
    toy = Toy()
    root = run_pipeline(pipeline, [], run=toy)
    (root / "b/out.txt").write_text("XX")
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c", "b"]
    assert (root / "b/out.txt").read_text() == "10"


def test_a_cut_stage_goes_on_in_its_folder(pipeline: Path) -> None:
    toy = Toy()
    toy.fail_at = "b"
    with pytest.raises(MmemoError, match="cut"):
        run_pipeline(pipeline, [], run=toy)
    toy.fail_at = None
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "b", "c"]
    assert toy.seen_partial == ["b"]


def test_a_typo_in_the_last_stage_shows_before_the_first_runs(pipeline: Path) -> None:
    toy = Toy()
    text = pipeline.read_text().replace("value=3", "valu=3")
    pipeline.write_text(text)
    with pytest.raises(ConfigError, match=r"stage 'c'.*did you mean 'value'"):
        run_pipeline(pipeline, [], run=toy)
    assert toy.calls == []


def test_two_pipelines_do_not_share_a_folder(pipeline: Path) -> None:
    def nested(stage: str, values: dict[str, Any]) -> None:
        run_pipeline(pipeline, [], run=Toy())

    with pytest.raises(MmemoError, match="another pipeline is running"):
        run_pipeline(pipeline, [], run=nested)


def test_a_pipeline_of_older_versions_is_told_the_new_key(pipeline: Path) -> None:
    pipeline.write_text(pipeline.read_text().replace("stage: toy-make", "verb: toy-make"))
    with pytest.raises(ConfigError, match=r"stages\.0' and 1 more: write stage:.*verb:") as found:
        run_pipeline(pipeline, [], run=Toy())
    assert str(found.value).count("verb") == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("toy-mak", "no stage 'toy-mak'; did you mean 'toy-make'"),
        ("towers", "stage 'towers' is now called 'encoders'"),
        ("none.py:STAGE", "'none.py' is neither in"),
    ],
)
def test_an_unknown_stage_is_named_before_anything_runs(
    pipeline: Path, name: str, says: str
) -> None:
    toy = Toy()
    pipeline.write_text(pipeline.read_text().replace("stage: toy-eval", f"stage: {name}"))
    with pytest.raises(ConfigError) as caught:
        run_pipeline(pipeline, [], run=toy)
    assert "stages.2.stage" in str(caught.value)
    assert says in str(caught.value)
    assert toy.calls == []


def test_the_state_of_older_versions_is_read(pipeline: Path) -> None:
    """They called the stage ``verb``; what they finished stays done."""
    toy = Toy()
    root = run_pipeline(pipeline, [], run=toy)
    file = root / "state.json"
    file.write_text(file.read_text().replace('"stage":', '"verb":'))
    assert is_finished(pipeline)
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c"]
    assert PipelineState(file).get("a")["verb"] == "toy-make"


class _Rows(Config):
    weight: float = 1.0
    added: int = 5


class _Later(ToyConfig):
    """The toy stage's config in a later version: with new settings on both levels."""

    later: str = "default"
    rows: list[_Rows] = [_Rows()]


class _Sooner(_Later):
    later: str = "another default"


def _as(monkeypatch: pytest.MonkeyPatch, config: type[Config]) -> None:
    monkeypatch.setitem(stages.STAGES, "toy-make", dataclasses.replace(MAKE, config=config))


def test_a_new_setting_with_its_default_keeps_finished_work(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy()
    run_pipeline(pipeline, [], run=toy)
    _as(monkeypatch, _Later)
    assert is_finished(pipeline)
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c"]
    (pipeline.parent / "a.yaml").write_text("value: 1\nrows: [{weight: 2}]\n")
    assert not is_finished(pipeline)
    run_pipeline(pipeline, [], run=toy)
    assert toy.calls == ["a", "b", "c", "a"]  # b's input a/out.txt is as before


def test_a_default_that_changed_counts(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _as(monkeypatch, _Later)
    toy = Toy()
    run_pipeline(pipeline, [], run=toy)
    assert is_finished(pipeline)
    _as(monkeypatch, _Sooner)
    assert not is_finished(pipeline)


def test_new_settings_are_left_out_at_every_depth() -> None:
    config = _Later(output_dir="x", rows=[_Rows(weight=3)])
    before = {**dump(config), "rows": [{"weight": 3.0}]}
    del before["later"]
    assert settings_known_to(before, config) == before
    assert settings_known_to(None, config) == dump(config)
    assert settings_known_to(
        before, _Later(output_dir="x", later="x", rows=[_Rows(weight=3, added=6)])
    ) == {
        **before,
        "later": "x",
        "rows": [{"weight": 3.0, "added": 6}],
    }
