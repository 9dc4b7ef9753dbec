"""What holds for every term: where it starts, what gets a gradient, which pairs count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmemo.losses.base import log_ratio, sum_and_count, token_sum
from mmemo.losses.objective import Answer, AnswerKey, PreferenceLogps, PreferenceTerm, Term
from tests.losses.pairs import (
    ANSWERS,
    KEYS,
    KINDS,
    at_reference,
    draw,
    metric,
    row_of,
    term,
    with_gradient,
)

LOG2 = math.log(2)
PARTED = ("avem_dpo", "mdpo")
PAIRED = ("avem_dpo", "mod_dpo", "mod_dpo_plus_plus", "mdpo", "dpo", "ipo", "ddpo")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("avem_dpo", {"lambda_av": 0, "gamma": 0}),
    ("avem_dpo", {"rejected": "first", "text_prior": "reference", "sign": "minus"}),
    ("avem_dpo", {"text_average": False, "text_clamp": None, "beta_vr": 0.7}),
    ("mod_dpo", {"beta_inv": 0, "beta_sens": 0}),
    ("mod_dpo_plus_plus", {"text_prior": "policy"}),
    ("mdpo", {"lambda_conditional": 0, "delta": 0.3}),
    ("dpo", {"rejected": "spurious"}),
    ("dpo", {"label_smoothing": 0.1}),
    ("dpo", {"label_smoothing": 0.1, "loss_type": "robust"}),
    ("avem_dpo", {"label_smoothing": 0.1}),
    ("mod_dpo", {"label_smoothing": 0.2, "loss_type": "robust"}),
    ("mdpo", {"label_smoothing": 0.3, "loss_type": "robust"}),
    ("ddpo", {"label_smoothing": 0.1}),
    ("ipo", {"average": False, "rejected": "hallucinated"}),
    ("ddpo", {"average": True, "changed_weight": 3}),
]
every_variant = pytest.mark.parametrize(
    ("kind", "options"), VARIANTS, ids=[f"{k}-{'-'.join(o)}" for k, o in VARIANTS]
)
lacking = st.dictionaries(st.integers(0, 4), st.sets(st.sampled_from(KEYS), max_size=5))


@pytest.mark.parametrize("rejected", ["both", "first", "spurious", "hallucinated"])
@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        ("dpo", {}, LOG2),
        ("ddpo", {"changed_weight": 3}, LOG2),
        ("ddpo", {"average": True}, LOG2),
        ("ipo", {}, 25.0),  # (1 / 2 beta)^2
        ("ipo", {"average": False}, 25.0),
        ("mdpo", {}, 3 * LOG2),
        ("avem_dpo", {"gamma": 0}, 2 * LOG2),
        ("avem_dpo", {"gamma": 0, "beta_vr": 0.7}, 2 * LOG2),
        ("avem_dpo", {"gamma": 0, "lambda_av": 0}, LOG2),
        ("mod_dpo", {"beta_inv": 0, "beta_sens": 0}, LOG2),
    ],
)
def test_a_policy_that_is_the_reference_starts_at_margin_0(
    kind: str, options: dict[str, Any], loss: float, rejected: str
) -> None:
    """Whatever the answers' lengths, and with one rejected answer or two: the reference is
    weighted as the policy."""
    absent: Any = {1: {("input", "spurious")}, 2: {("input", "hallucinated")}}
    for seed in range(5):
        out = term(kind, rejected=rejected, **options)(at_reference(draw(seed, 4, absent)))
        assert out.counted.sum() >= 3
        assert out.rows[out.counted].tolist() == pytest.approx([loss] * int(out.counted.sum()))
        for name in out.metrics:
            if name == "modality/counted":
                assert metric(out, name) == 1
            elif name.startswith(("rewards/", "modality/")) and "loss" not in name:
                assert metric(out, name) == 0, name


def test_the_anchor_starts_at_0_too() -> None:
    out = term("anchor")(at_reference(draw(0)))
    assert out.rows.tolist() == pytest.approx([LOG2] * 4)
    assert metric(out, "rewards/chosen") == 0


def gradients(one: Term, logps: PreferenceLogps) -> dict[tuple[str, AnswerKey], Tensor]:
    """Gradients of the summed loss where there are any."""
    leaves = with_gradient(logps)
    one(leaves).rows.sum().backward()
    both = (("policy", leaves.policy), ("reference", leaves.reference))
    return {(who, p): x.grad for who, side in both for p, x in side.items() if x.grad is not None}


@every_variant
def test_the_gradient_reaches_what_asks_for_one_and_nothing_else(
    kind: str, options: dict[str, Any]
) -> None:
    """Every answer's tokens of the policy, rejected ones included; never the reference, the text
    branch or a barred branch, though all of them ask for a gradient here."""
    one, logps = term(kind, **options), draw(3)
    found = gradients(one, logps)
    wanted = {("policy", need.key) for need in one.needs() if need.grad and need.policy}
    if options.get("rejected") == "first":  # every pair has a spurious answer
        wanted.discard(("policy", ("input", "hallucinated")))
    assert {key for key, grad in found.items() if grad.any()} == wanted
    for (_, place), grad in found.items():
        assert torch.isfinite(grad).all()
        assert not grad[~logps.mask[place[1]]].any()
        if ("policy", place) in wanted:
            assert (grad != 0)[logps.mask[place[1]]].all()


@every_variant
def test_gradients_are_those_of_finite_differences(kind: str, options: dict[str, Any]) -> None:
    one, logps = term(kind, **options), draw(4, 3)
    found, step = gradients(one, logps), 1e-5
    for need in one.needs():
        if not (need.grad and need.policy):
            continue
        for row, at in logps.mask[need.answer].nonzero().tolist():
            ends: list[float] = []
            for sign in (1, -1):
                moved = {p: x.clone() for p, x in logps.policy.items()}
                moved[need.key][row, at] += sign * step
                args = (moved, logps.reference, logps.mask, logps.changed, logps.present)
                ends.append(float(one(PreferenceLogps(*args)).rows.sum()))
            slope = (ends[0] - ends[1]) / (2 * step)
            # beta is 0.1, so a token's slope is about 0.05
            grad = found.get(("policy", need.key), torch.zeros_like(logps.policy[need.key]))
            assert float(grad[row, at]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", [*PAIRED, "anchor", "sft"])
def test_descent_raises_the_chosen_answer_and_lowers_the_others(kind: str) -> None:
    one, logps = term(kind), draw(5)
    found = gradients(one, logps)
    for (_, place), grad in found.items():
        good = place == ("input", "chosen")
        here = grad[logps.mask[place[1]]]
        assert (here < 0).all() if good else (here > 0).all(), place


@every_variant
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), absent=lacking)
def test_a_pair_that_lacks_something_is_left_out_and_changes_no_other(
    kind: str, options: dict[str, Any], seed: int, absent: dict[int, set[AnswerKey]]
) -> None:
    one, logps = term(kind, **options), draw(seed, 5, absent)
    whole = one(logps)
    assert torch.isfinite(whole.rows).all()
    for row in range(5):
        lacks, asked = absent.get(row, set()), [need.key for need in one.needs()]
        if kind in PARTED:  # a pair without a negative only lacks that part
            asked = [key for key in asked if key[0] != "negative"]
        have = {a: not any(p in lacks for p in asked if p[1] == a) for a in ANSWERS}
        rejected = {place[1] for place in asked} - {"chosen"}
        counts = have["chosen"] and (not rejected or any(have[a] for a in rejected))
        assert bool(whole.counted[row]) == counts
        if not counts:
            assert whole.rows[row] == 0
        alone = one(row_of(logps, row))
        assert torch.equal(alone.rows[0], whole.rows[row])
    for name, (total, count) in whole.metrics.items():
        assert torch.isfinite(total), name
        assert count <= whole.counted.sum()
        if not name.endswith(ANSWERS[1:]) and not name.startswith("modality/"):
            assert count == whole.counted.sum(), name
    for (_, place), grad in gradients(one, logps).items():
        assert not grad[~whole.counted].any(), place


@every_variant
def test_needs_lists_all_that_is_read(kind: str, options: dict[str, Any]) -> None:
    one, logps = term(kind, **options), draw(6)
    needs = one.needs()
    assert len({need.key for need in needs}) == len(needs)
    assert all(need.policy or need.reference for need in needs)
    answers: set[Answer] = {need.answer for need in needs}
    mask: dict[Answer, Tensor] = {a: logps.mask[a] for a in answers}
    changed: dict[Answer, Tensor] = {a: logps.changed[a] for a in answers if kind == "ddpo"}
    bare = PreferenceLogps(
        {n.key: logps.policy[n.key] for n in needs if n.policy},
        {n.key: logps.reference[n.key] for n in needs if n.reference},
        mask,
        changed,
        {n.key: logps.present[n.key] for n in needs},
    )
    assert torch.equal(one(bare).rows, one(logps).rows)


@pytest.mark.parametrize("kind", PAIRED)
@pytest.mark.parametrize("only", ["spurious", "hallucinated"])
def test_the_only_rejected_answer_has_all_the_weight(kind: str, only: Any) -> None:
    other = {"spurious": "hallucinated", "hallucinated": "spurious"}[only]
    absent: Any = {row: {(branch, other) for branch, _ in KEYS} for row in range(4)}
    logps = draw(7, 4, absent)
    out = term(kind)(logps)
    assert out.counted.all()
    for rejected in (only, "first"):
        assert torch.equal(term(kind, rejected=rejected)(logps).rows, out.rows)
    assert not term(kind, rejected=other)(logps).counted.any()
    assert out.metrics[f"rewards/{other}"][1] == 0


@pytest.mark.parametrize("kind", ["dpo", "ipo", "ddpo", "mod_dpo", "mod_dpo_plus_plus"])
def test_with_two_rejected_answers_it_is_the_mean_of_their_losses(kind: str) -> None:
    logps = draw(8)
    each = [term(kind, rejected=r)(logps) for r in ("spurious", "hallucinated")]
    both = term(kind)(logps)
    torch.testing.assert_close(both.rows, (each[0].rows + each[1].rows) / 2)
    for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"):
        assert metric(both, name) == pytest.approx(sum(metric(x, name) for x in each) / 2)


def test_first_takes_the_spurious_answer_where_there_is_one() -> None:
    logps = draw(9, 2, {1: {("input", "spurious")}})
    first = term("dpo", rejected="first")(logps)
    assert first.rows[0] == term("dpo", rejected="spurious")(logps).rows[0]
    assert first.rows[1] == term("dpo", rejected="hallucinated")(logps).rows[1]
    assert [int(first.metrics[f"rewards/{a}"][1]) for a in ANSWERS[1:]] == [1, 1]


def test_terms_are_settings_that_cannot_change() -> None:
    one: Any = term("dpo")
    assert issubclass(type(one), PreferenceTerm)
    with pytest.raises(ValueError, match="frozen"):
        one.beta = 0.5


def test_sums_are_in_float32_at_least_and_see_no_padding() -> None:
    logps = draw(10)
    place: AnswerKey = ("input", "chosen")
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        total = token_sum(logps, place, logps.policy[place].to(dtype))
        assert total.dtype == wide
        assert torch.isfinite(total).all()
    rho = log_ratio(logps, place)
    mask = logps.mask["chosen"]
    for row in range(4):
        policy, reference = (
            side[place][row, mask[row]].sum() for side in (logps.policy, logps.reference)
        )
        assert float(rho[row]) == pytest.approx(float(policy - reference))


def test_a_metric_over_no_pair_is_0_of_0() -> None:
    total, count = sum_and_count(torch.full((3,), torch.nan), torch.zeros(3, dtype=torch.bool))
    assert (float(total), int(count)) == (0.0, 0)
