"""Warning signs: found where they are, and only there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmemo.rewards.hacking import (
    ALERT_RULES,
    MIN_LINES,
    MIN_LINES_LIVE,
    AlertMonitor,
    find_alerts,
    gate_open_lines,
    quarter_means,
)
from mmemo.run_log import RunRecord

REWARDS = ("format", "outcome", "reasoning")
TRUSTED = ("reasoning",)
QUIET: dict[str, float] = {
    "trust/share_distrusted": 0.25,
    "trust/gate_strength": 1.0,
    "hack/length_drift": 0.05,
    "completions/mean_length": 35.0,
    "completions/clipped_ratio": 0.02,
    "hack/top_label_share": 0.3,
    "hack/distinct_label_rate": 0.1,
    "hack/unreadable_rate": 0.03,
    "hack/unscored_rate": 0.0,
    "readable": 1.0,
    "hack/zero_variance_share": 0.1,
    "kl": 0.02,
    "entropy": 0.7,
    **{f"rewards/{name}/mean": 0.5 for name in REWARDS},
    **{f"rewards/{name}/std": 0.4 for name in REWARDS},
    **{f"rewards/{name}/advantage_share": 1 / 3 for name in REWARDS},
    **{f"hack/{name}/outcome_correlation": 0.3 for name in REWARDS if name != "outcome"},
    **{f"hack/{name}/unscored_rate": 0.05 for name in REWARDS},
}


def log(length: int = 20, **late: float) -> list[dict[str, Any]]:
    """Lines in which the last half is ``late``, with some noise."""
    noise = random.Random(0)
    return [
        {
            "step": step,
            **{
                name: value + noise.gauss(0, 0.01)
                for name, value in {**QUIET, **(late if step > length // 2 else {})}.items()
            },
        }
        for step in range(1, length + 1)
    ]


def alerts(lines: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return [
        (alert.rule.metric, alert.reward)
        for alert in find_alerts(lines, REWARDS, "outcome", TRUSTED)
    ]


def test_a_quiet_run_shows_none() -> None:
    assert alerts(log()) == []


@pytest.mark.parametrize(
    ("metric", "reward", "late"),
    [
        ("hack/{reward}/outcome_correlation", "format", -0.3),
        ("hack/{reward}/outcome_correlation", "reasoning", -0.3),
        ("rewards/{reward}/advantage_share", "format", 0.8),
        ("trust/share_distrusted", None, 0.9),
        ("hack/length_drift", None, 0.8),
        ("hack/length_drift", None, -0.6),
        ("completions/mean_length", None, 60.0),
        ("completions/mean_length", None, 15.0),
        ("completions/clipped_ratio", None, 0.5),
        ("hack/top_label_share", None, 0.9),
        ("hack/distinct_label_rate", None, 0.03),
        ("hack/unreadable_rate", None, 0.4),
        ("hack/{reward}/unscored_rate", "format", 0.6),
        ("hack/unscored_rate", None, 0.4),
        ("readable", None, 0.7),
        ("hack/zero_variance_share", None, 0.9),
        ("kl", None, 2.0),
        ("sampling/kl", None, 0.2),
        ("sampling/importance_sampling_ratio/clipped", None, 0.2),
        ("entropy", None, 0.1),
    ],
)
def test_each_sign_is_named_alone(metric: str, reward: str | None, late: float) -> None:
    lines = log(**{metric.format(reward=reward): late})
    assert alerts(lines) == [(metric, reward)]
    (alert,) = find_alerts(lines, REWARDS, "outcome", TRUSTED)
    assert alert.late == pytest.approx(late, abs=0.05)
    assert alert.rule.threshold
    few = alerts(log(length=MIN_LINES - 1, **{metric.format(reward=reward): late}))
    assert few == ([(metric, reward)] if alert.rule.at_once else [])


def test_every_sign_is_tried_above() -> None:
    cases = test_each_sign_is_named_alone.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {metric for metric, _, _ in cases} == {rule.metric for rule in ALERT_RULES}


def test_a_reward_that_rises_while_the_outcome_falls_is_named() -> None:
    gamed = log(**{"rewards/format/mean": 0.9, "rewards/outcome/mean": 0.3})
    assert alerts(gamed) == [("rewards/{reward}/mean", "format")]
    assert alerts(log(**{"rewards/format/mean": 0.9, "rewards/outcome/mean": 0.6})) == []
    assert alerts(log(**{"rewards/outcome/mean": 0.3})) == []


def test_what_is_not_asked_is_not_unscored() -> None:
    """Behind a closed gate nothing is asked, so the log says that nothing is scored."""
    lines = log()
    for line in lines[:8]:
        line["trust/gate_strength"] = 0.0
        line["hack/reasoning/unscored_rate"] = 1.0
    lines[8]["hack/reasoning/unscored_rate"] = 0.5  # the gate opened between two log lines
    assert alerts(lines) == []
    assert gate_open_lines(lines, TRUSTED) == lines[9:]
    for line in lines[9:]:
        line["hack/reasoning/unscored_rate"] = 0.9
    assert alerts(lines) == [("hack/{reward}/unscored_rate", "reasoning")]
    for line in lines:
        line["trust/gate_strength"] = 0.0
    assert alerts(lines) == []


def test_a_run_without_trust_is_read_whole() -> None:
    lines = [{k: v for k, v in line.items() if not k.startswith("trust/")} for line in log()]
    assert gate_open_lines(lines, ()) == lines
    assert alerts(lines) == []


def test_quarters_are_means_of_the_ends() -> None:
    lines = [{"step": step, "kl": float(step)} for step in range(8)] + [{"step": 8}]
    assert quarter_means(lines, "kl") == (0.5, 6.5)
    assert quarter_means(lines, "entropy") is None


GAMED = {"hack/format/outcome_correlation": -0.4, "kl": 2.0}


def watch(folder: Path) -> AlertMonitor:
    """As a process that starts or goes on makes it."""
    return AlertMonitor(RunRecord(folder), REWARDS, "outcome", TRUSTED)


def named(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["metric"]) for event in RunRecord(folder).events("sign")]


def first_steps(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Metric to the first line at which the whole log up to it shows a sign."""
    found: dict[str, int] = {}
    for end in range(MIN_LINES_LIVE, len(lines) + 1):
        for alert in find_alerts(lines[:end], REWARDS, "outcome", TRUSTED):
            found.setdefault(alert.metric, end)
    return found


def test_each_sign_is_named_once_and_at_the_line_where_it_crosses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, watching, said = log(60, **GAMED), watch(tmp_path), dict[int, str]()
    for line in lines:
        watching.see(line)
        if out := capsys.readouterr().out:
            said[line["step"]] = out
    expected = first_steps(lines)
    assert set(expected) == set(GAMED)
    assert all(30 < step < 45 for step in expected.values())
    assert {metric: step for step, metric in named(tmp_path)} == expected
    assert len(named(tmp_path)) == len(GAMED)
    assert set(said) == set(expected.values())
    warning = said[expected["hack/format/outcome_correlation"]]
    for part in ("goes against the outcome: format", "to -0.1", "below −0.1", "is gamed"):
        assert part in warning
    event = RunRecord(tmp_path).events("sign")[0]
    assert (event["reward"], event["threshold"]) == (None, "above 0.5")
    assert event["early"] == pytest.approx(0.02, abs=0.02)
    assert event["late"] > 0.5


def test_a_quiet_or_a_young_run_is_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, young = watch(tmp_path / "quiet"), watch(tmp_path / "young")
    for line in log(200):
        quiet.see(line)
    for line in log(MIN_LINES_LIVE - 1, **GAMED):
        young.see(line)
    assert named(tmp_path / "quiet") == named(tmp_path / "young") == []
    assert capsys.readouterr().out == ""


def test_a_fault_of_the_set_up_is_named_at_the_first_line_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the start, or when a server has lost the adapter for one of many lines."""
    for name, start in (("start", 1), ("later", 100)):
        watching = watch(tmp_path / name)
        for step in range(1, 120):
            watching.see({"step": step, "sampling/kl": 0.03 if step == start else 0.0005})
            watching.see({"step": step})  # completions that are used again
        assert named(tmp_path / name) == [(start, "sampling/kl")]
        said = capsys.readouterr().out
        assert said.count("warning") == 1
        assert ("sampling/kl is 0.03; the threshold is above 0.01" in said) == (start == 1)


@pytest.mark.parametrize("stop", [10, 35, 59])
def test_a_resumed_run_names_what_the_whole_one_does_and_nothing_twice(
    tmp_path: Path, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, whole = log(60, **GAMED), watch(tmp_path / "whole")
    for line in lines:
        whole.see(line)
    before = capsys.readouterr().out
    cut = watch(tmp_path / "cut")
    for line in lines[:stop]:
        cut.see(line)
    resumed = watch(tmp_path / "cut")  # from a checkpoint some lines before
    resumed.restore(json.loads(json.dumps(lines[: stop - 5])))
    for line in lines[stop - 5 :]:
        resumed.see(line)
    assert named(tmp_path / "cut") == named(tmp_path / "whole")
    assert capsys.readouterr().out == before
