"""The text prior: what its sign does to a pair's gradient, its size, whose it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.losses.objective import AnswerKey, PreferenceLogps
from tests.losses.pairs import flat, term, with_gradient

RHO_0 = -2.0


def pull(kind: str, gap: float, **options: Any) -> float:
    """Size of the gradient on the chosen answer of an untrained policy, where the text finds the
    chosen answer ``gap`` nats a token likelier than the rejected one."""
    values: dict[AnswerKey, float] = {("input", a): RHO_0 for a in ("chosen", "spurious")}
    values |= {("text", "chosen"): -20 + 2 * gap, ("text", "spurious"): -20.0}
    for branch in ("negative", "irrelevant"):
        values |= {(branch, "chosen"): RHO_0, (branch, "spurious"): RHO_0}
    leaves = with_gradient(flat(values))
    extra = {"lambda_av": 0} if kind == "avem_dpo" else {}
    term(kind, text_prior="policy", **extra, **options)(leaves).rows.sum().backward()
    assert leaves.policy["text", "chosen"].grad is None
    grad = leaves.policy["input", "chosen"].grad
    assert grad is not None
    return float(grad.abs().sum())


@pytest.mark.parametrize("kind", ["avem_dpo", "mod_dpo_plus_plus"])
def test_plus_learns_more_where_the_text_favours_the_rejected_answer(kind: str) -> None:
    even = pull(kind, 0.0)
    assert pull(kind, -2.0) > even > pull(kind, 2.0)
    assert pull(kind, -2.0) == pull(kind, -2.0, sign="plus")
    # as published, it learns less from just these pairs
    assert pull(kind, -2.0, sign="minus") < even < pull(kind, 2.0, sign="minus")
    without = kind.removesuffix("_plus_plus")  # which is what gamma 0 is called
    assert pull(without, -2.0, gamma=0) == pull(without, 2.0, gamma=0) == even


def test_plus_follows_from_the_objective() -> None:
    """The policy that maximises E[r - gamma log text] - beta KL(pi || reference) has exactly the
    reward's margins: so it is where the loss, averaged over preferences drawn from the reward, is
    least. With minus it is not."""
    torch.manual_seed(0)
    beta, gamma, answers = 0.4, 0.3, 4
    reward = torch.randn(answers, dtype=torch.float64)
    reference, text = torch.randn(2, answers, dtype=torch.float64).log_softmax(1)
    best = (reference + (reward - gamma * text) / beta).log_softmax(0)

    def slope(sign: str) -> float:
        policy = best.clone().requires_grad_()
        one = term(
            "avem_dpo",
            beta=beta,
            gamma=gamma,
            lambda_av=0,
            sign=sign,
            text_clamp=None,
            text_average=False,
            text_prior="reference",
        )
        pairs = [(w, x) for w in range(answers) for x in range(answers) if w != x]
        chosen, rejected = (torch.tensor(side) for side in zip(*pairs, strict=True))
        wins = torch.sigmoid(reward[chosen] - reward[rejected])
        rows = one(of_one_token(policy, reference, text, chosen, rejected)).rows
        return float(torch.autograd.grad((wins * rows).sum(), policy)[0].abs().max())

    assert slope("plus") < 1e-12
    assert slope("minus") > 0.01


def of_one_token(
    policy: Tensor, reference: Tensor, text: Tensor, chosen: Tensor, rejected: Tensor
) -> PreferenceLogps:
    """Pairs of one-token answers under given distributions over them."""
    rows = len(chosen)

    def both(logps: Tensor, branch: Any) -> dict[AnswerKey, Tensor]:
        return {
            (branch, "chosen"): logps[chosen][:, None],
            (branch, "spurious"): logps[rejected][:, None],
        }

    references = {**both(reference, "input"), **both(text, "text")}
    here = torch.ones(rows, dtype=torch.bool)
    none: dict[AnswerKey, Tensor] = {(b, "hallucinated"): ~here for b in ("input", "text")}
    absent = {place: torch.zeros(rows, 1, dtype=torch.float64) for place in none}
    return PreferenceLogps(
        {**both(policy, "input"), **absent},
        {**references, **absent},
        dict.fromkeys(("chosen", "spurious", "hallucinated"), here[:, None]),
        {},
        {**dict.fromkeys(references, here), **none},
    )


def test_by_default_no_pair_is_silenced_and_a_summed_gap_would_silence_some() -> None:
    """The reference's example: 20 nats at gamma 0.2 weigh a pair 0.018 or 0.98."""
    even = pull("avem_dpo", 0.0, gamma=0)  # sigmoid(0) = 0.5

    def weight(**options: Any) -> list[float]:
        return [0.5 * pull("avem_dpo", gap, **options) / even for gap in (10.0, -10.0)]

    summed = weight(text_average=False, text_clamp=None)
    assert summed == pytest.approx([1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))])
    assert weight() == pytest.approx([1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))])
    assert weight(text_average=False) == pytest.approx(weight())


def test_the_gap_per_token_does_not_see_length() -> None:
    """Two answers that the text finds equally likely a token, one twice as long."""
    values: dict[AnswerKey, float] = {
        (branch, answer): -4.0 for branch in ("input", "text") for answer in ("chosen", "spurious")
    }
    logps = flat(values)
    logps.mask["spurious"][:, 1] = False
    for average, moved in ((True, False), (False, True)):
        one = {"lambda_av": 0, "text_average": average}
        with_gap, without = (term("avem_dpo", **one, gamma=gamma)(logps).rows for gamma in (0.2, 0))
        assert bool((with_gap - without).abs() > 1e-3) == moved


def test_whose_prior_it_is() -> None:
    for kind, default in (("avem_dpo", "policy"), ("mod_dpo_plus_plus", "reference")):
        for whose in (None, "policy", "reference"):
            one = term(kind) if whose is None else term(kind, text_prior=whose)
            needs = [need for need in one.needs() if need.branch == "text"]
            assert len(needs) == 3
            for need in needs:
                assert not need.grad
                assert need.policy == ((whose or default) == "policy")
                assert need.reference != need.policy
