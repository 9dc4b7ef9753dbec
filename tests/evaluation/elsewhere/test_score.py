"""``mmemo score``: predictions made elsewhere become an evaluation like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.errors import ConfigError, DataError, EvaluationError, MmemoError
from mmemo.evaluation.elsewhere.score import UNMATCHED
from mmemo.evaluation.results import EvalResult, compare, read_results
from mmemo.report.page import build_report

FILE = '''
"""A benchmark of every kind of answer, whose release has no clips beside its list."""

import json

from mmemo.answers.kinds import Numbers, Several, Text
from mmemo.answers.parsing import label_set
from mmemo.data.adapter import Excluded
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
FOUR = ("happy", "sad", "angry", "neutral")


def right_of_answered(rows):
    """The share of right answers among those that were given, as a careless scorer counts."""
    given = [row for row in rows if row["status"] == "ok"]
    right = sum(row["answer"] == row["truth"] for row in given)
    return {"hit": right / max(1, len(given)), "rows": len(rows)}


TASKS = {
    "emotion": Task(labels=FOUR, question="Which? {labels}", official=right_of_answered),
    "choice": Task(labels="choices"),
    "valence": Task(answers=Numbers(-3, 3), question="?", scorers=(use("numbers"),)),
    "all": Task(answers=Several(label_set(FOUR)), question="?", official=right_of_answered),
    "words": Task(answers=Text(), question="?"),
}


def rows(root, *, part="all"):
    for line in (root / "list.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("label") == "bored":
            yield Excluded(row["sample_id"], "label outside the set", "bored")
        elif part in ("all", row.get("task", "emotion")):
            yield row
'''
CLIPS = ["test/dia0_utt0.mp4", "test/dia0_utt1.mp4", "test/00042.mp4", "test/Dia7.mp4"]


def listed() -> list[dict[str, Any]]:
    labels = ["happy", "sad", "angry", "neutral"]
    rows: list[dict[str, Any]] = [
        {"sample_id": f"e{place}", "prompt": "<video>?", "videos": [clip], "label": label,
         "group": {"speaker": f"s{place % 2}"}}
        for place, (clip, label) in enumerate(zip(CLIPS, labels, strict=True))
    ]  # fmt: skip
    clip = {"prompt": "<video>?", "videos": ["test/other.mp4"]}
    rows.append({**clip, "sample_id": "bad", "label": "bored"})
    rows.append({**clip, "sample_id": "c0", "task": "choice", "choices": ["a man", "a woman"],
                 "gold": "a woman"})  # fmt: skip
    for place, number in enumerate((-1, 0, 2)):
        rows.append({**clip, "sample_id": f"v{place}", "task": "valence", "gold": number})
    rows.append({**clip, "sample_id": "l0", "task": "all", "gold": ["happy", "sad"]})
    rows.append({**clip, "sample_id": "t0", "task": "words", "gold": ["She is calm."]})
    return rows


GIVEN: list[dict[str, Any]] = [
    {"sample_id": "e0", "raw": "<think>sad?</think><answer>Happy</answer>"},
    {"sample_id": "videos/DIA0_UTT1.avi", "raw": "happy"},
    {"sample_id": 42, "raw": "I cannot tell."},
    {"sample_id": "c0", "raw": "a woman"},
    {"sample_id": "v0", "answer": -1.0},
    {"sample_id": "v1", "answer": "about 1"},
    {"sample_id": "v2", "answer": 2},
    {"sample_id": "l0", "answer": ["sad", "happy"]},
    {"sample_id": "t0", "answer": "She rests."},
    {"sample_id": "e9", "raw": "sad"},
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """The folder of a benchmark's file and of its release, which lacks all clips."""
    (tmp_path / "bench.py").write_text(FILE)
    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) + "\n" for row in listed()]
    (tmp_path / "data/list.jsonl").write_text("".join(lines))
    return tmp_path


def score(bench: Path, rows: list[dict[str, Any]] | str, *more: str) -> EvalResult:
    """Score some predictions through the command line."""
    file, out = bench / "p.jsonl", bench / "out"
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text)
    arguments = ["--benchmark", str(bench / "bench.py"), "--data", str(bench / "data")]
    arguments = [] if "--labels" in more else arguments
    done = CliRunner().invoke(
        app, ["score", str(file), *arguments, "--output-dir", str(out), *more]
    )
    if isinstance(done.exception, MmemoError):
        raise done.exception
    assert done.exit_code == 0, done.output
    (bench / "told.txt").write_text(" ".join(done.output.split()))
    return read_results(out)


def test_all_kinds_of_answers_are_matched_read_and_scored(bench: Path) -> None:
    result = score(bench, GIVEN, "--name", "theirs")
    rows = {row["sample_id"]: row for row in result.rows()}
    assert {name: (row["status"], row["answer"]) for name, row in rows.items()} == {
        "e0": ("ok", "happy"),
        "e1": ("ok", "happy"),
        "e2": ("refused", None),
        "e3": ("malformed", None),
        "c0": ("ok", "B"),
        "v0": ("ok", -1.0),
        "v1": ("ok", 1.0),
        "v2": ("ok", 2.0),
        "l0": ("ok", ["happy", "sad"]),
        "t0": ("ok", None),  # nothing rates it
    }
    assert [name for name, row in rows.items() if row.get("unanswered")] == ["e3"]
    # One of four is right: a question without a prediction is a wrong answer.
    assert result.tasks["emotion"]["metrics"]["war"]["value"] == 0.25
    assert result.values["bounds"] == {"asked": 4, "worst": 0.25, "best": 0.75}
    # The released scorer sees only what the file holds.
    assert result.tasks["emotion"]["official"] == {"hit": 0.5, "rows": 3}
    assert result.tasks["valence"]["scored"]["mae"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    made = result.made["elsewhere"]
    assert made["matched"] == {"id": 7, "file": 1, "number": 1}
    assert (made["format"], made["predictions"], made["unmatched"]) == ("jsonl", 10, 1)
    assert (made["unanswered"], made["empty"], made["unlike_truths"]) == (1, 0, 0)
    assert len(made["sha256"]) == 64
    assert result.values["excluded"]["rows"] == {"label outside the set": 1}
    left = [json.loads(line) for line in (bench / "out" / UNMATCHED).read_text().splitlines()]
    assert left == [
        {"prediction": "line 10", "ids": ["e9"], "reason": "has no question"},
        {"question": "e3", "reason": "has no prediction"},
    ]
    told = (bench / "told.txt").read_text()
    assert "1 question without a prediction, which count as wrong: e3" in told
    assert "1 prediction without a question, which count nowhere: line 10 ('e9')" in told


def test_the_folder_is_taken_by_the_other_commands(bench: Path) -> None:
    score(bench, GIVEN)
    (bench / "out").rename(bench / "first")
    score(bench, [{**row, "raw": "sad"} for row in GIVEN[:4]] + GIVEN[4:])
    (found,) = compare(bench / "first", bench / "out")
    assert found.tasks["emotion"]["differences"]["war"]["a"] == 0.25
    assert found.tasks["valence"]["scored"]["mae"]["value"] == 0
    page = build_report(bench / "first", bench / "report.html").read_text()
    assert "made elsewhere, read from" in page
    # Scoring again replaces the folder, but never the evaluation of a model.
    values = json.loads((bench / "out/results.json").read_text())
    del values["made"]["elsewhere"]
    (bench / "out/results.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="holds the evaluation of a model"):
        score(bench, GIVEN)


def test_options_reach_the_adapter_and_manifests_do_without_it(bench: Path) -> None:
    result = score(bench, GIVEN[:3], "--option", "part=emotion")
    assert list(result.tasks) == ["emotion"]
    manifest = bench / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in listed()[:2]))
    file, out = bench / "p.jsonl", bench / "out"
    given = ["--benchmark", str(bench / "bench.py"), "--manifest", str(manifest)]
    done = CliRunner().invoke(app, ["score", str(file), *given, "--output-dir", str(out)])
    assert done.exit_code == 0, done.output
    assert read_results(out).values["n"] == 2


def test_one_answer_to_a_question(bench: Path) -> None:
    twice = [*GIVEN, {"sample_id": "x/dia0_utt0", "raw": GIVEN[0]["raw"]}]
    assert score(bench, twice).made["elsewhere"]["repeated"] == 1
    other = [*GIVEN, {"sample_id": "x/dia0_utt0.wav", "raw": "sad"}]
    with pytest.raises(DataError, match=r"line 1 \('e0'\) and line 11 .* 'e0' differently"):
        score(bench, other)


def test_a_clip_of_several_questions_needs_the_task(bench: Path) -> None:
    shared = [{"sample_id": "other.mp4", "raw": "a man"}, *GIVEN[:1]]
    result = score(bench, shared)
    assert result.made["elsewhere"]["unmatched"] == 1
    assert "fits 6 questions" in (bench / "told.txt").read_text()
    shared[0]["task"] = "choice"
    result = score(bench, shared)
    assert result.made["elsewhere"]["matched"] == {"file": 1, "id": 1}
    assert result.tasks["choice"]["metrics"]["war"]["value"] == 0.0


def test_position_only_when_asked_and_where_it_can_be_right(bench: Path) -> None:
    texts = ["happy", "sad", "angry", "neutral", "B", "-1", "0", "2", "happy, sad", "calm"]
    nameless = [
        {"doc_id": place, "doc": {}, "target": "", "resps": [[text]]}
        for place, text in enumerate(texts)
    ]
    with pytest.raises(DataError, match=r"no prediction has the id .*--by-position"):
        score(bench, nameless)
    result = score(bench, nameless, "--by-position")
    assert result.made["elsewhere"]["matched"] == {"position": 10}
    assert result.tasks["emotion"]["metrics"]["war"]["value"] == 1.0
    with pytest.raises(DataError, match="9 predictions for 10 questions"):
        score(bench, nameless[1:], "--by-position")
    turned = [{**row, "target": "sad"} for row in nameless]
    with pytest.raises(DataError, match=r"line 1 has another truth .* 2 others"):
        score(bench, turned, "--by-position")
    named = [{**row, "doc": {"id": "e1"}} if row["doc_id"] == 0 else row for row in nameless]
    with pytest.raises(DataError, match="is at the position of the question 'e0'"):
        score(bench, named, "--by-position")


def test_what_mmemo_wrote_is_scored_alike(bench: Path) -> None:
    first = score(bench, GIVEN)
    written = (bench / "out/predictions.jsonl").read_text()
    again = score(bench, written)
    # An answer that is missing there is an empty one here; both are wrong.
    assert again.made["elsewhere"]["unanswered"] == 0
    assert again.made["elsewhere"]["unlike_truths"] == 0
    for task, block in first.tasks.items():
        assert {**again.tasks[task], "official": 0} == {**block, "official": 0}


def test_half_a_character_ends_nothing(bench: Path) -> None:
    result = score(bench, [{"sample_id": "e0", "raw": "happy \ud800"}, *GIVEN[3:4]])
    assert result.rows()[0]["raw"] == "happy ?"


def test_another_truth_is_told(bench: Path) -> None:
    rows = [{**row, "truth": "sad"} for row in GIVEN[:2]]
    assert score(bench, rows).made["elsewhere"]["unlike_truths"] == 1
    assert (
        "gives another right answer than the benchmark: line 1 ('e0')"
        in (bench / "told.txt").read_text()
    )
    (choice,) = [{**GIVEN[3], "truth": "a woman"}]
    assert score(bench, [choice]).made["elsewhere"]["unlike_truths"] == 0


def test_a_table_with_truths_needs_no_benchmark(bench: Path) -> None:
    table = (
        "sample_id,truth,prediction,speaker,gender\n"
        "a,1,happy,s1,f\nb,Sad,2,s1,f\nc,anger,furious,s2,m\nd,7,<answer>fear</answer>,s2,m\n"
        "e,bored,sad,s2,m\nf,,sad,s2,m\ng,Neutral,,s3,m\n"
    )
    result = score(bench, table, "--labels", "dfew")
    # happy, sad and fear are right; "furious" is no form of anger in this set; g has no text.
    assert result.main["metrics"]["war"]["value"] == 0.6
    assert result.main["metrics"]["uar"]["value"] == 0.6
    assert result.main["clusters"] == 3
    assert result.values["excluded"]["rows"] == {"label outside the set": 1, "no truth": 1}
    assert set(result.main["groups"]) == {"gender"}
    assert result.made["benchmark"]["file"] == "labels:dfew"
    listed = score(bench, "id,label,pred\na,up,up\nb,down,up\n", "--labels", "up, down")
    assert listed.main["metrics"]["war"]["value"] == 0.5
    with pytest.raises(EvaluationError, match="add a column 'truth'"):
        score(bench, "id,pred\na,up\n", "--labels", "up,down")
    with pytest.raises(EvaluationError, match="has another truth"):
        score(bench, "id,truth,pred\na,up,up\na,down,up\n", "--labels", "up,down")
    with pytest.raises(EvaluationError, match="did you mean 'dfew'"):
        score(bench, "id,truth,pred\na,up,up\n", "--labels", "dfw")


def test_what_does_not_go_together_is_one_sentence(bench: Path) -> None:
    run = CliRunner().invoke
    for more, told in (
        ([], "give either --benchmark"),
        (["--benchmark", "eval/ca_mer.py"], "give the questions"),
        (["--labels", "dfew", "--data", "x"], "leave out --data"),
        (["--benchmark", "a", "--labels", "dfew", "--data", "x"], "give either"),
    ):
        done = run(app, ["score", str(bench / "bench.py"), *more])
        assert isinstance(done.exception, ConfigError)
        assert told in str(done.exception)
