"""A new stage is one file and one row: everything else finds it in the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mmemo import content, stages
from mmemo.check.run import run_check
from mmemo.cli import app
from mmemo.config import Config
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import ConfigError, DataError, MmemoError
from mmemo.report.collect import read_run, read_stages
from mmemo.stages import STAGES, Option, Stage, register
from tests.report.fake_run import make_run

TOY = '''
from pathlib import Path
from mmemo.config import Config
from mmemo.data.manifest import DataConfig
from mmemo.stages import Option, Stage

class ToyConfig(Config):
    """Counts rows."""
    output_dir: str
    data: DataConfig
    times: int = 1
    """How often each row counts."""

def run_toy(config):
    rows = sum(len(Path(name).read_text().splitlines()) for name in config.data.manifests)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    Path(config.output_dir, "count.txt").write_text(str(rows * config.times))

def shout(config, path):
    Path(path).write_text("HELLO")

STAGE = Stage(
    "toy",
    config=ToyConfig,
    run=run_toy,
    check=lambda config: print("the toy is sound"),
    trains=True,
    help="Count rows.",
    needs="a manifest.",
    writes="count.txt.",
    then="nothing.",
    example="toy.yaml",
    options=(
        Option("--double", "Count every row twice.", override="times=2"),
        Option("--times", "Count every row so often.", metavar="N", override="times={}"),
        Option("--shout", "Shout into a file.", metavar="FILE", run=shout),
    ),
)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy_stage.py").write_text(TOY)
    rows = [{"videos": ["c.mp4"], "group": {"speaker": "t00"}}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text("output_dir: out\ndata: {manifests: [rows.jsonl]}\n")
    return tmp_path


@pytest.fixture
def toy(folder: Path) -> Iterator[Stage]:
    """The toy as a row of the registry."""
    stage = register(content.load("toy_stage.py:STAGE"))
    yield stage
    del STAGES[stage.name]


def mmemo(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, MmemoError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.stdout.split())


def count(path: str = "out") -> int:
    return int(Path(path, "count.txt").read_text())


@pytest.mark.parametrize("name", ["toy", "toy_stage.py:STAGE"])
def test_a_stage_is_a_command(toy: Stage, name: str) -> None:
    mmemo(name, "toy.yaml")
    assert count() == 3
    mmemo(name, "toy.yaml", "--times=5")
    assert count() == 15
    mmemo(name, "toy.yaml", "--double")
    assert count() == 6
    mmemo(name, "toy.yaml", "--shout", "said.txt")
    assert (Path("said.txt").read_text(), count()) == ("HELLO", 6)
    with pytest.raises(ConfigError, match="did you mean 'times'"):
        mmemo(name, "toy.yaml", "--tims=5")


def test_its_help_says_what_its_row_says(toy: Stage) -> None:
    assert "│ toy Count rows. │" in mmemo("--help")
    shown = mmemo("toy", "--help")
    for part in ("Count rows.", "Needs: a manifest.", "Writes: count.txt.", "Next: nothing."):
        assert part in shown
    assert "Example: mmemo toy toy.yaml" in shown
    assert "--double" in shown
    assert "Count every row twice." in shown


def test_its_schema_and_check_are_found(toy: Stage) -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema", "toy"]).stdout)
    assert schema["properties"]["times"]["description"] == "How often each row counts."
    assert mmemo("check", "toy.yaml", "--stage", "toy") == "the toy is sound"
    assert mmemo("check", "toy.yaml", "--times=3") == "the toy is sound"
    assert not Path("out").exists()
    with pytest.raises(ConfigError, match="stage 'toy' reads no encoded clips"):
        mmemo("encode", "toy.yaml", "--times=3")


@pytest.mark.parametrize("name", ["toy", "toy_stage.py:STAGE"])
def test_a_pipeline_runs_it_once_and_a_report_counts_its_rows_as_training(
    toy: Stage, folder: Path, name: str
) -> None:
    root = make_run(folder / "run")
    values: dict[str, Any] = {
        "name": "toys",
        "output_dir": str(root),
        "stages": [{"name": "counted", "stage": name, "config": "toy.yaml"}],
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    assert f"counted ({name}): {root}/counted" in mmemo("check", "pipeline.yaml")
    mmemo("pipeline", "pipeline.yaml")
    assert count(f"{root}/counted") == 3
    assert "done before, nothing changed" in mmemo("pipeline", "pipeline.yaml")
    (stage,) = [stage for stage in read_stages(root) if stage.name == "counted"]
    assert (stage.kind, stage.status) == (name, "done")
    (config,) = {json.dumps(config, sort_keys=True) for config in stage.trained_on}
    assert "rows.jsonl" in config
    assert not read_run(root).held_out
    mmemo("report", str(root))
    assert f'<td class="left">{name}</td>' in (root / "report.html").read_text()


def test_a_changed_stage_file_runs_the_stage_again(folder: Path) -> None:
    values: dict[str, Any] = {
        "name": "toys",
        "output_dir": "run",
        "stages": [{"name": "counted", "stage": "toy_stage.py:STAGE", "config": "toy.yaml"}],
    }
    Path("pipeline.yaml").write_text(yaml.safe_dump(values))
    mmemo("pipeline", "pipeline.yaml")
    Path("toy_stage.py").write_text(TOY + "\n# another version\n")
    assert "inputs or outputs changed" in mmemo("pipeline", "pipeline.yaml")


def test_a_study_runs_it(toy: Stage) -> None:
    Path("study.yaml").write_text(
        "name: toys\noutput_dir: study\nseeds: [0]\n"
        "stages: [{name: counted, stage: toy, config: toy.yaml}]\narms: {a: {}}\n"
        "metrics: {rows: {stage: counted, file: n.json, path: n}}\n"
    )
    assert "seed 0, arm a: counted" in mmemo("study", "study.yaml", "--check")


def test_it_leaves_a_record_that_names_it_when_it_was_run_by_hand(toy: Stage, folder: Path) -> None:
    root = make_run(folder / "run")
    mmemo("toy", "toy.yaml", f"--output_dir={root}/mine")
    (stage,) = [stage for stage in read_stages(root) if stage.name == "mine"]
    assert stage.kind == "toy"
    assert len(stage.trained_on) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sft", "there is a stage 'sft' already"),
        ("pipeline", "there is a stage 'pipeline' already"),
        ("towers", "there is a stage 'towers' already"),
        ("My stage", "cannot name a stage"),
    ],
)
def test_a_name_is_given_once(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        register(Stage(name, config=Config, run=print))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stf", "did you mean 'sft'"),
        ("towers", "is now called 'encoders'"),
        ("toy_stage.py:STAG", "did you mean 'STAGE'"),
        ("toy_stage.py:shout", "is not a Stage"),
    ],
)
def test_an_unknown_stage_is_one_sentence(folder: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        stages.stage(name)


def test_a_config_class_without_what_a_stage_needs_is_refused(folder: Path) -> None:
    head = "from mmemo.config import Config\nfrom mmemo.stages import Stage\n"
    for name, base, ranks, lacks in (
        ("bare", "Config", False, "output_dir"),
        ("plain", "object", False, "output_dir"),
        ("alone", "Config", True, "run"),
    ):
        field = "output_dir: str" if ranks else "pass"
        text = (
            f"class C({base}):\n    {field}\nS = Stage('x', config=C, run=print, ranks={ranks})\n"
        )
        (folder / f"{name}.py").write_text(head + text)
        with pytest.raises(ConfigError, match=rf"{name}\.py:S' has no '{lacks}'; add that field"):
            stages.stage(f"{name}.py:S")


def test_every_reference_of_the_registry_is_there() -> None:
    for stage in STAGES.values():
        fields = stage.config_class.model_fields
        assert "output_dir" in fields, stage.name
        assert not stage.ranks or "run" in fields, stage.name
        for reference in (stage.run, stage.check, stage.inputs, *(o.run for o in stage.options)):
            assert reference is None or callable(stages.resolve(reference)), (stage.name, reference)


class Lines(Config):
    """A stage that reads clips and has no check of its own."""

    output_dir: str
    data: DataConfig


def test_a_wrong_row_is_found_by_the_inputs_alone(folder: Path) -> None:
    stage = Stage("lines", config=Lines, run=print, inputs=lambda c: load_samples(c.data))
    assert stage.encodable
    config = Lines(output_dir="out", data=DataConfig(manifests=["rows.jsonl"]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        run_check(config, stage=stage)


def test_options_need_no_config_of_their_own() -> None:
    assert all("--processes" in {o.flag for o in s.options} for s in STAGES.values() if s.ranks)
    assert Option("--x", "help").metavar is None
