"""Importance sampling on bandits whose gradient is known: what is unbiased, and what a limit costs.

A policy pi has logits of its own; a sampler mu has others. The true gradient is that of the
expected reward under pi. Expectations are exact sums over all outcomes, or means over many draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmemo.losses.grpo import grpo_loss
from mmemo.losses.off_policy import ImportanceRatio, Mismatch, importance_ratio, mismatch

REWARDS = torch.tensor([0.0, 1.0, 0.3, 2.0, -1.0], dtype=torch.float64)
POLICY = torch.tensor([0.4, -0.3, 0.1, -1.2, 0.9], dtype=torch.float64)
SAMPLER = torch.tensor([0.9, 0.5, -0.8, -2.2, 0.3], dtype=torch.float64)
"""The last but one token, whose reward is the largest, is drawn too seldom."""

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
FREE: dict[str, Any] = {"clip_max": None}
"""No limit; a truncating mode is refused without one by the config, and not by the function."""

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 1},
    "bnpo": {"loss_type": "bnpo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
}


def true_gradient(rewards: Tensor = REWARDS, policy: Tensor = POLICY) -> Tensor:
    """Of the expected reward: pi(a) (r(a) - J)."""
    pi = policy.softmax(0)
    return pi * (rewards - (pi * rewards).sum())


def bandit_loss(
    logits: Tensor,
    drawn: Tensor,
    advantages: Tensor,
    correction: dict[str, Any] | None,
    **loss: Any,
) -> Tensor:
    """(N,) losses of single tokens ``drawn`` (N,), as a step computes them."""
    logps = logits.log_softmax(0)[drawn][:, None]  # (N, 1)
    mask = torch.ones_like(logps)
    ratio = None
    if correction is not None:
        sampled = SAMPLER.log_softmax(0)[drawn][:, None]
        ratio = importance_ratio(logps.detach(), sampled, mask, **correction).values
    old = logps.detach()
    out = grpo_loss(logps, old, None, advantages, mask, importance_ratio=ratio, **loss)
    # bnpo has divided by the number of tokens already.
    return out.rows * (len(drawn) if loss.get("loss_type") == "bnpo" else 1)


def expected(correction: dict[str, Any] | None, **loss: Any) -> Tensor:
    """The step's expectation over one draw of the sampler, with a baseline of 0.4."""
    logits = POLICY.clone().requires_grad_()
    every = torch.arange(len(POLICY))
    rows = bandit_loss(logits, every, REWARDS - 0.4, correction, **loss)
    (SAMPLER.softmax(0) * rows).sum().backward()
    assert logits.grad is not None
    return -logits.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_corrected_gradient_is_the_true_one(loss: str, mode: str) -> None:
    """Exactly, for every loss: where the ratio to the policy of the draw is 1 all are REINFORCE."""
    found = expected({"mode": mode, **FREE}, **LOSSES[loss])
    torch.testing.assert_close(found, true_gradient(), rtol=1e-12, atol=1e-12)
    # A limit that no ratio reaches changes nothing either.
    found = expected({"mode": mode, "clip_max": 10.0, "clip_min": 0.01}, **LOSSES[loss])
    torch.testing.assert_close(found, true_gradient(), rtol=1e-12, atol=1e-12)
    # Without the correction it is another gradient, which even points elsewhere.
    wrong = expected(None, **LOSSES[loss])
    assert (wrong - true_gradient()).norm() > 0.5 * true_gradient().norm()
    assert wrong[3] < 0.5 * true_gradient()[3]


@pytest.mark.parametrize("group", [2, 3])
def test_with_the_groups_own_baseline(group: int) -> None:
    """GRPO subtracts the mean of the group, of which a completion is a part: the expectation over
    all groups is (G - 1) / G of the true gradient, as without a mismatch."""
    groups = torch.tensor(list(itertools.product(range(len(POLICY)), repeat=group)))  # (K, G)
    chances = SAMPLER.softmax(0)[groups].prod(1)
    rewards = REWARDS[groups]
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    found: list[Tensor] = []
    for correction in ({"mode": "sequence_mask", **FREE}, None):
        logits = POLICY.clone().requires_grad_()
        rows = bandit_loss(logits, groups.flatten(), advantages, correction)
        (rows.view(-1, group).mean(1) * chances).sum().backward()
        assert logits.grad is not None
        found.append(-logits.grad * group / (group - 1))
    torch.testing.assert_close(found[0], true_gradient(), rtol=1e-11, atol=1e-12)
    assert (found[1] - true_gradient()).norm() > 0.4 * true_gradient().norm()


def test_in_the_mean_of_many_draws() -> None:
    """40,000 draws of the sampler: the corrected mean is within five standard errors of the truth,
    the uncorrected one is outside of twenty."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(SAMPLER.softmax(0), 40_000, replacement=True, generator=generator)
    distances: list[float] = []
    for correction in ({"mode": "sequence_mask", **FREE}, None):
        logits = POLICY.expand(len(drawn), -1).clone().requires_grad_()  # a row for each draw
        logps = logits.log_softmax(1).gather(1, drawn[:, None])
        mask, ratio = torch.ones_like(logps), None
        if correction is not None:
            sampled = SAMPLER.log_softmax(0)[drawn][:, None]
            ratio = importance_ratio(logps.detach(), sampled, mask, **correction).values
        out = grpo_loss(logps, None, None, REWARDS[drawn] - 0.4, mask, importance_ratio=ratio)
        out.rows.sum().backward()
        assert logits.grad is not None
        each = -logits.grad
        error = each.std(0) / math.sqrt(len(drawn))
        distances.append(float(((each.mean(0) - true_gradient()).abs() / error).max()))
    assert distances[0] < 5
    assert distances[1] > 20


@pytest.mark.parametrize("limit", [1.05, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_what_a_limit_from_above_costs(kind: str, limit: float) -> None:
    """For each completion above it (pi - C mu) of its gradient where it is truncated, and pi of it
    where it is masked; at most that many times the largest."""
    pi, mu = POLICY.softmax(0), SAMPLER.softmax(0)
    above = pi > limit * mu
    assert bool(above.any()) == (limit < 3)  # the largest ratio is 2.4
    scores = torch.eye(len(pi), dtype=torch.float64) - pi  # (a, logit) d log pi(a)
    each = (REWARDS - 0.4)[:, None] * scores
    for way, weight in (("truncate", pi - limit * mu), ("mask", pi)):
        bias = expected({"mode": f"{kind}_{way}", "clip_max": limit}) - true_gradient()
        lost = weight.masked_fill(~above, 0.0)
        torch.testing.assert_close(bias, -(lost[:, None] * each).sum(0), rtol=1e-10, atol=1e-12)
        assert float(bias.norm()) <= float(lost.sum() * each.norm(dim=1).max()) + 1e-12
        assert (float(bias.norm()) > 1e-6) == bool(above.any())


def test_what_a_limit_from_below_costs() -> None:
    pi, mu = POLICY.softmax(0), SAMPLER.softmax(0)
    below = pi < 0.8 * mu
    assert below.any()
    assert not below.all()
    scores = torch.eye(len(pi), dtype=torch.float64) - pi
    each = (REWARDS - 0.4)[:, None] * scores
    for way, weight in (("truncate", 0.8 * mu - pi), ("mask", -pi)):
        correction = {"mode": f"token_{way}", "clip_max": None, "clip_min": 0.8}
        bias = expected(correction) - true_gradient()
        gained = weight.masked_fill(~below, 0.0)
        torch.testing.assert_close(bias, (gained[:, None] * each).sum(0), rtol=1e-10, atol=1e-12)


def two_steps(correction: dict[str, Any] | None, apart: float) -> tuple[Tensor, Tensor]:
    """Gradient in expectation and truth for two tokens of three, of which the second depends on
    the first; the sampler's logits are ``apart`` from the policy's."""
    generator = torch.Generator().manual_seed(1)
    first, second, reward, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3,), (3, 3), (3, 3), (3, 4))
    )
    parameters = torch.cat([first[:, None], second], 1).requires_grad_()  # (3, 1 + 3)
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)

    def logps_of(values: Tensor) -> Tensor:
        one = values[:, 0].log_softmax(0)[pairs[:, 0]]
        other = values[:, 1:].log_softmax(1)[pairs[:, 0], pairs[:, 1]]
        return torch.stack([one, other], 1)  # (9, 2)

    logps, sampled = logps_of(parameters), logps_of(parameters.detach() + apart * noise)
    values = reward[pairs[:, 0], pairs[:, 1]]
    mask, ratio = torch.ones_like(logps), None
    if correction is not None:
        ratio = importance_ratio(logps, sampled, mask, **correction).values
    out = grpo_loss(logps, None, None, values, mask, importance_ratio=ratio)
    loss = (out.rows * sampled.sum(1).exp()).sum()
    (found,) = torch.autograd.grad(-loss, parameters, retain_graph=True)
    objective = (logps.sum(1).exp() * values).sum()
    (truth,) = torch.autograd.grad(objective, parameters)
    return found, truth


def test_ratios_of_sequences_are_exact_and_those_of_tokens_nearly() -> None:
    """The error of token ratios is of first order, as without a correction, but smaller."""
    errors: dict[str, list[float]] = {"none": [], "token": []}
    for apart in (0.2, 0.02):
        found, truth = two_steps({"mode": "sequence_truncate", **FREE}, apart)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
        for name, correction in (("none", None), ("token", {"mode": "token_mask", **FREE})):
            found, truth = two_steps(correction, apart)
            errors[name].append(float((found - truth).norm() / truth.norm()))
    assert errors["token"][0] < 0.8 * errors["none"][0]
    for large, small in errors.values():
        assert large / small == pytest.approx(10, rel=0.3)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    limits=st.sampled_from([(None, 3.0), (0.7, 1.4), (0.9, None), (None, None)]),
)
def test_ratios_are_their_formula_and_padding_has_none(
    seed: int, lengths: list[int], limits: tuple[float | None, float | None]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(*lengths, 1))
    logps = -3 * torch.rand(shape, generator=generator, requires_grad=True)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    noise = torch.randn(shape, generator=generator)
    sampled = torch.where(mask, logps.detach() - 0.5 * noise, torch.nan)
    low, high = limits
    for mode in MODES:
        found = importance_ratio(
            logps, sampled, mask.long(), mode=mode, clip_max=high, clip_min=low
        )
        whole = mode.startswith("sequence")
        assert found.values.shape == (shape[0], 1 if whole else shape[1])
        assert not found.values.requires_grad
        for row, count in enumerate(lengths):
            d = (0.5 * noise)[row, :count].tolist()
            plain = [math.exp(sum(d))] if whole else [math.exp(x) for x in d]
            wanted: list[float] = []
            for w in plain:
                inside = min(max(w, low or 0.0), high or math.inf)
                wanted.append(inside if mode.endswith("truncate") or inside == w else 0.0)
            cut = len(plain)
            assert found.values[row, :cut].tolist() == pytest.approx(wanted, rel=1e-4)
            changed = [w != v for w, v in zip(plain, wanted, strict=True)]
            assert found.outside[row, :cut].tolist() == changed
            assert (found.values[row, cut:] == 1).all()


def test_padding_and_masked_rows_have_no_loss_with_a_correction() -> None:
    logps = torch.full((3, 4), -1.0).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    sampled = torch.where(mask == 1, -1.5, torch.inf)
    for mode, loss in itertools.product(MODES, LOSSES.values()):
        logps.grad = None
        ratio = importance_ratio(logps, sampled, mask, mode=mode)
        given = {
            **loss,
            **({"max_completion_length": 4} if "max_completion_length" in loss else {}),
        }
        out = grpo_loss(
            logps, None, None, torch.ones(3), mask, importance_ratio=ratio.values, **given
        )
        out.rows.sum().backward()
        assert logps.grad is not None
        assert logps.grad[mask == 0].abs().sum() == 0
        assert torch.isfinite(logps.grad).all()
        # exp(4 * 0.5) is above 3: the whole row is left out.
        assert (logps.grad[2].abs().sum() == 0) == (mode == "sequence_mask")
        assert logps.grad[0].abs().sum() > 0


def test_the_kl_penalty_is_not_multiplied() -> None:
    """As in TRL: with an advantage of 0 nothing but the penalty is left."""
    logps = torch.tensor([[-1.0, -2.0]]).requires_grad_()
    given: dict[str, Any] = {"ref_logps": torch.tensor([[-1.3, -1.1]]), "beta": 0.1}
    found = [
        grpo_loss(
            logps,
            None,
            advantages=torch.zeros(1),
            mask=torch.ones(1, 2),
            importance_ratio=ratio,
            **given,
        ).rows
        for ratio in (None, torch.full((1, 2), 0.25))
    ]
    assert float(found[0].detach()) > 0
    assert torch.equal(found[0], found[1])


def measured(d: Sequence[Sequence[float]], mode: Any, **limits: Any) -> Mismatch:
    """Of rows of differences; padding holds NaN."""
    width = max(map(len, d))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in d])
    values = torch.tensor([[*row] + [math.nan] * (width - len(row)) for row in d])
    logps = torch.full(mask.shape, -1.0)
    ratio = importance_ratio(logps, logps - values, mask, mode=mode, **limits)
    return mismatch(logps, logps - values, mask, ratio)


def test_the_mismatch_is_measured() -> None:
    one = measured([[0.5, -0.5], [1.0]], "token_truncate", clip_max=2.0).metrics()
    ratios = [math.exp(0.5), math.exp(-0.5), 2.0]
    k3 = [math.exp(x) - 1 - x for x in (0.5, -0.5, 1.0)]
    assert one == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 2 / 3,
            "sampling/sampling_logp_difference/max": 1.0,
            "sampling/importance_sampling_ratio/min": ratios[1],
            "sampling/importance_sampling_ratio/mean": sum(ratios) / 3,
            "sampling/importance_sampling_ratio/max": 2.0,
            "sampling/importance_sampling_ratio/clipped": 1 / 3,
            "sampling/kl": sum(k3) / 3,
        },
        rel=1e-5,
    )
    both = measured([[0.5, -0.5], [1.0], [2.0]], "sequence_mask").metrics()
    assert both["sampling/importance_sampling_ratio/mean"] == pytest.approx((1 + math.e) / 3)
    assert both["sampling/importance_sampling_ratio/min"] == 0  # the one that is masked
    assert both["sampling/importance_sampling_ratio/clipped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", MODES)
def test_the_mismatch_adds_up_and_leaves_out_what_does_not_count(mode: str) -> None:
    rows: list[list[float]] = [[0.3, -0.2, 0.1], [], [1.4], [-0.7, 0.2]]
    whole = measured(rows, mode)
    parts = measured(rows[:2], mode) + Mismatch() + measured(rows[2:], mode)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-5)
    without = measured([row for row in rows if row], mode)
    assert whole.metrics() == pytest.approx(without.metrics(), rel=1e-5)
    nothing = torch.zeros(2, 3)
    empty = ImportanceRatio(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool))
    assert mismatch(nothing, nothing, nothing, empty).metrics() == {}


def test_the_kl_estimate_is_unbiased_under_the_sampler() -> None:
    pi, mu = POLICY.log_softmax(0), SAMPLER.log_softmax(0)
    each = [
        measured([[float(p - m)]], "token_mask", **FREE).kl for p, m in zip(pi, mu, strict=True)
    ]
    mean = (mu.exp() * torch.tensor(each, dtype=torch.float64)).sum()
    assert float(mean) == pytest.approx(float((mu.exp() * (mu - pi)).sum()), rel=1e-5)
    # Differences far below a float32's resolution of 1 are no rounding.
    assert measured([[1e-4]], "token_mask").kl == pytest.approx(5e-9, rel=1e-2)
