"""The numbers of each reading: by hand, against scikit-learn, and what a missing answer does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import pytest
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, recall_score

from mmemo.answers.parsing import LabelSet, Parsed, parse, yes_no
from mmemo.data.sample import MediaRef, Sample, Turn
from mmemo.evaluation import tables
from mmemo.evaluation.benchmark import Question, Reading
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult, EvaluatedRun
from mmemo.evaluation.scoring import score_readings
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=200)
LETTERS = LabelSet(("A", "B"))


def question(task: str, truth: str, number: int) -> Question:
    sample = Sample(f"{task}-{number}", (Turn("user", "?"),), {"video": MediaRef(f"{number}.mp4")})
    return Question(sample, sample.turns, task, LETTERS if task == "choice" else yes_no(), truth)


def answered(one: Question, raw: str) -> Row:
    assert one.labels is not None
    parsed = parse(raw, one.labels)
    return {**one.row(), "raw": raw, "status": parsed.status, "answer": parsed.label}


def generous(raw: str, one: Question) -> Parsed:
    return Parsed("ok", one.truth, raw)


def reading(missing: Literal["wrong", "skipped"], **changes: Any) -> Reading:
    return replace(Reading("plain", "as always", missing), **changes)


QUESTIONS = [
    *(question("choice", "A", number) for number in range(4)),
    *(question("agree", ("yes", "no")[number % 2], number) for number in range(10)),
]


def test_by_hand() -> None:
    said = ["A", "A", "A", "B", "yes", "yes", "yes", "no", "no", "maybe", "no", "yes", "yes", "no"]
    rows = [answered(one, raw) for one, raw in zip(QUESTIONS, said, strict=True)]
    block = score_readings([reading("wrong")], QUESTIONS, rows, CONFIG)["plain"]
    assert (block["parser"], block["missing"]) == ("as always", "wrong")
    assert block["tasks"]["choice"]["accuracy"]["value"] == 0.75
    assert "yes_no" not in block["tasks"]["choice"]
    agree = block["tasks"]["agree"]  # yes: 3 of 5 right; no: 2 of 5 right, 2 said yes, 1 unread
    assert agree["accuracy"]["value"] == 0.5
    found = {name: one["value"] for name, one in agree["yes_no"].items()}
    assert found == {
        "accuracy_yes": 0.6,
        "accuracy_no": 0.4,
        "harmonic_mean": pytest.approx(0.48),
        "f1": pytest.approx(6 / 10, abs=1e-6),  # precision 3 of 5, recall 3 of 5
        "yes_rate": 0.5,
    }
    assert block["mean"]["value"] == pytest.approx((0.75 + 0.5) / 2)  # not 8 of 14
    assert block["mean"]["low"] < block["mean"]["value"] < block["mean"]["high"]
    assert block["mean"]["n"] == 14


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_scikit_learn_s(seed: int) -> None:
    draw = random.Random(seed)
    asked = [question("agree", draw.choice(["yes", "no"]), number) for number in range(40)]
    rows = [answered(one, draw.choice(["yes", "yes", "no", "perhaps"])) for one in asked]
    block = score_readings([reading("wrong")], asked, rows, CONFIG)["plain"]["tasks"]["agree"]
    truth, said = [one.truth for one in asked], [str(row["answer"]) for row in rows]
    recall = recall_score(truth, said, labels=["yes", "no"], average=None)
    binary = [one == "yes" for one in truth], [one == "yes" for one in said]
    expected = {
        "accuracy_yes": recall[0],
        "accuracy_no": recall[1],
        "harmonic_mean": 2 * recall[0] * recall[1] / (recall[0] + recall[1]),
        "f1": f1_score(*binary),
        "yes_rate": sum(binary[1]) / 40,
    }
    found = {name: one["value"] for name, one in block["yes_no"].items()}
    assert found == pytest.approx(expected, abs=1e-6)
    assert block["accuracy"]["value"] == pytest.approx(accuracy_score(truth, said))


def test_a_missing_answer_is_wrong_or_skipped_and_counted() -> None:
    rows = [answered(one, one.truth) for one in QUESTIONS][1:-2]  # one choice, a yes and a no
    readings = [reading("wrong", name="w"), reading("skipped", name="s")]
    found = score_readings(readings, QUESTIONS, rows, CONFIG)
    for block in found.values():
        assert [task["missing"] for task in block["tasks"].values()] == [1, 2]
    wrong, skipped = found["w"], found["s"]
    assert wrong["tasks"]["choice"]["accuracy"]["value"] == 0.75
    assert wrong["tasks"]["agree"]["yes_no"]["accuracy_no"]["value"] == 0.8
    assert wrong["tasks"]["agree"]["yes_no"]["yes_rate"]["value"] == 0.4
    assert wrong["mean"]["value"] == pytest.approx(0.775)
    assert (skipped["mean"]["value"], skipped["mean"]["n"]) == (1.0, 11)
    assert skipped["tasks"]["agree"]["n"] == 8


def test_a_task_without_any_answer_leaves_no_mean_of_what_is_skipped() -> None:
    rows = [answered(one, one.truth) for one in QUESTIONS if one.task == "agree"]
    readings = [reading("wrong", name="w"), reading("skipped", name="s")]
    found = score_readings(readings, QUESTIONS, rows, CONFIG)
    assert found["w"]["mean"]["value"] == 0.5
    assert found["s"]["mean"]["value"] is None
    assert found["s"]["tasks"]["choice"]["accuracy"]["value"] is None


def test_a_reading_reads_the_same_answers_in_its_own_way() -> None:
    rows = [answered(one, "well") for one in QUESTIONS]
    readings = [reading("wrong"), reading("wrong", name="generous", read=generous)]
    found = score_readings(readings, QUESTIONS, rows, CONFIG)
    assert (found["plain"]["mean"]["value"], found["generous"]["mean"]["value"]) == (0.0, 1.0)
    assert {row["status"] for row in rows} == {"malformed"}  # unchanged


def test_open_questions_are_left_out() -> None:
    one = replace(question("open", "any words", 0), labels=None)
    found = score_readings([reading("wrong")], [one, *QUESTIONS], [], CONFIG)
    assert list(found["plain"]["tasks"]) == ["choice", "agree"]


def run_of(name: str, parser: str, tmp_path: Any) -> EvaluatedRun:
    rows = [answered(one, one.truth) for one in QUESTIONS][1:]
    readings = score_readings([reading("wrong", parser=parser)], QUESTIONS, rows, CONFIG)
    values = {"name": name, "role": "model", "readings": readings}
    made = {"bootstrap": CONFIG.model_dump()}
    return EvaluatedRun(name, "model", {}, EvalResult(tmp_path, {**values, "made": made}))


def test_runs_that_were_read_by_other_parsers_share_no_table(tmp_path: Any) -> None:
    runs = [run_of("first", "new", tmp_path), run_of("second", "old", tmp_path)]
    runs.append(run_of("third", "new", tmp_path))
    assert tables.readings_of(runs) == [("plain", "new"), ("plain", "old")]
    printed: list[str] = []
    for one in tables.readings_of(runs):
        console = Console(width=100)
        with console.capture() as capture:
            console.print(tables.readings_table(runs, *one))
        printed.append(capture.get())
    words = " ".join(printed[0].split())
    assert all(name in words for name in ("plain (new)", "first", "third", "they count as wrong"))
    assert "second" not in printed[0]
    assert "second" in printed[1]
    assert "first" not in printed[1]
    mean = next(line for line in printed[0].splitlines() if line.split()[:1] == ["Mean"])
    assert mean.split() == ["Mean", "87.5", "14", "1"]  # 3 of 4, and 10 of 10
