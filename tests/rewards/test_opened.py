"""Rewards whose format does not go with what the chat template opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.sample import Sample, Truth, Turn
from mmemo.errors import ConfigError
from mmemo.rewards.opened import check_opened
from mmemo.rewards.rewards import RewardConfig

ROWS = [
    Sample(str(at), (Turn("user", "Which?"),), {}, Truth(label="sad"), source=("r", at))
    for at in range(3)
]

ANSWER_ALONE = """
from mmemo.answers.messages import completion_text

def gold(row):
    return f"<answer>{row['label']}</answer>"

def alone(prompts, completions, label, **_):
    wanted = [f"<answer>{one}</answer>" for one in label]
    texts = map(completion_text, completions)
    return [float(text == want) for text, want in zip(texts, wanted, strict=True)]

def somewhere(prompts, completions, label, **_):
    texts = map(completion_text, completions)
    return [float(f"<answer>{one}</answer>" in text) for text, one in zip(texts, label)]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "alone.py").write_text(ANSWER_ALONE)
    return str(tmp_path / "alone.py")


def reward(path: str, **values: Any) -> RewardConfig:
    return parse(RewardConfig, {"path": path, **values})


def test_a_reward_that_no_opened_completion_can_earn_is_named(file: str) -> None:
    with pytest.raises(ConfigError, match=r"reward 'alone' .*begins with <think>, which the chat"):
        check_opened([reward(f"{file}:somewhere"), reward(f"{file}:alone")], ROWS, "<think>\n")


def test_nothing_is_asked_where_nothing_is_open(file: str) -> None:
    check_opened([reward(f"{file}:alone")], ROWS, "")


@pytest.mark.parametrize("path", ["reward/format.py:tags", "reward/outcome.py:outcome"])
def test_the_shipped_rewards_go_with_opened_reasoning(path: str) -> None:
    check_opened([reward(path)], ROWS, "<think>\n")


def test_a_reward_without_gold_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def own(prompts, completions, **_):\n    return [0.0 for _ in completions]\n"
    )
    check_opened([reward(f"{tmp_path / 'own.py'}:own")], ROWS, "<think>\n")
