"""``mmemo reliance``: one table over evaluations of several conflict benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.errors import EvaluationError
from mmemo.evaluation.results import PREDICTIONS, write_results
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scoring import score_rows
from mmemo.report.conflicts import reliance_rows, reliance_table
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=100)
LABELS = ["happy", "sad", "angry"]


def answer(number: int, **values: Any) -> dict[str, Any]:
    row = {
        "key": f"k{number}",
        "sample_id": f"s{number}",
        "task": "emotion",
        "labels": LABELS,
        "status": "ok",
        "media": {"video": f"{number}.mp4"},
        "group": {"speaker": f"p{number % 7}"},
        "raw": "",
        **values,
    }
    row["score"] = float(row["answer"] == row["truth"])
    return row


def subsets(face_right: int, voice_right: int) -> list[dict[str, Any]]:
    """Ten clips of each subset. On as many as given the model is right, on the other conflict clips
    it follows the other side."""
    rows: list[dict[str, Any]] = []
    for name, right in (
        ("video_aligned", face_right),
        ("audio_aligned", voice_right),
        ("consistent", 8),
    ):
        for number in range(10):
            sides = {"video": "happy", "audio": "happy" if name == "consistent" else "sad"}
            truth = sides["audio" if name == "audio_aligned" else "video"]
            other = sides["video" if name == "audio_aligned" else "audio"]
            said = truth if number < right else other
            said = "angry" if name == "consistent" and number >= right else said
            own = {"conflict": name, "modality_labels": sides, "truth": truth, "answer": said}
            rows.append(answer(len(rows), **own))
    return rows


def write(folder: Path, file: str, rows: list[dict[str, Any]], **specs: Any) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / PREDICTIONS).write_text(lines, encoding="utf-8")
    made = {"benchmark": {"file": file}, "bootstrap": CONFIG.model_dump(), "intervals": "x"}
    tasks = score_rows(rows, CONFIG, specs)
    write_results(folder, {"name": folder.name, "role": "model", "tasks": tasks, "made": made})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "runs/ca_mer/listener", "eval/ca_mer.py", subsets(2, 9))
    write(tmp_path / "runs/ca_mer/watcher", "eval/ca_mer.py", subsets(10, 4))
    probes = [
        answer(n, task=f"reasoning_{kind}_{side}", truth="happy", answer=said, labels=LABELS)
        for n, (kind, side, said) in enumerate(
            [("basic", "audio", "happy")] * 4
            + [("stress", "audio", "sad")] * 2
            + [("basic", "video", "sad")] * 3
            + [("basic", "video", "happy")]
            + [("stress", "video", "happy")] * 2
        )
    ]
    probes.append(answer(99, task="modality_agreement", truth="sad", answer="sad"))
    write(tmp_path / "runs/emorealm/listener", "eval/emorealm.py", probes)
    words = {"modality_labels": {"audio": "sad", "text": "happy"}, "truth": "sad"}
    spoken = [answer(n, **words, answer=LABELS[n % 4 == 0], task="choice") for n in range(12)]
    write(tmp_path / "runs/vox/reader", "eval/voxparadox.py", spoken, choice=[use("sides")])
    plain = [answer(n, truth="sad", answer="sad") for n in range(3)]
    write(tmp_path / "runs/dfew/watcher", "eval/dfew.py", plain)
    return tmp_path / "runs"


def value(found: Any) -> float | None:
    return None if found is None else found["value"]


def test_every_benchmark_says_what_it_can_by_hand(runs: Path) -> None:
    rows = {(row.benchmark, row.model): row for row in reliance_rows([runs])}
    assert list(rows) == [
        ("ca_mer", "listener"),
        ("ca_mer", "watcher"),
        ("emorealm", "listener"),
        ("voxparadox", "reader"),
    ]
    listener = rows["ca_mer", "listener"]
    assert [value(one) for one in (listener.voice, listener.face, listener.consistent)] == [
        *(0.9, 0.2, 0.8)
    ]
    assert (listener.worse, listener.n) == ("face", 30)
    assert value(listener.gap) == pytest.approx(0.7)
    # Of audio-aligned clips 9 of 10 follow the voice, of video-aligned ones 8: (0.8 + 0.6) / 2.
    assert value(listener.reliance) == pytest.approx(0.7)
    watcher = rows["ca_mer", "watcher"]
    assert (watcher.worse, value(watcher.gap)) == ("voice", pytest.approx(-0.6))
    assert value(watcher.reliance) == pytest.approx(-0.6)
    probes = rows["emorealm", "listener"]
    # Means over tasks: (1 + 0) / 2 and (1/4 + 1) / 2, whatever their sizes.
    assert value(probes.voice) == 0.5
    assert value(probes.face) == pytest.approx(0.625)
    assert value(probes.gap) == pytest.approx(-0.125)
    assert (probes.worse, probes.reliance, probes.n) == ("voice", None, 12)
    reader = rows["voxparadox", "reader"]
    assert (value(reader.voice), value(reader.face), reader.against) == (0.25, None, "words")
    assert value(reader.reliance) == pytest.approx(-0.5)
    for row in rows.values():
        for one in (row.voice, row.gap, row.reliance):
            assert one is None or one["low"] <= one["value"] <= one["high"]


def test_the_table_and_the_file_have_all_of_it(runs: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(reliance_table(reliance_rows([runs])))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    line = next(one for one in shown.splitlines() if one.split()[:1] == ["listener"])
    assert line.split() == ["listener", "90.0", "20.0", "80.0", "face", "+70.0", "+0.700", "30"]
    assert shown.index("ca_mer") < shown.index("emorealm") < shown.index("voxparadox")
    out = tmp_path / "table.json"
    done = CliRunner().invoke(app, ["reliance", str(runs / "ca_mer"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["worse"]) for row in rows] == [
        *(("listener", "face"), ("watcher", "voice"))
    ]


def test_folders_without_a_conflict_benchmark_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="none of 1 evaluations is of a conflict benchmark"):
        reliance_rows([runs / "dfew"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        reliance_rows([runs, tmp_path / "empty"])
