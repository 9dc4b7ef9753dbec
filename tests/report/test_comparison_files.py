"""``mmemo compare ... --csv --latex``: n runs as files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mmemo.cli import app
from mmemo.evaluation.results import Comparison, compare, compare_all, read_results, write_results
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scoring import score_rows
from mmemo.report.comparison_files import escape, write_csv, write_latex
from mmemo.statistics import BootstrapConfig, holm
from tests.report.fake_run import BOOTSTRAP, invent_rows, write_evaluation


def runs(root: Path, *skills: float, speakers: int = 30, n: int = 180) -> list[Path]:
    for place, skill in enumerate(skills):
        rows = [
            {**row, "conflict": None}
            for row in invent_rows(skill, n=n, seed=place, speakers=speakers)
        ]
        write_evaluation(root / f"r{place}", rows, root, name=f"run_{place} & co")
    return [root / f"r{place}" for place in range(len(skills))]


def many(*folders: Path) -> list[Comparison]:
    """Compared with enough exchanges for small p-values."""
    return compare(*folders, config=BootstrapConfig())


def cells(text: str) -> list[list[str]]:
    lines = text.splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    return [line.removesuffix(r" \\").split(" & ") for line in body]


def test_every_difference_is_a_row_of_the_csv_file(tmp_path: Path) -> None:
    found = compare(*runs(tmp_path, 0.9, 0.8, 0.5))
    write_csv(tmp_path / "c.csv", found)
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 5  # average, war, uar and two F1s
    blocks = [one.tasks["emotion"]["differences"] for one in found]
    for row, gap in zip(rows, [gap for block in blocks for gap in block.values()], strict=True):
        assert float(row["difference"]) == gap["value"]
        assert float(row["p_holm"]) == gap["p_holm"]
        assert (float(row["first_value"]), float(row["other_value"])) == (gap["a"], gap["b"])
        assert (row["tests"], row["confidence"], row["clusters"]) == ("8", "0.95", "30")
    assert {row["other"] for row in rows} == {"run_1 & co", "run_2 & co"}


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "+1", "@x", " -2"])
def test_no_name_becomes_a_formula(tmp_path: Path, name: str) -> None:
    write_evaluation(tmp_path / "a", invent_rows(0.9), tmp_path, name=name)
    write_evaluation(tmp_path / "b", invent_rows(0.5), tmp_path, name="b")
    write_csv(tmp_path / "c.csv", compare(tmp_path / "a", tmp_path / "b"))
    with (tmp_path / "c.csv").open(newline="") as handle:
        row = next(csv.DictReader(handle))
    assert row["first"] == f"'{name}"


def test_every_pair_is_corrected_together(tmp_path: Path) -> None:
    results = [read_results(path) for path in runs(tmp_path, 0.9, 0.7, 0.6, 0.5)]
    pairs, tests = compare_all(results, BOOTSTRAP)
    assert sorted(pairs) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    gaps = [
        gap
        for tasks in pairs.values()
        for name, gap in tasks["emotion"]["differences"].items()
        if name != "average"  # the accuracy again
    ]
    assert tests == len(gaps) == 24
    assert [gap["p_holm"] for gap in gaps] == pytest.approx(holm([gap["p"] for gap in gaps]))
    for tasks in pairs.values():
        found = tasks["emotion"]["differences"]
        assert found["average"]["p_holm"] == found["war"]["p_holm"]


def test_the_best_is_bold_only_if_it_is_better_than_all(tmp_path: Path) -> None:
    write_latex(tmp_path / "t.tex", many(*runs(tmp_path / "clear", 0.5, 0.97, 0.4)))
    text = (tmp_path / "t.tex").read_text()
    rows = cells(text)
    assert [row[0] for row in rows] == [rf"run\_{place} \& co" for place in range(3)]
    assert [["textbf" in cell for cell in row[1:]] for row in rows] == [
        [False] * 4,
        [True] * 4,
        [False] * 4,
    ]
    value = read_results(tmp_path / "clear/r1").main["metrics"]["war"]
    numbers = [f"{100 * value[key]:.1f}" for key in ("value", "low", "high")]
    bold = rf"\textbf{{{numbers[0]}}} {{\scriptsize [{numbers[1]}, {numbers[2]}]}}"
    assert rows[1][1] == bold
    assert r"\begin{tabular}{lrrrr}" in text
    assert "p < 0.05 after Holm's correction of all 12 tests" in text
    # The best of two that are alike is not bold, although both beat the third one.
    write_latex(tmp_path / "t.tex", many(*runs(tmp_path / "alike", 0.9, 0.91, 0.3)))
    assert "textbf" not in (tmp_path / "t.tex").read_text()
    # With too few speakers there is no p, and so no bold.
    few = runs(tmp_path / "few", 0.2, 1.0, speakers=4)
    write_latex(tmp_path / "t.tex", many(*few))
    assert "textbf" not in (tmp_path / "t.tex").read_text()


def test_lower_is_better_for_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = use("numbers")
    for place, error in enumerate((0.5, 0.1, 0.9)):
        rows = [
            {**row, "labels": [], "score": None, "truth": float(at % 7),
             "answer": at % 7 + error * (1 + at % 3), "status": "ok", "conflict": None}
            for at, row in enumerate(invent_rows(1.0, n=120, speakers=30))
        ]  # fmt: skip
        folder = tmp_path / f"r{place}"
        made = write_evaluation(folder, invent_rows(1.0), tmp_path).made
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "predictions.jsonl").write_text("".join(lines))
        tasks = score_rows(rows, BOOTSTRAP, {"emotion": [spec]})
        tasks["emotion"]["scores"] = {}
        write_results(folder, {"name": f"n{place}", "role": "model", "tasks": tasks, "made": made})
    paths = [tmp_path / f"r{place}" for place in range(3)]
    write_latex(tmp_path / "t.tex", many(*paths))
    text = (tmp_path / "t.tex").read_text()
    assert " & ccc & pearson & spearman & mae & rmse" in text
    by_name = {row[0]: row for row in cells(text)}
    assert by_name["n1"][4].startswith(r"\textbf{0.2")
    assert "textbf" not in by_name["n0"][4] + by_name["n2"][4]
    files = ["--latex", str(tmp_path / "u.tex"), "--csv", str(tmp_path / "u.csv")]
    app(["compare", *map(str, paths), *files], standalone_mode=False)
    told = capsys.readouterr().out
    assert "…" not in told
    assert all(len(line) <= 80 for line in told.splitlines())
    (first, second) = [line for line in told.splitlines() if line.startswith(" mae")]
    assert "+0.800" in first
    assert "−0.800" in second
    assert "mae" in (tmp_path / "u.csv").read_text()
    assert "textbf" not in (tmp_path / "u.tex").read_text()  # 200 exchanges allow no such p


def test_latex_prints_every_text_as_it_is() -> None:
    assert escape("a_b & 50% #1 $x$ {y} ~ ^ \\end{tabular}\n%z") == (
        r"a\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{}end\{tabular\} \%z"
    )
