"""Declared benchmarks: what is asked, how it is read, and a whole run from a release's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.data.manifest import DataConfig
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.benchmark import load_benchmark, validate
from mmemo.evaluation.results import compare, read_results
from mmemo.evaluation.script import adapter_of, run_zero_shot
from mmemo.report.page import build_report
from tests.evaluation.world import save_model, write_world

FILE = '''
"""A benchmark with a folder of its own."""

import json

from mmemo.answers.kinds import Numbers
from mmemo.data.adapter import Excluded
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
PUBLISHED = {"": {"": 12}}
TASKS = {
    "emotion": Task(labels=("happy", "sad", "angry", "fear", "surprise", "neutral"),
                    question="Which emotion? One of {labels}."),
    "choice": Task(labels="choices"),
    "valence": Task(answers=Numbers(-3, 3), question="How pleasant, from -3 to 3?",
                    scorers=(use("numbers"), )),
}


def rows(root, *, keep="all"):
    for number, line in enumerate((root / "test_conflict.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if number == 0 and keep == "all":
            yield Excluded(row["sample_id"], "label outside the set", "bored")
            continue
        base = {key: row[key] for key in ("videos", "audios", "label", "group")}
        name = row["sample_id"]
        yield {**base, "sample_id": name, "prompt": "<video><audio>?"}
        yield {**base, "sample_id": name + "-c", "prompt": "<video><audio>Who?", "task": "choice",
               "choices": ["a man", "a woman"], "gold": "a woman"}
        yield {**base, "sample_id": name + "-v", "prompt": "<video><audio>?",
               "task": "valence", "gold": number - 1}
'''


NUMBERS = """
import json

from mmemo.answers.kinds import Numbers
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("gold",)
TASKS = {"valence": Task(answers=Numbers(-3, 3), question="How pleasant?",
                         scorers=(use("numbers"),))}


def rows(root):
    for line in (root / "test_conflict.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield {"sample_id": row["sample_id"], "prompt": "<video><audio>?", "gold": 1,
               "videos": row["videos"], "audios": row["audios"], "group": row["group"]}
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A benchmark's file, and the folder of its release."""
    folder = tmp_path_factory.mktemp("release")
    root = write_world(folder / "data", 4)
    file = folder / "bench.py"
    file.write_text(FILE, encoding="utf-8")
    return file, root


def test_what_is_asked(release: tuple[Path, Path], tmp_path: Path) -> None:
    file, root = release
    manifest = tmp_path / "m.jsonl"
    first = json.loads((root / "test_conflict.jsonl").read_text().splitlines()[1])
    row = {
        "sample_id": "a",
        "prompt": "<video>Who?",
        "videos": first["videos"],
        "task": "choice",
        "choices": ["one", "two", "three"],
        "gold": "two",
    }
    emotion = {"sample_id": "b", "prompt": "<video>?", "videos": first["videos"], "label": "sad"}
    manifest.write_text(json.dumps(row) + "\n" + json.dumps(emotion) + "\n")
    benchmark = load_benchmark(str(file))
    asked = benchmark.questions(DataConfig(manifests=[str(manifest)], media_root=str(root)))
    assert [(one.task, one.truth) for one in asked] == [("emotion", "sad"), ("choice", "B")]
    assert asked[0].turns[-1].text.endswith("One of happy, sad, angry, fear, surprise, neutral.")
    assert asked[1].turns[-1].text == "<video>Who?\nA. one\nB. two\nC. three"
    assert asked[1].row()["choices"] == ["one", "two", "three"]
    validate(benchmark, asked)
    manifest.write_text(json.dumps({**row, "gold": "four"}) + "\n")
    with pytest.raises(EvaluationError, match="'four' is none of its choices"):
        benchmark.questions(DataConfig(manifests=[str(manifest)], media_root=str(root)))
    manifest.write_text(json.dumps({**row, "task": "chioce"}) + "\n")
    with pytest.raises(EvaluationError, match="task 'chioce'"):
        benchmark.questions(DataConfig(manifests=[str(manifest)], media_root=str(root)))


def test_a_release_is_evaluated_from_its_folder(
    release: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = release
    model = save_model(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [
        *(str(file), "--data", str(root), "--model", str(model), "--output-dir", str(out)),
        *("--generation.max_new_tokens=4", "--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    result = read_results(out)
    assert list(result.tasks) == ["emotion", "choice", "valence"]
    assert [result.tasks[name]["n"] for name in result.tasks] == [3, 3, 3]
    assert result.values["excluded"]["rows"] == {"label outside the set": 1}
    valence: Any = result.tasks["valence"]
    assert valence["headline"] == "ccc"
    assert set(valence["scored"]) == {"ccc", "pearson", "spearman", "mae", "rmse"}
    assert valence["scored"]["mae"]["n"] + valence["scored"]["mae"]["unscored"] == 3
    # The run is repeated from its own config, and compared with itself.
    done = CliRunner().invoke(app, ["eval", str(out / "config.yaml")])
    assert done.exit_code == 0, done.output
    other = tmp_path / "other"
    shutil.copytree(out, other)
    (found,) = compare(out, other)
    assert set(found.tasks["valence"]["scored"]) == {"ccc", "pearson", "mae", "rmse"}


def test_a_headline_without_labels_is_printed_and_reported(
    release: tuple[Path, Path], tmp_path: Path
) -> None:
    _, root = release
    alone = tmp_path / "numbers.py"
    alone.write_text(NUMBERS, encoding="utf-8")
    run = tmp_path / "run"
    arguments = [
        *(str(alone), "--data", str(root), "--model", str(save_model(tmp_path / "model"))),
        *("--output-dir", str(run / "evaluation"), "--generation.max_new_tokens=4"),
        *("--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    assert "Metrics: valence" in done.output
    page = build_report(run, run / "report.html").read_text(encoding="utf-8")
    assert "has ccc = –" in page
    assert "Metrics of valence" in page


def test_a_dry_run_names_what_is_wrong(
    release: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = release
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    listed = [json.loads(line) for line in (copy / "test_conflict.jsonl").read_text().splitlines()]
    (copy / listed[1]["videos"][0]).unlink()
    (copy / listed[2]["videos"][0]).write_bytes(b"no clip")
    run_zero_shot(file, ["--data", str(copy), "--dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "1 row left out (label outside the set)" in told
    assert "6 rows here, 12 published" in told
    assert "1 files named by the data set but not in its folder" in told
    assert "1 clip that cannot be opened" in told
    assert "This copy is not whole" in told
    run_zero_shot(file, ["--data", str(root), "--dry-run", "--option", "keep=every"])
    told = capsys.readouterr().out
    assert "This copy is whole." in told
    with pytest.raises(SystemExit, match="has no option 'kep'; did you mean 'keep'"):
        run_zero_shot(file, ["--data", str(root), "--dry-run", "--option", "kep=every"])


def test_a_model_is_asked_for() -> None:
    with pytest.raises(SystemExit, match="give a model"):
        run_zero_shot("eval/world_conflict.py", ["--data", "a.json"])
    with pytest.raises(ConfigError, match="reads no folder"):
        adapter_of("eval/world_conflict.py")
