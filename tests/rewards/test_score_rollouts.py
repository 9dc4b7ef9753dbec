"""Scoring a step's rollouts in several rounds is scoring them in one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.sample import Sample, Turn
from mmemo.rewards.rewards import RewardConfig
from mmemo.rewards.score_rollouts import GroupRewards, GroupRollouts
from mmemo.rewards.trust import TrustConfig
from mmemo.run_log import RunRecord
from mmemo.train.distributed import Ranks

REWARDS = Path(__file__).parent.parent / "train" / "grpo" / "toy_rewards.py"


def rewards(folder: Path, **trust: Any) -> GroupRewards:
    """Whether the first token is even, and trust in shortness; two completions a prompt."""
    configs = [
        parse(RewardConfig, {"path": f"{REWARDS}:{name}", "name": name})
        for name in ("right", "short")
    ]
    section = {"outcome": "right", "trusted": ["short"], "gate": None, **trust}
    return GroupRewards(configs, parse(TrustConfig, section), 2, "batch", RunRecord(folder))


def rollouts(place: int, ids: Sequence[list[int]]) -> GroupRollouts:
    samples = [
        Sample(f"{place}-{at}", (Turn("user", "Which emotion?"),), {})
        for at in range(len(ids) // 2)
    ]
    return GroupRollouts(place, samples, ["sad"] * len(ids), list(ids), [True] * len(ids))


# Groups: right and wrong; both right and of one length; both wrong, of two lengths.
FIRST = rollouts(0, [[2], [1], [2, 3], [4, 3], [1], [3, 5, 7]])
SECOND = rollouts(3, [[2, 2], [1]])


@pytest.mark.parametrize("trust", [{}, {"acts_on": "advantage"}, {"evidence": "run"}])
def test_rounds_add_up(tmp_path: Path, trust: dict[str, Any]) -> None:
    ranks = Ranks(cpu=True)
    once, twice = rewards(tmp_path, **trust), rewards(tmp_path, **trust)
    want = once.score([FIRST, SECOND], 0, 10, ranks)
    reports = twice.gather([FIRST], 0, 10, ranks)
    twice.flat_groups(reports)
    reports = twice.gather([SECOND], 0, 10, ranks, reports)
    found = twice.conclude(reports, 0, 10, ranks)
    for place in (0, 3):
        assert found.advantages[place].tolist() == want.advantages[place].tolist()
        assert found.totals[place].tolist() == want.totals[place].tolist()
    slow = {name for name in want.statistics if name.endswith("seconds")}
    assert {k: v for k, v in found.statistics.items() if k not in slow} == {
        k: v for k, v in want.statistics.items() if k not in slow
    }
    assert twice.state_dict() == once.state_dict()


def test_flat_groups_are_named_by_place_and_nothing_is_learnt_from_looking(
    tmp_path: Path,
) -> None:
    # Trust that a group without a right answer does not have makes the last group flat.
    one = rewards(tmp_path, all_wrong=0.0)
    before = json.dumps(one.state_dict())
    reports = one.gather([FIRST, SECOND], 0, 10, Ranks(cpu=True))
    assert one.flat_groups(reports) == {0: [False, True, True], 3: [False]}
    assert json.dumps(one.state_dict()) == before
    trusting = rewards(tmp_path, all_wrong=1.0)
    reports = trusting.gather([FIRST, SECOND], 0, 10, Ranks(cpu=True))
    assert trusting.flat_groups(reports)[0] == [False, True, False]


def test_what_a_reward_logs_is_averaged_over_its_calls(tmp_path: Path) -> None:
    file = tmp_path / "logs.py"
    file.write_text(
        "def logs(prompts, completions, *, log_metric, **_):\n"
        "    log_metric('size', float(len(completions)))\n"
        "    return [float(at) for at in range(len(completions))]\n"
    )
    configs = [parse(RewardConfig, {"path": f"{file}:logs"})]
    one = GroupRewards(configs, None, 2, "group", RunRecord(tmp_path))
    ranks, reports = Ranks(cpu=True), []
    for place, size in enumerate((2, 4, 6)):
        drawn = [rollouts(place, [[1]] * size)]
        reports = one.gather(drawn, 0, 10, ranks, reports)
    found = one.conclude(reports, 0, 10, ranks).statistics
    (name,) = [name for name in found if name.endswith("size") and name != "advantage_size"]
    assert found[name] == 4.0
