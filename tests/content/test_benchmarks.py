"""Every benchmark under ``eval/``: its size, its docstring, its row in the docs, its readers."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mmemo import content
from mmemo.answers.kinds import AnswerKind, Read
from mmemo.answers.parsing import STATUSES, LabelSet, label_set, parse
from mmemo.errors import EvaluationError
from mmemo.evaluation.task import LETTERS, Task, declared_tasks

ROOT = Path(__file__).parents[2]
FUZZED = 10_000
FILES = {
    path.relative_to(ROOT).as_posix(): found
    for path in sorted((ROOT / "eval").rglob("*.py"))
    if (found := declared_tasks(content.load_module(str(path)))) is not None
}
TASKS = [(file, name, task) for file, tasks in FILES.items() for name, task in tasks.items()]
PIECES = (
    *("<answer>", "</answer>", "<think>", "</think>", "\n", ", ", "; ", " and ", "/", ": ", "%"),
    *("not ", "happy", "sad", "HAPPY", "angry", "neutral", "无", "高兴", "悲伤", "기쁨", "राग"),
    *("A", "b.", "(C)", "yes", "no", "0.5", "-3", "−1", "1e9", "1,5", "7/10", "nan", "inf"),
    *("[", "]", "{", "}", '"', "'", "**", "1. ", "2) ", ">", "\u202e", "\x00", "\U0001f600", "½"),
    *(" " * 40, "I cannot answer that.", "I'm sorry, I can't tell.", "sorry"),
)


def test_there_are_the_benchmarks_of_the_field() -> None:
    assert len(FILES) >= 40
    assert len(TASKS) >= 100


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_and_says_how_to_run_it(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    told = ast.get_docstring(ast.parse(text)) or ""
    assert f"mmemo eval {file}" in told or f"python {file}" in told
    assert f"`mmemo eval {file}" in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_its_scorers_and_paraphrases_fit(file: str) -> None:
    for task in FILES[file].values():
        for spec in task.scorers:
            try:
                assert spec.load().metrics
            except EvaluationError as error:  # what users bring themselves
                if not re.search("emotion_wheel|jiwer", str(error)):
                    raise
        for wording in task.paraphrases:
            assert task.question is not None
            assert ("{labels}" in wording) == ("{labels}" in task.question)


def readers(task: Task) -> list[Any]:
    """What reads the answers of a task."""
    if task.answers is not None:
        return [task.answers]
    labels = task.labels
    if isinstance(labels, str) and labels in ("choices", "options"):
        return [LabelSet(tuple(LETTERS[:4]))]
    if labels == "yes_no":
        return [label_set(("yes", "no"))]
    if isinstance(labels, LabelSet | str | tuple):
        return [label_set(labels)]
    return []  # the labels of each row, which the benchmark's own tests read


def fuzz(draw: random.Random, words: list[str]) -> str:
    """A text of pieces of answers, of the labels, and of any characters."""
    parts = [
        draw.choice(words) if words and draw.random() < 0.4 else draw.choice(PIECES)
        for _ in range(draw.randrange(12))
    ]
    if draw.random() < 0.2:
        parts.append("".join(chr(draw.randrange(1, 0xD7FF)) for _ in range(draw.randrange(9))))
    return "".join(parts)


def test_no_answer_breaks_a_reader() -> None:
    each = -(-FUZZED // len(TASKS))
    tried = 0
    seen: set[str] = set()
    for file, name, task in TASKS:
        draw = random.Random(f"{file}/{name}")
        for reader in readers(task):
            own = reader if isinstance(reader, LabelSet) else getattr(reader, "labels", None)
            words = [*own.labels, *own.forms] if isinstance(own, LabelSet) else []
            for _ in range(2 * each):
                text = fuzz(draw, words)
                read: Any
                if isinstance(reader, LabelSet):
                    parsed = parse(text, reader)
                    read = Read(parsed.status, parsed.label)
                    assert (read.answer in reader.labels) == (read.status == "ok"), (file, text)
                else:
                    kind: AnswerKind = reader
                    read = kind.read(text)
                assert read.status in STATUSES, (file, text)
                assert (read.answer is not None) == (read.status == "ok"), (file, text)
                seen.add(read.status)
                tried += 1
    assert tried >= FUZZED
    assert seen == set(STATUSES)


def test_every_file_that_is_no_benchmark_is_known() -> None:
    others = {
        path.relative_to(ROOT / "eval").as_posix()
        for path in (ROOT / "eval").rglob("*.py")
        if path.relative_to(ROOT).as_posix() not in FILES
    }
    known = {"seed_table.py", "world_conflict.py", "spoken/wer.py"}
    assert {name for name in others if not re.match(r"challenge/", name)} <= known
