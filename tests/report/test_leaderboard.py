"""``mmemo leaderboard DIR``: what the page says, and that no name can attack it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from mmemo.cli import app
from mmemo.errors import EvaluationError
from mmemo.evaluation.results import read_results
from mmemo.report.leaderboard import Board, build_leaderboard, make_boards
from tests.report.fake_run import invent_rows, probe_rows, write_evaluation


def boards(root: Path, *names: str) -> list[Board]:
    return make_boards([read_results(root / name) for name in names], root)


def test_one_table_for_each_benchmark_with_the_best_first(tmp_path: Path) -> None:
    for name, skill in (("low", 0.3), ("high", 0.95), ("middle", 0.6)):
        rows = invent_rows(skill)
        write_evaluation(tmp_path / name, [*rows, *probe_rows(rows)], tmp_path)
    result = write_evaluation(tmp_path / "other", invent_rows(0.5), tmp_path)
    made = {**result.made, "benchmark": {"file": "eval/ca_mer.py", "sha256": "a"}}
    made["training"] = {"status": "in-distribution"}
    write_evaluation(tmp_path / "other", invent_rows(0.5), tmp_path, made=made)
    first, second = boards(tmp_path, "low", "high", "middle", "other")
    assert (first.title, second.title) == ("ca_mer", "world_conflict")
    assert [entry.result.name for entry in second.entries] == ["high", "middle", "low"]
    assert [(one.task, one.title) for one in second.columns] == [
        *(("emotion", name) for name in ("Average", "UAR", "Weighted F1", "Macro F1", "Conflict")),
        ("probe_cue", "Accuracy"),
    ]
    best = read_results(tmp_path / "high").main
    cell = second.entries[0].cells[0]
    assert cell.value == best["average"]["value"]
    assert cell.text == f"{100 * best['average']['value']:.1f}"
    assert cell.interval.startswith(f"{100 * best['average']['low']:.1f}–")
    entry = second.entries[0]
    statuses = [block["statuses"] for block in read_results(tmp_path / "high").tasks.values()]
    assert entry.invalid == sum(one["refused"] + one["malformed"] for one in statuses)
    assert (entry.n, entry.of, second.notes) == (130, 130, [])
    assert (entry.training, first.entries[0].training) == ("unknown", "in-distribution")


def test_rows_over_fewer_or_other_questions_are_marked(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "whole", invent_rows(0.5), tmp_path)
    write_evaluation(tmp_path / "part", invent_rows(0.9)[:60], tmp_path)
    other = [{**row, "sample_id": f"x{row['sample_id']}"} for row in invent_rows(0.5)]
    write_evaluation(tmp_path / "fold", other, tmp_path)
    first, second = boards(tmp_path, "whole", "part", "fold")
    assert [(entry.n, entry.of) for entry in first.entries] == [(60, 90), (90, 90)]
    assert "mmemo compare pairs them" in first.notes[0]
    assert [(entry.n, entry.of) for entry in second.entries] == [(90, 90)]
    assert second.title == "world_conflict, 90 questions of fold"


def test_a_table_over_all_tasks_comes_first_and_few_official_numbers(tmp_path: Path) -> None:
    result = write_evaluation(tmp_path / "a", invent_rows(0.5), tmp_path)
    official = {f"n{place}": place / 10 for place in range(9)}
    tasks = {"emotion": {**result.main, "official": official}}
    summary = {"official": {"emotion": 0.5, "mean": 0.625}, "corrected": {"mean": None}}
    write_evaluation(tmp_path / "a", invent_rows(0.5), tmp_path, tasks=tasks, summary=summary)
    write_evaluation(tmp_path / "b", invent_rows(0.5), tmp_path)
    (board,) = boards(tmp_path, "a", "b")
    titles = [column.title for column in board.columns]
    assert titles[:2] == ["Mean (official)", "Average"]  # the other mean lacks a task
    assert titles[-3:] == ["n0 (official)", "n1 (official)", "n2 (official)"]
    first, second = board.entries
    assert [first.cells[place].text for place in (0, -1)] == ["62.5", "0.200"]
    assert [second.cells[place].text for place in (0, -1)] == ["–", "–"]


def test_predictions_made_elsewhere_say_so(tmp_path: Path) -> None:
    result = write_evaluation(tmp_path / "a", invent_rows(0.5), tmp_path)
    made = {**result.made, "model": {"path": None}}
    made["elsewhere"] = {"file": "/x/theirs.csv", "unanswered": 2}
    write_evaluation(tmp_path / "a", invent_rows(0.5), tmp_path, made=made)
    text = build_leaderboard(tmp_path, tmp_path / "l.html").read_text()
    assert "made elsewhere: theirs.csv" in text
    assert "answered</button>" in text


def test_hostile_names_are_texts(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script><img src="http://x/y">'
    folder = tmp_path / "javascript:alert(1)" / '"><b>'
    result = write_evaluation(folder, invent_rows(0.5), tmp_path, name=nasty)
    made = {**result.made, "benchmark": {"file": nasty, "sha256": nasty}}
    made |= {"training": {"status": nasty}, "model": {"path": nasty}}
    tasks = {nasty: {**result.main, "official": {nasty: 0.5}, "scored": {}}}
    write_evaluation(folder, invent_rows(0.5), tmp_path, name=nasty, made=made, tasks=tasks)
    damaged = tmp_path / nasty.replace("/", "-") / "run"
    damaged.mkdir(parents=True)
    (damaged / "results.json").write_text("{")
    page = build_leaderboard(tmp_path, tmp_path / "l.html", title=nasty)
    text = page.read_text()
    assert text.count("<script>") == text.count("</script>") == 1  # our own
    assert "<img" not in text
    assert "<b>" not in text
    links = re.findall(r'href="([^"#]+)"', text)
    assert all("javascript:" not in link for link in links)
    (link,) = [link for link in links if link.endswith("results.json")]
    assert link.startswith("javascript%3A")
    assert "1 folder could not be read" in text


def test_damaged_folders_are_listed_and_end_nothing(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", invent_rows(0.5), tmp_path)
    good = json.loads((tmp_path / "a/results.json").read_text())
    for place, change in enumerate(
        ({"tasks": {}}, {"tasks": {"emotion": {}}}, {"made": {}}, {"tasks": [1]}, {"made": 3})
    ):
        (tmp_path / f"b{place}").mkdir()
        (tmp_path / f"b{place}/results.json").write_text(json.dumps({**good, **change}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/results.json").write_bytes(b"\xff")
    (tmp_path / "a/predictions.jsonl").unlink()  # its questions are not known any more
    os.symlink(tmp_path, tmp_path / "a/up")
    text = build_leaderboard(tmp_path, tmp_path / "l.html").read_text()
    assert "6 folders could not be read" in text
    assert "1 evaluation on 1 benchmark" in text


def test_the_command(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no evaluation that can be read"):
        app(["leaderboard", str(tmp_path)], standalone_mode=False)
    with pytest.raises(EvaluationError, match="is not a folder"):
        app(["leaderboard", str(tmp_path / "x")], standalone_mode=False)
    write_evaluation(tmp_path / "runs/deep/a", invent_rows(0.5), tmp_path)
    app(["leaderboard", str(tmp_path / "runs")], standalone_mode=False)
    text = (tmp_path / "runs/leaderboard.html").read_text()
    assert 'href="deep/a/results.json"' in text
    out = tmp_path / "site/page.html"
    app(["leaderboard", str(tmp_path / "runs"), "--output", str(out)], standalone_mode=False)
    assert 'href="../runs/deep/a/results.json"' in out.read_text()
