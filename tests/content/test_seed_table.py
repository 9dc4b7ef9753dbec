"""``eval/seed_table.py``: the table of the README, exactly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.fake_run import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("seeds") / "0")


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/seed_table.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def block(run: Path, name: str) -> dict[str, dict[str, float]]:
    return json.loads((run / name / "results.json").read_text())["tasks"]["emotion"]


def written(found: dict[str, float]) -> str:
    return "{:.1f} ({:.1f}–{:.1f})".format(*(100 * found[key] for key in ("value", "low", "high")))


def test_the_table_has_a_row_a_seed_and_a_column_a_run(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "1"
    shutil.copytree(finished, other)
    weak = json.loads((other / "eval/results.json").read_text())
    weak["tasks"]["emotion"]["average"] |= {"value": 0.2, "low": 0.1, "high": 0.3}
    (other / "eval/results.json").write_text(json.dumps(weak))
    done = script(finished, other)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "| seed | curriculum SFT | text only | audio only | video only | majority | "
        "conflict clips | apart |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    assert len(lines) == 4
    cells = [part.strip() for part in lines[2].strip("|").split("|")]
    for place, name in enumerate(("eval", "eval_text", "eval_audio", "eval_video"), start=1):
        assert cells[place] == written(block(finished, name)["average"])
    assert cells[0] == "0"
    assert cells[6] == written(block(finished, "eval")["conflict_average"])
    low = block(finished, "eval")["average"]["low"]
    highs = [block(finished, f"eval_{x}")["average"]["high"] for x in ("text", "audio", "video")]
    assert cells[7] == ("yes" if low > max(highs) else "no") == "yes"
    assert lines[3].startswith("| 1 | 20.0 (10.0–30.0) | ")
    assert lines[3].endswith("| no |")


def test_what_is_no_run_is_one_sentence(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer/eval_text")
    for arguments, sentence in (
        ((), "no runs given; use python eval/seed_table.py RUN"),
        ((tmp_path / "nothing",), "is not a folder"),
        ((finished, tmp_path / "empty"), "contains no evaluation"),
        ((finished, tmp_path / "fewer"), "give runs of one pipeline"),
    ):
        done = script(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
