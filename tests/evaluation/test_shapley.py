"""Shapley values: the axioms on any game, and the coalitions of a real prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question, load_benchmark
from mmemo.evaluation.config import AnswerGenerationConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.reliance import shapley
from mmemo.evaluation.reliance.shapley import (
    PLAYERS,
    ShapleyEvaluator,
    coalition,
    named,
    players_of,
    shapley_values,
    subsets,
)
from mmemo.media.config import DecodeConfig
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.evaluation.world import save_model, write_world
from tests.models import chat_templates
from tests.models.native_files import FED, save_omni

PARTS = list(subsets(PLAYERS))
GAMES = st.lists(st.floats(-50, 50), min_size=len(PARTS), max_size=len(PARTS))
INSTRUCTION = "Answer with one of these: {labels}."


def game(values: list[float]) -> dict[frozenset[str], float]:
    return dict(zip(PARTS, values, strict=True))


def test_all_subsets_come_once() -> None:
    assert len(PARTS) == len(set(PARTS)) == 16
    assert PARTS[0] == frozenset()
    assert PARTS[-1] == frozenset(PLAYERS)
    assert len({named(part) for part in PARTS}) == 16


@settings(deadline=None)
@given(GAMES)
def test_values_add_up_to_all_less_none(values: list[float]) -> None:
    worth = game(values)
    found = shapley_values(PLAYERS, worth)
    total = worth[frozenset(PLAYERS)] - worth[frozenset()]
    assert sum(found.values()) == pytest.approx(total, abs=1e-9)


@settings(deadline=None)
@given(GAMES)
def test_players_that_can_stand_for_each_other_get_the_same(values: list[float]) -> None:
    worth = game(values)

    def exchanged(part: frozenset[str]) -> frozenset[str]:
        other = {"audio": "video", "video": "audio"}
        return frozenset(other.get(name, name) for name in part)

    even = {part: (worth[part] + worth[exchanged(part)]) / 2 for part in PARTS}
    found = shapley_values(PLAYERS, even)
    assert found["audio"] == pytest.approx(found["video"], abs=1e-9)
    turned = shapley_values(PLAYERS, {exchanged(part): worth[part] for part in PARTS})
    assert turned["audio"] == pytest.approx(shapley_values(PLAYERS, worth)["video"], abs=1e-9)


@settings(deadline=None)
@given(GAMES, st.floats(-5, 5))
def test_a_player_that_adds_the_same_to_all_gets_just_that(values: list[float], own: float) -> None:
    rest = game(values)
    worth = {part: rest[part - {"face"}] + own * ("face" in part) for part in PARTS}
    assert shapley_values(PLAYERS, worth)["face"] == pytest.approx(own, abs=1e-9)


@settings(deadline=None)
@given(GAMES, GAMES)
def test_values_of_a_sum_are_the_sums_of_values(one: list[float], other: list[float]) -> None:
    both = game([a + b for a, b in zip(one, other, strict=True)])
    first, second = shapley_values(PLAYERS, game(one)), shapley_values(PLAYERS, game(other))
    for player, value in shapley_values(PLAYERS, both).items():
        assert value == pytest.approx(first[player] + second[player], abs=1e-9)


def test_a_game_that_is_solved_by_hand() -> None:
    """Only audio and video together are worth something: each gets half."""
    worth = {part: 6.0 * ({"audio", "video"} <= part) for part in PARTS}
    found = shapley_values(PLAYERS, worth)
    assert found == pytest.approx({"video": 3.0, "audio": 3.0, "face": 0.0, "text": 0.0})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), 4)


def questions(world: Path, modalities: list[str] | None = None) -> list[Question]:
    data = DataConfig.model_validate(
        {
            "manifests": [str(world / "test_conflict.jsonl")],
            "media_root": str(world),
            "modalities": modalities,
        }
    )
    return load_benchmark("eval/world_conflict.py").questions(data)


def generator_of(loaded: Loaded, world: Path, asked: list[Question]) -> AnswerGenerator:
    return AnswerGenerator(
        loaded,
        [question.sample for question in asked],
        None,
        world,
        DecodeConfig(workers=1),
        generation=AnswerGenerationConfig(),
        seed=0,
        max_length=None,
    )


@pytest.fixture(scope="module")
def composed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnswerGenerator]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    with generator_of(load(folder), world, questions(world)) as found:
        yield found


def load(folder: Path, **changes: Any) -> Loaded:
    return load_model(parse(ModelConfig, {"path": str(folder), **changes}))


def text_of(sample: Sample) -> str:
    return "".join(turn.text for turn in sample.turns)


def test_an_absent_modality_is_not_in_the_prompt(world: Path) -> None:
    question = questions(world)[0]
    system = Turn("system", "You hear: I am fine.")
    question = Question(
        question.sample, (system, *question.turns), question.task, question.labels, question.truth
    )
    assert players_of(question) == ["video", "audio", "face", "text"]
    for part in PARTS:
        sample = coalition(question, part, INSTRUCTION)
        assert set(sample.media) == part - {"text"}
        for name in ("video", "audio", "face"):
            assert (f"<{name}>" in text_of(sample)) == (name in part)
        said = "I am fine" in text_of(sample) and "Which emotion" in text_of(sample)
        assert said == ("text" in part)
        asked = "Answer with one of these: happy, sad, angry, fear, surprise, neutral."
        assert (asked in text_of(sample)) == ("text" not in part)
    assert coalition(question, frozenset(PLAYERS), INSTRUCTION).turns == question.turns


def shapley_evaluator(generator: AnswerGenerator, batch_size: int = 16) -> ShapleyEvaluator:
    form = "<answer>{label}</answer>"
    return ShapleyEvaluator(generator, instruction=INSTRUCTION, answer=form, batch_size=batch_size)


def direct(generator: AnswerGenerator, question: Question, reasoning: str = "") -> float:
    """The right label's log-probability among the labels, each by an ordinary forward."""
    model: Any = generator.model
    totals: list[float] = []
    for label in question.labels.labels:
        turn = Turn("assistant", f"{reasoning}<answer>{label}</answer>")
        sample = Sample("x", (*question.turns, turn), question.sample.media)
        batch = generator._collate([sample])  # pyright: ignore[reportPrivateUsage]
        with torch.inference_mode():
            logps = model.logits(batch).float().log_softmax(-1)[0]
        places = (batch["labels"][0] != -100).nonzero().flatten().tolist()
        ids = batch["input_ids"][0].tolist()
        totals.append(math.fsum(float(logps[place - 1, ids[place]]) for place in places))
    right = totals[question.labels.labels.index(question.truth)]
    return -math.log(math.fsum(math.exp(total - right) for total in totals))


def test_worth_is_the_log_probability_of_the_label(composed: AnswerGenerator, world: Path) -> None:
    question = questions(world)[1]
    found = shapley_evaluator(composed).value(question, "x")
    assert len(found["worth"]) == 16
    sets = {
        frozenset[str]() if name == "none" else frozenset(name.split("+")): value
        for name, value in found["worth"].items()
    }
    assert found["shapley"] == pytest.approx(shapley_values(found["players"], sets), abs=1e-5)
    assert len({round(value, 3) for value in found["worth"].values()}) > 8
    expected = direct(composed, question)
    assert found["worth"]["video+audio+face+text"] == pytest.approx(expected, abs=1e-3)


REASONING = "<think>The brows are low and the voice is loud.</think>"


@pytest.mark.parametrize("said", [f"{REASONING}<answer>angry</answer>", REASONING, REASONING[:-8]])
def test_answers_come_behind_what_the_model_says_first(
    composed: AnswerGenerator, world: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Its whole answer, its reasoning alone, and its reasoning cut off."""
    question = questions(world)[1]
    tokens = composed.processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(composed, "generate_ids", lambda samples, draw: [tokens] * len(samples))
    found = shapley_evaluator(composed).value(question, "x")["worth"]["video+audio+face+text"]
    assert found == pytest.approx(direct(composed, question, REASONING), abs=1e-3)
    assert found != pytest.approx(direct(composed, question), abs=1e-2)


@pytest.mark.parametrize("said", [f"{REASONING}<answer>angry</answer>", REASONING, REASONING[:-8]])
def test_reasoning_that_the_prompt_opens_is_closed_once(
    composed: AnswerGenerator, world: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(composed.processor, "chat_template", chat_templates.PREFILLED)
    monkeypatch.setattr(composed, "opened", composed.processor.opened)
    question, written = questions(world)[1], said.removeprefix("<think>")
    tokens = composed.processor.tokenizer(written, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(composed, "generate_ids", lambda samples, draw: [tokens] * len(samples))
    found = shapley_evaluator(composed).value(question, "x")["worth"]["video+audio+face+text"]
    assert found == pytest.approx(direct(composed, question, REASONING), abs=1e-3)


def test_the_labels_share_the_probability(composed: AnswerGenerator, world: Path) -> None:
    question = questions(world)[0]
    worths = [
        shapley_evaluator(composed).value(replace(question, truth=label), "x")["worth"]
        for label in question.labels.labels
    ]
    for name in worths[0]:
        assert math.fsum(math.exp(worth[name]) for worth in worths) == pytest.approx(1, abs=1e-4)


def test_models_that_cannot_share_prompts_have_the_same_values(
    composed: AnswerGenerator, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = questions(world)[2]
    shared = shapley_evaluator(composed).value(question, "x")["worth"]

    def refuse(*_: Any) -> None:
        raise ConfigError("the language model has layers that do not see the whole text")

    monkeypatch.setattr(shapley, "packed_logps", refuse)
    assert shapley_evaluator(composed).value(question, "x")["worth"] == pytest.approx(
        shared, abs=1e-4
    )


def test_values_do_not_depend_on_the_batch(composed: AnswerGenerator, world: Path) -> None:
    question = questions(world)[0]
    together, apart = (shapley_evaluator(composed, size).value(question, "x") for size in (16, 3))
    assert together["worth"] == pytest.approx(apart["worth"], abs=1e-4)


def test_streams_that_a_row_lacks_do_not_play(composed: AnswerGenerator, world: Path) -> None:
    question = questions(world, ["audio"])[0]
    found = shapley_evaluator(composed).value(question, "x")
    assert found["players"] == ["audio", "text"]
    assert set(found["worth"]) == {"none", "audio", "text", "audio+text"}


def test_a_native_model(world: Path, tmp_path: Path) -> None:
    loaded = load(save_omni(tmp_path / "omni"), native=FED, sampling={"frames": 4})
    asked = questions(world, ["video", "audio"])
    with generator_of(loaded, world, asked) as generator:
        found = shapley_evaluator(generator).value(asked[0], "x")
        expected = direct(generator, asked[0])
    assert found["players"] == ["video", "audio", "text"]
    total = found["worth"]["video+audio+text"] - found["worth"]["none"]
    assert sum(found["shapley"].values()) == pytest.approx(total, abs=1e-4)
    assert found["worth"]["video+audio+text"] == pytest.approx(expected, abs=1e-3)
