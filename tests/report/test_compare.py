"""``mmemo compare A B``: two evaluations side by side, on the questions that both answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import SCHEMA, compare, read_results
from mmemo.evaluation.scoring import score_task
from mmemo.report.tables import compare_runs
from tests.report.fake_run import BOOTSTRAP, invent_rows, probe_rows, write_evaluation


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs in separate folders; 15 of the first's questions and 9 of the second's are alone."""
    ours, theirs = invent_rows(0.9)[9:], invent_rows(0.5, seed=5, side="video")[:75]
    write_evaluation(tmp_path / "x/eval", ours, tmp_path, name="both ears")
    write_evaluation(tmp_path / "y/eval", theirs, tmp_path, name="one eye", role="baseline")
    return tmp_path / "x/eval", tmp_path / "y/eval"


def paired(two: tuple[Path, Path]) -> tuple[list[Row], list[Row]]:
    ours, theirs = (read_results(folder).rows() for folder in two)
    names = {row["sample_id"] for row in ours} & {row["sample_id"] for row in theirs}
    return [r for r in ours if r["sample_id"] in names], [
        r for r in theirs if r["sample_id"] in names
    ]


def test_every_difference_is_that_of_the_two_scores_on_the_shared_questions(
    two: tuple[Path, Path],
) -> None:
    block = compare(*two)[0].tasks["emotion"]
    assert (block["n"], block["unpaired"]) == (66, 24)
    ours, theirs = (score_task(rows, BOOTSTRAP) for rows in paired(two))
    expected = {
        "average": (ours["average"], theirs["average"]),
        "conflict_average": (ours["conflict_average"], theirs["conflict_average"]),
        **{name: (ours["metrics"][name], theirs["metrics"][name]) for name in ours["metrics"]},
        **{n: (ours["subsets"][n]["war"], theirs["subsets"][n]["war"]) for n in ours["subsets"]},
    }
    assert block["differences"].keys() == expected.keys()
    for name, (a, b) in expected.items():
        found = block["differences"][name]
        assert (found["a"], found["b"], found["n"]) == (a["value"], b["value"], a["n"])
        assert found["value"] == pytest.approx(a["value"] - b["value"], abs=2e-6)
        assert found["low"] <= found["value"] <= found["high"]
        assert 0 < found["p"] <= 1
    assert block["differences"]["audio_aligned"]["p"] < 0.05  # the face is wrong there


def test_the_other_way_round_is_the_mirror_image(two: tuple[Path, Path]) -> None:
    one, other = compare(*two)[0].tasks["emotion"], compare(*two[::-1])[0].tasks["emotion"]
    for name, found in one["differences"].items():
        mirror = other["differences"][name]
        assert mirror["value"] == pytest.approx(-found["value"])
        assert mirror["low"] == pytest.approx(-found["high"])
        assert mirror["p"] == pytest.approx(found["p"])


def test_the_table_says_what_differs_how_surely_and_on_what(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    compare_runs(*two)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    words = " ".join(text.split())
    assert "A both ears" in words
    assert "B one eye" in words
    for name in ("Average", "Video-aligned", "Audio-aligned", "Consistent", "UAR", "Macro F1"):
        assert name in text
    assert "66 questions answered by both runs; 24 others left out" in words
    assert "95% intervals over 10 speakers" in words
    average = compare(*two)[0].tasks["emotion"]["differences"]["average"]
    line = next(line for line in text.splitlines() if line.startswith(" Average"))
    assert f"{100 * average['value']:+.1f}" in line
    assert f"{100 * average['low']:+.1f} to {100 * average['high']:+.1f}" in line


def test_each_task_that_both_have_gets_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = invent_rows(0.9)
    write_evaluation(tmp_path / "a", [*rows, *probe_rows(rows)], tmp_path)
    write_evaluation(tmp_path / "b", [*rows, *probe_rows(rows, seed=9)], tmp_path)
    write_evaluation(tmp_path / "c", rows, tmp_path)
    compare_runs(tmp_path / "a", tmp_path / "b")
    text = capsys.readouterr().out
    assert "Task: emotion" in text
    assert "Task: probe_cue" in text
    compare_runs(tmp_path / "a", tmp_path / "c")
    assert "probe_cue" not in capsys.readouterr().out


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", invent_rows(0.7), tmp_path)
    block = compare(tmp_path / "a", tmp_path / "a")[0].tasks["emotion"]
    assert all(d["value"] == 0 and d["p"] == 1 for d in block["differences"].values())


def test_rows_without_a_conflict_field_are_compared_as_a_whole(tmp_path: Path) -> None:
    for name, skill in (("a", 0.9), ("b", 0.4)):
        rows = [{**row, "conflict": None} for row in invent_rows(skill)]
        write_evaluation(tmp_path / name, rows, tmp_path)
    found = compare(tmp_path / "a", tmp_path / "b")[0].tasks["emotion"]["differences"]
    assert set(found) == {"average", "war", "uar", "weighted_f1", "macro_f1"}
    assert found["average"]["value"] == found["war"]["value"]


def test_what_cannot_be_compared_is_one_sentence(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="give the folder of a finished `mmemo eval`"):
        compare_runs(two[0], tmp_path / "nothing")
    other = [{**row, "truth": "neutral"} for row in invent_rows(0.5)]
    write_evaluation(tmp_path / "other", other, tmp_path)
    with pytest.raises(EvaluationError, match="evaluate both on the same manifests"):
        compare_runs(two[0], tmp_path / "other")
    for damage in (b"{", b"\xff\xfe", json.dumps({"schema": SCHEMA}).encode()):
        (two[1] / "results.json").write_bytes(damage)
        with pytest.raises(EvaluationError, match=r"results\.json: is damaged; run the evaluation"):
            compare_runs(*two)
