"""The same questions in other words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmemo.data.manifest import DataConfig
from mmemo.errors import EvaluationError
from mmemo.evaluation.benchmark import Benchmark, Question, load_benchmark
from mmemo.evaluation.controls.wording import reword, wording_record

FILE = """
from mmemo.evaluation.task import Task

TASKS = {
    "own": Task(labels=("happy", "sad"), question="Which emotion? One of {labels}.",
                paraphrases=("What does the person feel: {labels}?", "Name it ({labels}).",
                             "Third: {labels}")),
    "one": Task(labels=("happy", "sad"), question="Which one? {labels}",
                paraphrases=("Say {labels}.",)),
    "row": Task(labels="choices"),
}
"""


def asked(tmp_path: Path, text: str = FILE) -> tuple[Benchmark, list[Question]]:
    file, manifest = tmp_path / "bench.py", tmp_path / "m.jsonl"
    file.write_text(text)
    base = {"videos": ["a.mp4"], "label": "sad"}
    rows = [
        {**base, "sample_id": "a", "prompt": "<video>?", "task": "own"},
        {**base, "sample_id": "b", "prompt": "<video>?", "task": "one"},
        {
            "sample_id": "c",
            "prompt": "<video> Who speaks?",
            "videos": ["a.mp4"],
            "task": "row",
            "choices": ["he", "she"],
            "gold": "he",
        },
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load_benchmark(str(file))
    return benchmark, benchmark.questions(DataConfig(manifests=[str(manifest)]))


def texts(questions: list[Question]) -> list[str]:
    return [question.turns[-1].text for question in questions]


def test_paraphrases_of_the_task_come_first_and_the_engine_frames_the_rest(tmp_path: Path) -> None:
    benchmark, questions = asked(tmp_path)
    assert reword(benchmark, questions, 0) == questions
    own, one, row = texts(reword(benchmark, questions, 1))
    assert own == "<video>What does the person feel: happy, sad?"
    assert one == "<video>Say happy, sad."
    assert row == (
        "<video> Please answer this question about what you are given.\nWho speaks?\nA. he\nB. she"
    )
    own, one, row = texts(reword(benchmark, questions, 2))
    assert own == "<video>Name it (happy, sad)."
    assert one.startswith("<video>Which one? happy, sad\nTake everything into account")
    assert row.startswith("<video> Who speaks?\nA. he\nB. she\nTake everything")
    record = wording_record(benchmark, questions, 2)
    assert record == {"number": 2, "by": {"own": "benchmark", "one": "engine", "row": "engine"}}
    for question in reword(benchmark, questions, 1):
        assert question.sample.turns == question.turns
        assert question.truth == {"row": "A"}.get(question.task, "sad")


def test_a_wording_that_is_not_there(tmp_path: Path) -> None:
    benchmark, questions = asked(tmp_path)
    assert texts(reword(benchmark, questions[:1], 3)) == ["<video>Third: happy, sad"]
    with pytest.raises(EvaluationError, match="task 'one' has no wording 3; choose one below 3"):
        reword(benchmark, questions, 3)


def test_a_paraphrase_must_list_the_labels_too(tmp_path: Path) -> None:
    benchmark, questions = asked(tmp_path, FILE.replace("Name it ({labels})", "Name it"))
    with pytest.raises(EvaluationError, match="paraphrase 2 of task 'own' does not list"):
        reword(benchmark, questions, 2)
