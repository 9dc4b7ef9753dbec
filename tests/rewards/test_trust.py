"""Progressive trust: what τ is, when the gate opens, and what it says of itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.rewards.advantages import ScaleRewards, advantage_shares, combine, group_advantages
from mmemo.rewards.hacking import HackingMetrics, correlation, label_statistics
from mmemo.rewards.trust import (
    Gate,
    GateConfig,
    ProgressiveTrust,
    TrustConfig,
    Trusted,
    trust_factors,
    trust_statistics,
)

NAMES = ("format", "outcome", "reasoning")
ALPHA = torch.tensor([0.3, 1.0, 0.5])
NAN = math.nan
TRUSTED = torch.tensor([False, False, True])
OPEN = {"gate": None}


def trust(**fields: object) -> ProgressiveTrust:
    return ProgressiveTrust(parse(TrustConfig, fields), NAMES, ALPHA)


def tau(reasoning: list[float], correct: list[bool], **fields: object) -> list[float]:
    config = parse(TrustConfig, fields)
    size = len(reasoning)
    return trust_factors(torch.tensor(reasoning), torch.tensor(correct), size, config).tolist()


def shares(step: Trusted, size: int = 2) -> torch.Tensor:
    advantages, parts = step.advantages(size, "group")
    return advantage_shares(parts, advantages)


def test_tau_is_one_where_right_answers_reason_better() -> None:
    assert tau([0.8, 0.6, 0.7, 0.5], [True, True, False, False]) == [1.0]
    assert tau([0.6, 0.6], [True, False]) == [1.0]


def test_tau_falls_with_the_inverted_difference() -> None:
    found = tau([0.2, 0.4, 0.9, 0.7], [True, True, False, False])
    assert found == pytest.approx([math.exp(0.3 - 0.8)])
    sharp = tau([0.2, 0.4, 0.9, 0.7], [True, True, False, False], sharpness=4)
    assert sharp == pytest.approx([math.exp(4 * (0.3 - 0.8))])


def test_one_sided_groups_are_configurable() -> None:
    assert tau([0.1, 0.9], [True, True]) == [1.0]
    assert tau([0.1, 0.9], [False, False]) == [0.0]
    assert tau([0.1, 0.9], [True, True], all_correct=0.25) == [0.25]
    assert tau([0.1, 0.9], [False, False], all_wrong=0.5) == [0.5]
    # A side whose reasoning is unscored is as good as empty.
    assert tau([0.1, NAN], [False, True]) == [0.0]
    assert math.isnan(tau([NAN, NAN], [False, True])[0])
    assert tau([0.1, 0.9], [False, True], use_tau=False) == [1.0]
    assert tau([0.9, 0.1], [False, False], use_tau=False) == [1.0]


def test_groups_that_cannot_be_judged_share_what_the_others_showed() -> None:
    """With ``running``, a scorer that judged groups distrust is not believed in the others."""
    scores = torch.tensor(
        [[1.0, 1.0, 0.2], [1.0, 0.0, 0.8], [1.0, 1.0, 0.9], [1.0, 1.0, 0.1]]  # two groups
    )
    calm = trust(gate=None, all_correct="running")
    assert calm.apply(scores, 2).tau.tolist() == pytest.approx([math.exp(-0.6)] * 2)
    again = trust(gate=None, all_correct="running")
    again.load_state_dict(json.loads(json.dumps(calm.state_dict())))
    agreeing = torch.tensor([[1.0, 1.0, 0.9], [1.0, 0.0, 0.5], [1.0, 1.0, 0.9], [1.0, 1.0, 0.1]])
    for one in (calm, again):  # 0.9 of -0.6 and 0.1 of +0.4
        assert one.apply(agreeing, 2).tau.tolist() == pytest.approx([1.0, math.exp(-0.5)])
    # Without evidence there is no distrust, and the paper's reconstruction has none at all.
    assert trust(gate=None, all_correct="running").apply(scores[2:], 2).tau.tolist() == [1.0]
    assert trust(gate=None).apply(scores, 2).tau.tolist() == pytest.approx([math.exp(-0.6), 1.0])


def test_a_group_of_equal_outcomes_cancels_tau_when_it_is_scaled() -> None:
    """The standard deviation is then that of τ·R alone, so that dividing by it takes τ out."""
    scores = torch.tensor([[1.0, 1.0, 0.9], [1.0, 1.0, 0.1]])
    for scale, share in (("group", 1.0), ("none", 0.25)):
        believed, doubted = (
            group_advantages(
                trust(gate=None, all_correct=tau).apply(scores, 2).combined.total, 2, scale
            )
            for tau in (1.0, 0.25)
        )
        assert doubted.tolist() == pytest.approx((share * believed).tolist(), rel=1e-2)


def test_groups_do_not_see_each_other() -> None:
    config = parse(TrustConfig, {})
    reasoning = torch.tensor([0.9, 0.1, 0.1, 0.9])
    correct = torch.tensor([True, False, True, False])
    found = trust_factors(reasoning, correct, 2, config)
    assert found.tolist() == pytest.approx([1.0, math.exp(-0.8)])


def test_the_formula() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.4], [1.0, 0.0, 0.9], [0.0, 0.0, 0.5], [1.0, 1.0, 0.2]])
    found = trust(**OPEN).apply(scores, 4)
    factor = math.exp(0.3 - 0.7)
    expected = [
        0.3 + 1.0 + 0.5 * factor * 0.4,
        0.3 + 0.5 * factor * 0.9,
        0.5 * factor * 0.5,
        0.3 + 1.0 + 0.5 * factor * 0.2,
    ]
    assert found.tau.tolist() == pytest.approx([factor])
    assert found.combined.total.tolist() == pytest.approx(expected)
    assert found.combined.parts.sum(dim=1).tolist() == pytest.approx(expected)


def test_a_closed_gate_is_plain_grpo_and_needs_no_judge() -> None:
    ours = trust()
    assert ours.idle() == ["reasoning"]
    scores = torch.tensor([[1.0, 1.0, NAN], [1.0, 0.0, 0.9]])
    found = ours.apply(scores, 2)
    assert found.combined.total.tolist() == pytest.approx([1.3, 0.3])
    assert found.tau.isnan().all()
    assert found.strength == 0


def test_the_gate_opens_after_patience_and_ramps() -> None:
    gate = Gate(parse(GateConfig, {"ema_beta": 0.5, "patience": 3, "ramp_steps": 4}))
    assert math.isnan(gate.accuracy)
    gate.update(0.6)
    assert gate.accuracy == pytest.approx(0.6)  # corrected for its start at 0
    gate.update(0.0)
    assert (gate.state.streak, gate.strength) == (0, 0.0)
    for _ in range(2):
        gate.update(1.0)
    gate.update(NAN)  # a step without a scored outcome says nothing
    assert (gate.state.streak, gate.strength) == (2, 0.0)
    strengths: list[float] = []
    for mean in (1.0, 0.0, NAN, 0.0, 0.0):
        gate.update(mean)
        strengths.append(gate.strength)
    # It stays open although the accuracy falls.
    assert strengths == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_gate_acts_on_the_steps_after_the_one_that_opened_it() -> None:
    ours = trust(gate={"patience": 1, "ema_beta": 0.0})
    scores = torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, 0.1]])
    assert ours.apply(scores, 2).combined.total[0] == pytest.approx(1.3)
    assert ours.idle() == []
    assert ours.apply(scores, 2).combined.total[0] == pytest.approx(1.55)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 29))
def test_resuming_from_json_is_exact(means: list[float], cut: int) -> None:
    config = parse(TrustConfig, {"gate": {"ema_beta": 0.7, "patience": 3, "ramp_steps": 5}})
    through = ProgressiveTrust(config, NAMES, ALPHA)
    stopped = ProgressiveTrust(config, NAMES, ALPHA)
    for step, mean in enumerate(means):
        if step == cut:
            state = json.loads(json.dumps(stopped.state_dict()))
            stopped = ProgressiveTrust(config, NAMES, ALPHA)
            stopped.load_state_dict(state)
        for one in (through, stopped):
            one.gate.update(mean)
    assert stopped.state_dict() == through.state_dict()
    assert stopped.strength == through.strength


def test_an_unscored_completion_changes_neither_trust_nor_the_others() -> None:
    scored = torch.tensor([[1.0, 1.0, 0.4], [1.0, 0.0, 0.9], [0.0, 0.0, 0.5]])
    alone = trust(**OPEN).apply(scored, 3)
    whole = trust(**OPEN).apply(torch.cat([scored, torch.tensor([[NAN, NAN, NAN]])]), 4)
    assert torch.equal(whole.tau, alone.tau)
    assert whole.combined.total[3].isnan()
    advantages = group_advantages(whole.combined.total, 4)
    assert torch.allclose(advantages[:3], group_advantages(alone.combined.total, 3))
    assert advantages[3] == 0


def test_a_completion_without_outcome_or_reasoning_changes_no_trust_and_keeps_the_rest() -> None:
    scored = torch.tensor([[1.0, 1.0, 0.4], [1.0, 0.0, 0.9], [0.0, 0.0, 0.5]])
    alone = trust(**OPEN).apply(scored, 3)
    for missing in ([1.0, 1.0, NAN], [1.0, NAN, 0.1]):
        whole = trust(**OPEN).apply(torch.cat([scored, torch.tensor([missing])]), 4)
        assert torch.equal(whole.tau, alone.tau)
        assert not whole.combined.total[3].isnan()


def test_without_a_known_outcome_reasoning_is_not_trusted() -> None:
    scores = torch.tensor([[1.0, NAN, 0.9], [0.0, NAN, 0.1]])
    assert trust(**OPEN).apply(scores, 2).combined.total.tolist() == pytest.approx([0.3, 0.0])
    trusting = trust(gate=None, use_tau=False).apply(scores, 2).combined.total
    assert trusting.tolist() == pytest.approx([0.75, 0.05])


def test_an_inverted_scorer_counts_less_than_a_right_one() -> None:
    """Trust turns the reasoning's share of the advantage down where it rewards wrong answers."""
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0])
    good = torch.stack([torch.ones(4), outcome, outcome * 0.8 + 0.1], dim=1)
    bad = torch.stack([torch.ones(4), outcome, 0.9 - outcome * 0.8], dim=1)
    for scores, expected in ((good, 1.0), (bad, math.exp(-0.8))):
        found = trust(**OPEN).apply(scores, 4)
        assert found.tau.tolist() == pytest.approx([expected])
    trusting = trust(gate=None, use_tau=False).apply(bad, 4).combined
    careful = trust(**OPEN).apply(bad, 4).combined
    gap = [one.total[0] - one.total[2] for one in (trusting, careful)]
    assert gap[1] > gap[0]


def test_statistics_of_a_step() -> None:
    ours = trust(gate={"patience": 1, "ema_beta": 0.0, "threshold": 0.3})
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    reasoning = torch.tensor([0.9, 0.1, 0.1, 0.9, NAN, NAN])
    scores = torch.stack([torch.ones(6), outcome, reasoning], dim=1)
    step = ours.apply(scores, 2)
    closed = trust_statistics(step, ours)
    assert "trust/mean_tau" not in closed
    assert closed["trust/gate_strength"] == 0
    assert shares(step)[2] == 0
    step = ours.apply(scores, 2)
    found = trust_statistics(step, ours)
    assert found["trust/gate_strength"] == 1
    assert found["trust/gate_accuracy"] == pytest.approx(1 / 3)
    assert found["trust/share_distrusted"] == pytest.approx(0.5)
    assert found["trust/mean_tau"] == pytest.approx((1 + math.exp(-0.8)) / 2)
    moved = shares(step).tolist()
    assert sum(moved) == pytest.approx(1.0, abs=1e-5)
    assert moved[0] == pytest.approx(0.0, abs=1e-6)
    json.dumps(found)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="no reward is called 'resoning'; did you mean 'reason"):
        trust(trusted=["resoning"])
    with pytest.raises(ConfigError, match="cannot be both"):
        trust(trusted=["outcome"])


def test_diagnostics_name_a_length_hack() -> None:
    watch = HackingMetrics(("outcome", "reasoning"), "outcome", reference_steps=1)
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0])
    honest = torch.stack([outcome, outcome * 0.5 + 0.2], dim=1)
    first = watch.step(honest, honest.sum(dim=1), [10, 10, 10, 10], ["a", "b", "a", None], 2)
    assert first["hack/reasoning/outcome_correlation"] == pytest.approx(1.0)
    assert first["hack/length_drift"] == 0
    assert "hack/length_correlation" not in first  # all of one length
    watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    lengths = [20, 40, 10, 30]
    scores = torch.stack([outcome, torch.tensor(lengths) / 40], dim=1)
    scores[3, 0] = NAN
    totals = scores[:, 1].clone()
    totals[3] = NAN
    found = watch.step(scores, totals, lengths, ["a", "a", "a", "a"], 2)
    assert found["hack/length_drift"] == pytest.approx(1.5)
    assert found["hack/length_correlation"] == pytest.approx(1.0)
    assert found["hack/reasoning/outcome_correlation"] < 0
    assert found["hack/unscored_rate"] == 0.25
    assert found["hack/outcome/unscored_rate"] == 0.25
    assert found["hack/zero_variance_share"] == 0.5
    assert (found["hack/distinct_label_rate"], found["hack/top_label_share"]) == (0.25, 1.0)


def test_what_cannot_be_said_is_left_out() -> None:
    assert math.isnan(correlation(torch.ones(4), torch.rand(4)))
    assert math.isnan(correlation(torch.rand(2), torch.rand(2)))
    assert math.isnan(label_statistics([None])["hack/top_label_share"])
    assert label_statistics([None])["hack/unreadable_rate"] == 1
    scores = torch.full((4, 1), NAN)
    found = HackingMetrics(("outcome",), "outcome").step(
        scores, scores[:, 0], [1] * 4, [None] * 4, 2
    )
    assert found["hack/unscored_rate"] == 1
    assert not any(math.isnan(value) for value in found.values())


def scored(groups: int, slope: float, seed: int = 0, size: int = 8) -> torch.Tensor:
    """(N, 3) scores in which right answers reason better by ``slope`` on average."""
    torch.manual_seed(seed)
    outcome = (torch.rand(groups * size) < 0.6).float()
    reasoning = 0.5 + slope * (outcome - 0.5) + 0.2 * torch.randn(groups * size)
    return torch.stack([torch.ones_like(outcome), outcome, reasoning], dim=1)


OURS = {"acts_on": "advantage", "evidence": "run", **OPEN}


def test_without_trust_ours_is_exactly_grpo_without_the_reward() -> None:
    scores = scored(8, slope=-0.3)
    step = trust(**OURS).apply(scores, 8)
    assert set(step.tau.tolist()) == {0.0}
    plain = combine(scores[:, :2], ALPHA[:2], 8)
    assert torch.equal(step.advantages(8, "group")[0], group_advantages(plain.total, 8, "group"))
    assert shares(step, 8)[2] == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_in_full_trust_ours_is_exactly_the_sum_of_the_rewards(scale: ScaleRewards) -> None:
    scores = scored(8, slope=0.5)
    step = trust(**OURS, all_wrong=1.0).apply(scores, 8)
    assert set(step.tau.tolist()) == {1.0}
    whole = combine(scores, ALPHA, 8)
    found = step.advantages(8, scale)[0]
    assert torch.allclose(found, group_advantages(whole.total, 8, scale), atol=1e-6)


def test_scaling_does_not_divide_trust_out_of_the_advantage() -> None:
    """What test_a_group_of_equal_outcomes_cancels_tau shows of the reward."""
    scores = torch.tensor([[1.0, 1.0, 0.2], [1.0, 1.0, 0.6], [1.0, 1.0, 0.9], [1.0, 1.0, 0.4]])
    for tau_given in (0.01, 0.5):
        fields = {"acts_on": "advantage", "all_correct": tau_given, **OPEN}
        found = trust(**fields).apply(scores, 4).advantages(4, "group")[0]
        whole = group_advantages(combine(scores, ALPHA, 4).total, 4, "group")
        assert torch.allclose(found, tau_given * whole, atol=1e-6)


@pytest.mark.parametrize("acts_on", ["reward", "advantage"])
def test_what_the_trusted_reward_could_not_score_keeps_its_other_rewards(acts_on: str) -> None:
    fields = {"acts_on": acts_on, **OPEN}
    scores = scored(2, slope=0.5)
    scores[3, 2] = NAN
    # Without the missing score, τ is that of the other completions.
    tau = trust(**fields).apply(scores, 8).tau
    found, parts = trust(**fields).apply(scores, 8).advantages(8, "group")
    assert found[3] != 0
    assert parts[3, 2] == 0
    # Its group's mean moves nothing: the advantage is that of the other rewards.
    scores[3, 2] = scores[:8, 2].nanmean()
    combined = combine(scores, ALPHA, 8, torch.where(TRUSTED, tau.repeat_interleave(8)[:, None], 1))
    if acts_on == "reward":
        assert torch.allclose(found, group_advantages(combined.total, 8, "group"), atol=1e-6)


@pytest.mark.parametrize(("slope", "low", "high"), [(0.15, 0.9, 1), (-0.15, 0, 0), (0, 0, 0.3)])
def test_a_scorer_earns_trust_by_preferring_right_answers(
    slope: float, low: float, high: float
) -> None:
    """The mean over several runs of 20 steps, eight groups each."""
    found: list[float] = []
    for seed in range(8):
        judge = trust(**OURS)
        for step in range(20):
            judge.apply(scored(8, slope, 100 * seed + step), 8)
        found.append(judge.earned)
    assert low <= sum(found) / len(found) <= high


def test_trust_once_earned_is_lost_when_the_scorer_turns() -> None:
    judge = trust(**OURS)
    for step in range(20):
        judge.apply(scored(8, 0.2, step), 8)
    assert judge.earned == 1
    for step in range(30):
        judge.apply(scored(8, -0.2, 50 + step), 8)
    assert judge.earned == 0


def test_one_group_earns_nothing() -> None:
    judge = trust(**OURS)
    judge.apply(scored(1, 0.9), 8)
    assert judge.earned == 0


def test_trust_must_rise() -> None:
    with pytest.raises(ConfigError, match="earned_at"):
        trust(earned_from=3, earned_at=1)
