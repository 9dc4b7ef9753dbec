"""``mmemo compare A B``: two evaluations side by side, on the questions that both answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmemo.cli import app
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import SCHEMA, claim_notes_of, compare, read_results
from mmemo.evaluation.scoring import score_task
from mmemo.report.tables import compare_runs
from mmemo.statistics import holm
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


def three(tmp_path: Path) -> list[Path]:
    for name, skill, seed in (("a", 0.9, 1), ("b", 0.8, 2), ("c", 0.5, 3)):
        write_evaluation(tmp_path / name, invent_rows(skill, seed=seed), tmp_path, name=name)
    return [tmp_path / name for name in "abc"]


def test_n_runs_are_compared_with_the_first_and_corrected_together(tmp_path: Path) -> None:
    runs = three(tmp_path)
    found = compare(*runs)
    assert [(one.first.name, one.other.name) for one in found] == [("a", "b"), ("a", "c")]
    blocks = [one.tasks["emotion"]["differences"] for one in found]
    alone = [compare(runs[0], run)[0].tasks["emotion"]["differences"] for run in runs[1:]]
    every = [one for block in blocks for one in block.values()]
    assert found[0].tests == found[1].tests == len(every) == 18
    for block, single in zip(blocks, alone, strict=True):
        for name in block:
            assert block[name]["p"] == single[name]["p"]
            assert block[name]["p_holm"] >= single[name]["p_holm"] >= block[name]["p"]
    smallest = min(every, key=lambda one: one["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 18 * smallest["p"]), abs=1e-5)
    assert [one["p_holm"] for one in every] == pytest.approx(holm([one["p"] for one in every]))


def test_without_conflicts_the_headline_is_the_accuracy_and_counts_once(tmp_path: Path) -> None:
    for name, skill in (("a", 0.9), ("b", 0.4)):
        rows = [{**row, "conflict": None} for row in invent_rows(skill)]
        write_evaluation(tmp_path / name, rows, tmp_path)
    (found,) = compare(tmp_path / "a", tmp_path / "b")
    differences = found.tasks["emotion"]["differences"]
    assert found.tests == 4
    assert differences["average"]["p_holm"] == differences["war"]["p_holm"]


def test_few_speakers_get_no_p_and_words_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for speakers in (1, 4, 7):
        folder = tmp_path / str(speakers)
        write_evaluation(folder / "a", invent_rows(1.0, speakers=speakers), tmp_path)
        write_evaluation(folder / "b", invent_rows(0.0, speakers=speakers), tmp_path)
        (found,) = compare(folder / "a", folder / "b")
        average = found.tasks["emotion"]["differences"]["average"]
        capsys.readouterr()
        compare_runs(folder / "a", folder / "b")
        words = " ".join(capsys.readouterr().out.split())
        assert average["clusters"] == speakers
        if speakers == 1:
            assert (average["low"], average["p"]) == (None, None)
            assert "No interval and no p: all answers come from 1 speaker." in words
        if speakers == 4:
            assert (average["p"], average["p_holm"]) == (None, None)
            assert found.tests == 0
            assert "Caution: only 4 speakers stand behind these numbers." in words
            assert "with 4 speakers it could not fall below 0.05" in words
            assert "(the smallest possible is 0.12)" in words
        if speakers == 7:
            assert average["p"] == pytest.approx(2 / 2**7, abs=1e-6)
            assert "With 7 speakers, no p of 9 can be below 0.05 after Holm" in words


def test_a_subset_with_too_few_speakers_has_no_p_of_its_own(tmp_path: Path) -> None:
    def rows(skill: float) -> list[Row]:
        invented = invent_rows(skill, seed=2)
        return [
            {
                **row,
                "conflict": "audio_aligned" if row["group"]["speaker"] < "t03" else "consistent",
            }
            for row in invented
        ]

    write_evaluation(tmp_path / "a", rows(0.9), tmp_path)
    write_evaluation(tmp_path / "b", rows(0.3), tmp_path)
    found = compare(tmp_path / "a", tmp_path / "b")[0].tasks["emotion"]["differences"]
    assert (found["audio_aligned"]["clusters"], found["audio_aligned"]["p"]) == (3, None)
    assert found["consistent"]["clusters"] == 7
    assert found["consistent"]["p"] is not None


def made_otherwise(folder: Path, **changes: object) -> None:
    """Change values of ``made``; a dotted name stands for a nested one (``a__b``)."""
    values = json.loads((folder / "results.json").read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = values["made"]
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "results.json").write_text(json.dumps(values))


def test_everything_in_which_two_runs_differ_is_named(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(*two)[0].unlike == []
    changes: dict[str, object] = {
        "sampling__frames": 4,
        "prompts__sha256": "9" * 64,
        "benchmark__sha256": "8" * 64,
        "generation__max_new_tokens": 9,
        "versions__torch": "1.0",
        "versions__transformers": "4.0",
        "seed": 3,
        "model__path": "org/other",
    }
    made_otherwise(two[1], **changes)
    (found,) = compare(*two)
    assert {name for name, _, _ in found.unlike} == {n.replace("__", ".") for n in changes}
    assert ("sampling.frames", 8, 4) in found.unlike
    assert ("versions.transformers", None, "4.0") in found.unlike
    compare_runs(*two)
    text = capsys.readouterr().out
    for name in changes:
        assert name.replace("__", ".") in text
    assert json.dumps(found.row())


def test_reworded_questions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = invent_rows(0.7)
    write_evaluation(tmp_path / "a", rows, tmp_path)
    write_evaluation(tmp_path / "b", [{**row, "question": "Who?"} for row in rows[:50]], tmp_path)
    compare_runs(tmp_path / "a", tmp_path / "b")
    assert "50 questions had other words in the other run." in capsys.readouterr().out


def test_incomparable_runs_are_refused_in_a_sentence(two: tuple[Path, Path]) -> None:
    made_otherwise(two[1], benchmark__file="eval/ca_mer.py")
    with pytest.raises(EvaluationError, match=r"two benchmarks \(world_conflict.py and ca_mer.py"):
        compare(*two)
    made_otherwise(two[1], benchmark__file="eval/world_conflict.py", parser=0)
    with pytest.raises(EvaluationError, match="by parser 0; run both evaluations again"):
        compare(*two)
    with pytest.raises(EvaluationError, match="two or more evaluations"):
        compare(two[0])


def test_other_label_sets_are_refused(tmp_path: Path) -> None:
    rows = invent_rows(0.7)
    write_evaluation(tmp_path / "a", rows, tmp_path)
    other = [{**row, "labels": [*row["labels"], "calm"]} for row in rows]
    write_evaluation(tmp_path / "b", other, tmp_path)
    with pytest.raises(EvaluationError, match="other labels to choose from"):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_command_compares_many_runs_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(run) for run in three(tmp_path)]
    app(["compare", *runs, "--json", str(tmp_path / "x.json")], standalone_mode=False)
    text = capsys.readouterr().out
    assert "A − B" in text
    assert "A − C" in text
    found = json.loads((tmp_path / "x.json").read_text())["comparisons"]
    assert [one["other"]["name"] for one in found] == ["b", "c"]
    assert found[0]["tasks"]["emotion"]["differences"]["average"]["p_holm"] is not None
    app(["compare", *runs[:2], "--confidence", "0.9"], standalone_mode=False)
    assert "90% intervals over 10 speakers" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="compare: 'confidence'"):
        app(["compare", *runs[:2], "--confidence", "1.5"], standalone_mode=False)


def test_an_earlier_versions_intervals_are_called_so(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", invent_rows(0.7), tmp_path, name="old run")
    assert claim_notes_of([read_results(tmp_path / "a")]) == []
    values = json.loads((tmp_path / "a/results.json").read_text())
    del values["made"]["intervals"]
    (tmp_path / "a/results.json").write_text(json.dumps(values))
    (note,) = claim_notes_of([read_results(tmp_path / "a")])
    assert note.startswith("The intervals of old run are an earlier version's")
