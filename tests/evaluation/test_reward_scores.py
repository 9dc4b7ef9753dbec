"""Reward functions as scores of an evaluation."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmemo.check.run import read_samples
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.results import compare, read_results
from mmemo.evaluation.runner import run_eval
from mmemo.evaluation.scoring import score_means, task_means
from mmemo.evaluation.tables import scores_table
from mmemo.report.collect import read_run
from mmemo.report.page import build_report
from mmemo.report.tables import compare_runs
from mmemo.statistics import BootstrapConfig
from tests.evaluation.world import config_of, row_of, save_model, write_world
from tests.report.fake_run import add_scores, invent_rows, write_evaluation

ROWS = 10
FUNCTIONS = """
import json
seen = []

def looks(prompts, completions, completion_ids, *, label, conflict, trainer_state, need=1, **_):
    for given in zip(prompts, completions, completion_ids, label, conflict, strict=True):
        seen.append([*given, need, trainer_state.global_step])
    return [0.25 + 0.5 * (truth == "happy") for truth in label]

def picky(prompts, completions, *, conflict, **_):
    return [None if one == "consistent" else 1.0 for one in conflict]

def raises(prompts, completions, **_):
    raise KeyError("no such clip")

def needs(prompts, completions, *, valence, **_):
    return valence

number = 3
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world and a model; tests must not change them."""
    root = tmp_path_factory.mktemp("scores")
    return write_world(root / "world", ROWS), save_model(root / "model")


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("content") / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def scored(shared: tuple[Path, Path], out: Path, *scores: dict[str, Any]) -> Any:
    return run_eval(config_of(*shared, out, scores=list(scores)))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_score_is_told_the_question_the_answer_and_the_truth(
    shared: tuple[Path, Path], functions: str, tmp_path: Path
) -> None:
    from mmemo import content

    seen = content.load(f"{functions}:seen")
    seen.clear()
    result = scored(shared, tmp_path, {"path": f"{functions}:looks", "params": {"need": 5}})
    rows = result.rows()
    assert len(seen) == len(rows) == ROWS
    for row, (prompt, completion, ids, label, conflict, need, step) in zip(rows, seen, strict=True):
        assert row["question"] in prompt[-1]["content"]
        assert completion == [{"role": "assistant", "content": row["raw"]}]
        assert all(isinstance(token, int) for token in ids)
        assert (label, conflict, need, step) == (row["truth"], row["conflict"], 5, 1)
    block = result.main["scores"]["mine"]
    expected = [0.25 + 0.5 * (row_of(index)["label"] == "happy") for index in range(ROWS)]
    assert block["value"] == pytest.approx(statistics.mean(expected), abs=1e-6)
    assert block["low"] <= block["value"] <= block["high"]
    assert (block["n"], block["unscored"]) == (ROWS, 0)
    for subset, found in block["subsets"].items():
        values = [x for i, x in enumerate(expected) if row_of(i)["conflict"] == subset]
        assert found["value"] == pytest.approx(statistics.mean(values), abs=1e-6)
        assert found["n"] == len(values)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [row["key"] for row in rows]
    assert [line["scores"]["mine"] for line in lines] == expected
    made = result.made["scores"]["mine"]
    assert made == {
        "path": f"{functions}:looks",
        "sha256": content.sha256(Path(functions)),
        "params": {"need": 5},
        "failed": 0,
    }


def test_adding_changing_and_dropping_a_score_asks_nothing_again(
    shared: tuple[Path, Path], functions: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    scored(shared, out)
    before = (out / "predictions.jsonl").read_bytes()
    assert not (out / "scores.jsonl").exists()
    with_score = scored(shared, out, {"path": f"{functions}:looks"})
    scored(shared, out, {"path": f"{functions}:picky"})
    fresh = scored(shared, tmp_path / "fresh", {"path": f"{functions}:looks"})
    assert fresh.values == with_score.values
    bare = scored(shared, out)
    assert [event["kept"] for event in events(out, "answers")] == [0, ROWS, ROWS, ROWS]
    assert (out / "predictions.jsonl").read_bytes() == before
    assert not (out / "scores.jsonl").exists()
    assert bare.main["scores"] == {}


def test_none_is_not_zero(shared: tuple[Path, Path], functions: str, tmp_path: Path) -> None:
    block = scored(shared, tmp_path, {"path": f"{functions}:picky"}).main["scores"]["mine"]
    consistent = sum(row_of(index)["conflict"] == "consistent" for index in range(ROWS))
    assert (block["value"], block["n"], block["unscored"]) == (1.0, ROWS - consistent, consistent)
    assert block["subsets"]["consistent"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "unscored": consistent,
    }


def test_a_score_that_fails_stops_nothing_and_is_named(
    shared: tuple[Path, Path],
    functions: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = scored(
        shared,
        tmp_path,
        {"path": f"{functions}:raises", "name": "bad"},
        {"path": f"{functions}:looks", "name": "good"},
    )
    bad, good = (result.main["scores"][name] for name in ("bad", "good"))
    assert (bad["value"], bad["n"], bad["unscored"]) == (None, 0, ROWS)
    assert good["n"] == ROWS
    assert result.made["scores"]["bad"]["failed"] == ROWS
    (event,) = events(tmp_path, "score_failed")
    assert (event["score"], event["answers"]) == ("bad", ROWS)
    assert "no such clip" in event["detail"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"Score 'bad' failed on {ROWS} of {ROWS} answers (raised)" in said


@pytest.mark.parametrize(
    ("spec", "params", "said"),
    [
        ("mine.py:looks", {"ned": 1}, "did you mean 'need'"),
        ("mine.py:lookz", {}, "did you mean 'looks'"),
        ("gone.py:looks", {}, "check the path"),
        ("mine.py:needs", {}, "takes 'valence', which no row has; add that column"),
        ("mine.py:number", {}, "cannot be loaded (TypeError"),
        ("broken.py:looks", {}, "cannot be loaded (SyntaxError"),
        ("mine.py:picky", {}, "another score is also called 'mine'; give this one a 'name'"),
    ],
)
def test_a_bad_entry_is_named_before_anything_is_asked(
    shared: tuple[Path, Path],
    functions: str,
    tmp_path: Path,
    spec: str,
    params: dict[str, Any],
    said: str,
) -> None:
    folder = Path(functions).parent
    (folder / "broken.py").write_text("def looks(:\n")
    first = "mine" if "another" in said else "first"
    scores = [
        {"path": f"{functions}:looks", "name": first},
        {"path": f"{folder}/{spec}", "params": params},
    ]
    config = config_of(*shared, tmp_path / "out", scores=scores)
    for check in (run_eval, read_samples):  # the run itself, and `mmemo check`
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert str(caught.value).startswith(f"scores[1] ('{folder}/{spec}'): ")
        assert said in str(caught.value)
    assert not (tmp_path / "out/predictions.jsonl").exists()


def test_a_column_that_only_some_rows_have_is_enough(
    functions: str, shared: tuple[Path, Path], tmp_path: Path
) -> None:
    world = write_world(tmp_path / "world", ROWS)
    path = world / "test_conflict.jsonl"
    first, *others = path.read_text().splitlines()
    row = {**json.loads(first), "valence": 0.5}
    path.write_text("\n".join([json.dumps(row), *others]) + "\n")
    data = {"manifests": [str(path)], "media_root": str(world), "columns": ["valence"]}
    scores = [{"path": f"{functions}:needs"}]
    result = run_eval(config_of(world, shared[1], tmp_path / "out", data=data, scores=scores))
    assert result.main["scores"]["mine"]["value"] == 0.5
    assert result.main["scores"]["mine"]["unscored"] == ROWS - 1


def test_intervals_are_over_speakers() -> None:
    rows = invent_rows(0.5, speakers=2)
    by_speaker = [float(row["group"]["speaker"] == "t00") for row in rows]
    alike = [float(index // 2 % 2) for index in range(len(rows))]
    config = BootstrapConfig(resamples=200)
    found = score_means(rows, {"speaker": by_speaker, "alike": alike}, config)
    width = {name: one["high"] - one["low"] for name, one in found.items()}
    assert width["speaker"] > 0.99  # two speakers that differ by all: nothing is known
    assert width["alike"] < width["speaker"]
    one_speaker = [{**row, "group": {"speaker": "a"}} for row in rows]
    assert score_means(one_speaker, {"alike": alike}, config)["alike"]["low"] is None


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs with a score of one name, of which the second lacks some values."""
    ours, theirs = invent_rows(0.9)[9:], invent_rows(0.5, seed=5)[:75]
    write_evaluation(tmp_path / "a", ours, tmp_path, name="reasoned")
    write_evaluation(tmp_path / "b", theirs, tmp_path, name="plain", role="baseline")
    one = [0.6 + 0.02 * (index % 7) for index in range(len(ours))]
    other = [None if index % 5 == 0 else 0.5 for index in range(len(theirs))]
    add_scores(tmp_path / "a", {"grounding": one, "alone": one})
    add_scores(tmp_path / "b", {"grounding": other})
    return tmp_path / "a", tmp_path / "b"


def test_scores_are_compared_in_pairs_that_both_have(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    block = compare(*two)[0].tasks["emotion"]
    assert set(block["scores"]) == {"grounding"}
    found = block["scores"]["grounding"]
    pairs = [(0.6 + 0.02 * ((at - 9) % 7), 0.5) for at in range(9, 75) if at % 5]
    assert (found["n"], found["unscored"]) == (len(pairs), 66 - len(pairs))
    assert found["a"] == pytest.approx(statistics.mean(a for a, _ in pairs), abs=1e-6)
    assert found["b"] == 0.5
    assert found["value"] == pytest.approx(found["a"] - 0.5, abs=2e-6)
    assert 0 < found["low"] <= found["value"] <= found["high"]
    assert found["p"] < 0.05
    mirror = compare(*two[::-1])[0].tasks["emotion"]["scores"]["grounding"]
    assert mirror["value"] == pytest.approx(-found["value"])
    compare_runs(*two)
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "grounding" in line)
    assert f"+{found['value']:.3f}" in line
    assert all(len(line) <= 80 for line in text.splitlines())


def test_scores_made_in_other_ways_are_not_compared(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    add_scores(two[1], {"grounding": [0.5] * 75}, sha256="e" * 64)
    block = compare(*two)[0].tasks["emotion"]
    assert block["scores"] == {}
    assert block["unlike_scores"] == ["grounding"]
    compare_runs(*two)
    assert "computed them differently: grounding" in " ".join(capsys.readouterr().out.split())


def test_scores_that_do_not_fit_the_answers_are_one_sentence(two: tuple[Path, Path]) -> None:
    path = two[0] / "scores.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))
    with pytest.raises(EvaluationError, match="does not fit the answers beside it"):
        compare(*two)
    path.unlink()
    with pytest.raises(EvaluationError, match="run the evaluation"):
        compare(*two)
    assert read_results(two[0]).main["scores"]  # the means are still there


def test_the_table_and_the_report_show_them_and_how_they_were_made(
    two: tuple[Path, Path],
) -> None:
    root = two[0].parent
    runs = read_run(root).runs
    out = io.StringIO()
    Console(file=out, width=80).print(scores_table(runs))
    found = runs[0].block["scores"]["grounding"]
    line = next(line for line in out.getvalue().splitlines() if "grounding" in line)
    for part in ("reasoned", f"{found['value']:.3f}", f"{found['low']:.3f}", str(found["n"])):
        assert part in line
    page = build_report(root, root / "report.html").read_text()
    assert "Reasoning and other scores" in page
    assert 'href="#scores"' in page
    assert "<code>reward/x.py:x</code>, SHA-256 <code>dddddddddddddddd</code>, need = 2" in page
    difference = compare(*two)[0].tasks["emotion"]["scores"]["grounding"]
    assert f"<td>+{difference['value']:.3f}<small>" in page
    assert "<td>15<small>of 75</small>" in page  # unscored


def test_a_score_of_one_task_stays_out_of_the_other_s_block() -> None:
    rows = [{**row, "task": "ab"[place % 2]} for place, row in enumerate(invent_rows(0.5, n=6))]
    values = {"only_b": [None, 1.0, None, 0.0, None, 0.5], "broken": [None] * 6}
    found = task_means(rows, values, BootstrapConfig(resamples=100))
    assert set(found["a"]) == {"broken"}  # what scored nothing anywhere is not hidden
    assert set(found["b"]) == {"only_b", "broken"}
    assert (found["b"]["only_b"]["value"], found["b"]["only_b"]["unscored"]) == (0.5, 0)
