"""Content is found and loaded by path; the run record survives a torn line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemo import content, stages
from mmemo.errors import ConfigError
from mmemo.run_log import RunRecord, read_events


def test_the_working_directory_wins_over_the_shipped_copy(tmp_path: Path, monkeypatch) -> None:
    shipped = content.find("ds_configs/zero2.json")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero2.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert content.find("ds_configs/zero2.json") == tmp_path / "ds_configs/zero2.json" != shipped


def test_a_function_is_loaded_once_and_typos_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("calls = []\ndef score(x):\n    return x + 1\n")
    assert content.load("mine.py:score")(1) == 2
    assert content.load("mine.py:calls") is content.load("mine.py:calls")
    with pytest.raises(ConfigError, match="did you mean 'score'"):
        content.load("mine.py:scor")
    with pytest.raises(ConfigError, match=r"folder/file\.py:name"):
        content.load("mine.score")
    with pytest.raises(ConfigError, match="check the path"):
        content.load("absent.py:score")


def test_a_file_that_fails_when_it_is_run_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("x = 1\n\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"mine\.py cannot be loaded \(ZeroDiv.*, line 3\)"):
        content.load("mine.py:x")
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert content.load("mine.py:x") == 1
    # What a record names may have been edited since: the report then counts it as training.
    (tmp_path / "stage.py").write_text("import no_such_module\n")
    assert stages.trains("stage.py:STAGE")


def test_events_are_appended_and_a_torn_line_is_survived(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.event("a", value=1)
    with record.path.open("a") as handle:
        handle.write('{"kind": "torn", "val')
    again = RunRecord(tmp_path)
    again.event("b", path=Path("x"))
    assert [event["kind"] for event in read_events(record.path)] == ["a", "b"]
    assert again.events("b")[0]["path"] == "x"


def test_a_silent_rank_writes_nothing(tmp_path: Path) -> None:
    RunRecord(tmp_path / "r", enabled=False).event("a")
    assert not (tmp_path / "r").exists()
