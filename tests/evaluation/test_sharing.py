"""Questions that share a clip, and processes that share the questions, answer as one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import save_resolved
from mmemo.evaluation import generate
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import Parts, read_predictions
from mmemo.evaluation.runner import run_eval, run_eval_stage
from mmemo.generation.questions import plan_questions
from tests.evaluation.world import config_of, save_model, write_world

ROWS = 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sharing")
    return write_world(folder / "world", ROWS), save_model(folder / "model")


def texts(folder: Path) -> dict[str, Any]:
    return {row["sample_id"]: row["raw"] for row in read_predictions(folder / "predictions.jsonl")}


def test_sharing_changes_no_answer_whatever_the_batch(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, model = shared
    calls: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[1]["input_ids"]))
        return answered(*args, **kwargs)

    answered = generate.answer_greedily
    monkeypatch.setattr(generate, "answer_greedily", watched)

    def run(name: str, size: int, **settings: Any) -> dict[str, Any]:
        calls.clear()
        config = config_of(
            world, model, tmp_path / name, per_device_eval_batch_size=size, run=settings
        )
        run_eval(config)
        return texts(tmp_path / name)

    wanted = run("off", 3, share_prefixes=False)
    assert calls == []
    assert len(set(wanted.values())) > 3
    assert run("three", 3) == wanted
    assert calls == [3, 3, 3, 1]
    assert run("all", 16) == wanted
    assert calls == [10]
    assert run("parts", 16, max_tokens_per_batch=100) == wanted
    assert len(calls) > 1
    # The same questions in another order.
    manifest = world / "test_conflict.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    other = world / "turned.jsonl"
    other.write_text("".join(reversed(lines)))
    data = {"manifests": [str(other)], "media_root": str(world)}
    config = config_of(world, model, tmp_path / "turned", data=data, per_device_eval_batch_size=4)
    run_eval(config)
    assert texts(tmp_path / "turned") == wanted


def test_what_changes_probabilities_is_left_to_generate(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, model = shared

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(generate, "answer_greedily", never)
    for name, changes in {
        "sampled": {"do_sample": True},
        "penalty": {"repetition_penalty": 1.2},
        "changed": {"reallocation": {"layers": [0, 1]}},
        "contrast": {"contrast": {}},
    }.items():
        generation = {"max_new_tokens": 2, **changes}
        run_eval(config_of(world, model, tmp_path / name, generation=generation))


def test_processes_share_the_batches_and_one_finishes(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, model = shared
    run_eval(config_of(world, model, tmp_path / "whole"))
    asked: list[list[str]] = []
    plain = AnswerGenerator.answer

    def watched(self: Any, questions: Sequence[Question], draw: str) -> Any:
        asked.append([question.sample.sample_id for question in questions])
        return plain(self, questions, draw)

    monkeypatch.setattr(AnswerGenerator, "answer", watched)
    config = config_of(world, model, tmp_path / "split")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert run_eval_stage(config) is None
    names = [f"test-{index:03d}" for index in range(ROWS)]
    assert asked == [names[6:9], names[:3], names[9:], names[3:6]]
    assert not (tmp_path / "split/predictions.jsonl").exists()
    # A torn line is answered again, with the rest of its batch.
    part = tmp_path / "split/parts/predictions-2.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    asked.clear()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run_eval_stage(config) is not None
    assert asked == [names[6:9]]
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert Parts(tmp_path / "split/predictions.jsonl").read() == {}


@pytest.mark.distributed
def test_two_processes_give_the_bytes_of_one(shared: tuple[Path, Path], tmp_path: Path) -> None:
    world, model = shared
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        config = config_of(world, model, tmp_path / name)
        save_resolved(config, tmp_path / f"{name}.yaml")
        command = [sys.executable, "-m", "mmemo.cli", "eval", str(tmp_path / f"{name}.yaml"), *more]
        subprocess.run(command, check=True, capture_output=True)
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    events = (tmp_path / "two/events.jsonl").read_text().splitlines()
    done = [json.loads(line) for line in events]
    assert sum(event["kind"] == "stage" for event in done) == 1


def test_batches_have_a_budget() -> None:
    prompts = [[1, 2, 3, 4], [7, 8, 9], [1, 2, 3, 5], [7, 8], [1, 2, 6, 6]]
    clips = ["a", "b", "a", "b", "a"]
    assert plan_questions(prompts, clips, 10, None) == [[0, 2, 4, 1, 3]]
    # Two of clip a have 2 + 2 * (2 + 10) tokens, and a third makes 38.
    assert plan_questions(prompts, clips, 10, 26) == [[0, 2], [4], [1, 3]]
    assert plan_questions(prompts, clips, 10, 1) == [[0], [2], [4], [1], [3]]
    assert plan_questions(prompts, clips, 10, 38)[0] == [0, 2, 4]
    assert plan_questions([], [], 10, 5) == []
