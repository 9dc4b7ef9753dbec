"""Every shipped reward moves a policy: alone, through advantages and loss, its mean rises.

The policy is a table of logits over a few candidate completions of each prompt. R prompts, M
candidates, G drawn of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo import content
from mmemo.config import parse
from mmemo.losses.grpo import LossType, grpo_loss, grpo_weight
from mmemo.rewards.advantages import ScaleRewards, group_advantages
from mmemo.rewards.rewards import RewardConfig, RewardSet
from mmemo.rewards.validate import score_rows
from tests.content.test_rewards import FUNCTIONS, MEASURES, Rows, config_of, params_of
from tests.content.test_rewards import rows as rows
from tests.content.test_rewards import wheels as wheels
from tests.rewards.stub_judge import Reply, Server, judge_server

G = 8


@pytest.fixture
def server() -> Iterator[Server]:
    """A judge that likes long answers, within what it is shown."""

    def grade(request: dict[str, Any], _: int) -> Reply:
        length = len(str(request["messages"][-1]["content"]).split())
        value = 5 if length > 100 else 3
        names = (
            "factual_alignment",
            "interpretative_quality",
            "caption_completeness",
            "fluency_and_structural_clarity",
        )
        return Reply(json.dumps(dict.fromkeys(names, value)))

    with judge_server(grade) as running:
        yield running


def candidates(name: str, rows: Rows) -> tuple[Rows, list[list[str]]]:
    """Rows that the reward applies to, and M things to say to each: one of them is right."""
    module: Any = content.load_module(f"reward/{name}.py")
    gold = getattr(module, "gold", lambda _: "word " * 60)  # what is wrong on purpose has none
    golds = [(row, gold(row)) for row in rows]
    usable = [(row, str(best)) for row, best in golds if best is not None][:6]
    said: list[list[str]] = []
    for place, (_, best) in enumerate(usable):
        other = next(
            (text for _, text in usable[place + 1 :] if text != best), "<answer>?</answer>"
        )
        said.append([best, other, "", "happy, sad, angry", "I cannot tell from this clip."])
    return [row for row, _ in usable], said


def worth(config: RewardConfig, rows: Rows, said: list[list[str]]) -> Tensor:
    """(R, M) scores, NaN where unscored."""
    board = RewardSet([config])
    columns = [score_rows(board, rows, [row[m] for row in said]) for m in range(len(said[0]))]
    return torch.tensor(columns).T


def mean_reward(logits: Tensor, scores: Tensor) -> float:
    return float((logits.detach().softmax(1) * scores.nan_to_num(0.0)).sum(1).mean())


def train(scores: Tensor, loss_type: LossType, scale: ScaleRewards, steps: int = 40) -> list[float]:
    """The policy's expected reward before and after."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(scores.shape, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    means = [mean_reward(logits, scores)]
    for _ in range(steps):
        drawn = torch.multinomial(logits.detach().softmax(1), G, True, generator=generator)
        advantages = group_advantages(scores.gather(1, drawn).flatten(), G, scale)
        logps = logits.log_softmax(1).gather(1, drawn).view(-1, 1)
        mask = torch.ones_like(logps)
        out = grpo_loss(
            logps, None, None, advantages, mask, loss_type=loss_type, max_completion_length=1
        )
        (out.rows.sum() / grpo_weight(mask, loss_type)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*means, mean_reward(logits, scores)]


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - MEASURES))
def test_the_mean_of_each_reward_rises(name: str, rows: Rows, wheels: str, server: Server) -> None:
    usable, said = candidates(name, rows)
    scores = worth(config_of(name, **params_of(name, wheels, server)), usable, said)
    before, after = train(scores, "grpo", "group")
    best = float(scores.nan_to_num(0.0).amax(1).mean())
    assert before < 0.75 * best
    assert after > 0.9 * best


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_with_every_loss_and_scale(loss_type: LossType, scale: ScaleRewards) -> None:
    scores = torch.tensor([[1.0, 0.0, 0.5, 0.0]]).repeat(4, 1)
    before, after = train(scores, loss_type, scale)
    assert before == pytest.approx(0.375)
    assert after > 0.75


def test_a_reward_that_is_never_scored_moves_nothing() -> None:
    scores = torch.full((3, 4), torch.nan)
    assert train(scores, "grpo", "group") == [0.0, 0.0]


def test_a_prompt_whose_answers_earn_the_same_moves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "same.py"
    file.write_text("def same(prompts, completions, **_):\n    return [0.3 for _ in completions]\n")
    config = parse(RewardConfig, {"path": f"{file}:same"})
    scores = worth(config, [{"sample_id": "a"}], [["x", "y", "z"]])
    before, after = train(scores, "grpo", "group")
    assert before == after == pytest.approx(0.3)
