"""AVEm-DPO by hand: both rejected answers, the negative, the text prior, the ablations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmemo.errors import ConfigError
from mmemo.losses.objective import AnswerKey
from tests.losses.pairs import (
    ANSWERS,
    beside,
    draw,
    flat,
    loss_of,
    metric,
    term,
    with_gradient,
)

VALUES: dict[AnswerKey, float] = {
    ("input", "chosen"): -1.0,  # rho 1
    ("input", "spurious"): -4.0,  # rho -2
    ("input", "hallucinated"): -3.0,  # rho -1
    ("negative", "chosen"): -6.0,  # rho -4
    ("text", "chosen"): -3.0,  # -1.5 a token
    ("text", "spurious"): -1.0,  # -0.5
    ("text", "hallucinated"): -2.0,  # -1
}


@pytest.mark.parametrize(
    ("options", "response", "modality"),
    [
        # 0.1 * (1 + 1 + 0.5) = 0.25; the gap is -1.5 + 0.75 = -0.75, times 0.2
        ({}, 0.25 - 0.15, 0.5),
        ({"sign": "minus"}, 0.25 + 0.15, 0.5),
        ({"text_average": False}, 0.25 - 0.3, 0.5),
        ({"text_average": False, "text_clamp": 0.5}, 0.25 - 0.1, 0.5),
        ({"gamma": 1, "text_clamp": None, "text_average": False}, 0.25 - 1.5, 0.5),
        # as printed: 0.25 - 0.2 * (-3 + 0.5 + 1)
        ({"sign": "minus", "text_average": False, "text_clamp": None}, 0.25 + 0.3, 0.5),
        ({"text_prior": "reference"}, 0.25, 0.5),  # it finds every answer equally likely
        ({"gamma": 0}, 0.25, 0.5),
        ({"gamma": 0, "beta": 0.2}, 0.5, 1.0),
        ({"gamma": 0, "beta_vr": 0.7}, 0.1 * (1 + 1.4 + 0.3), 0.5),
        ({"beta_vr": 0.7}, 0.27 + 0.2 * (-1.5 + 0.7 * 0.5 + 0.3), 0.5),
        ({"gamma": 0, "rejected": "first"}, 0.3, 0.5),
        ({"gamma": 0, "rejected": "hallucinated"}, 0.2, 0.5),
        ({"rejected": "hallucinated"}, 0.2 - 0.2 * 0.5, 0.5),
        ({"gamma": 0, "lambda_av": 0}, 0.25, None),
        ({"gamma": 0, "lambda_av": 3}, 0.25, 0.5),
    ],
)
def test_by_hand(options: dict[str, Any], response: float, modality: float | None) -> None:
    out = term("avem_dpo", **options)(flat(VALUES))
    factor = options.get("lambda_av", 1)
    wanted = loss_of(response) + (0 if modality is None else factor * loss_of(modality))
    assert out.rows.tolist() == pytest.approx([wanted])
    assert metric(out, "response/loss") == pytest.approx(loss_of(response))
    assert ("modality/loss" in out.metrics) == (modality is not None)
    if modality is not None:
        assert metric(out, "modality/loss") == pytest.approx(loss_of(modality))
        assert metric(out, "modality/margins") == pytest.approx(modality)
        assert metric(out, "modality/accuracies") == 1


def test_rewards_are_logged_without_the_text_prior() -> None:
    out = term("avem_dpo")(flat(VALUES))
    found = {name: metric(out, name) for name in out.metrics}
    assert found["rewards/chosen"] == pytest.approx(0.1)
    assert found["rewards/spurious"] == pytest.approx(-0.2)
    assert found["rewards/hallucinated"] == pytest.approx(-0.1)
    assert found["rewards/rejected"] == pytest.approx(-0.15)
    assert found["rewards/margins"] == pytest.approx(0.25)
    assert found["rewards/accuracies"] == 1
    assert found["modality/rejected"] == pytest.approx(-0.4)
    assert found["text_prior/gap"] == pytest.approx(-0.75)
    beaten: dict[AnswerKey, float] = {**VALUES, ("input", "spurious"): 3.0}
    assert metric(term("avem_dpo")(flat(beaten)), "rewards/accuracies") == 0.5


def test_the_only_rejected_answer_has_weight_1_in_the_text_prior_too() -> None:
    values = {place: x for place, x in VALUES.items() if place[1] != "hallucinated"}
    out = term("avem_dpo", beta_vr=0.3)(flat(values))
    # 0.1 * (1 + 2) + 0.2 * (-1.5 + 0.5)
    assert out.rows.tolist() == pytest.approx([loss_of(0.1) + loss_of(0.5)])


def test_the_two_shares_add_up_and_neither_is_nothing() -> None:
    """So weighting the policy and not the reference, or the reverse, would show."""
    logps = flat({**VALUES, ("input", "spurious"): -2.0, ("input", "hallucinated"): -2.0})
    for share in (0.1, 0.5, 0.9):  # rho of both is 0, whatever they weigh
        out = term("avem_dpo", beta_vr=share, gamma=0, lambda_av=0)(logps)
        assert out.rows.tolist() == pytest.approx([loss_of(0.1)])
    for bad in (0, 1, -0.5):
        with pytest.raises(Exception, match="beta_vr"):
            term("avem_dpo", beta_vr=bad)


def test_without_its_extras_and_with_one_rejected_answer_it_is_dpo() -> None:
    logps = draw(0)
    for rejected in ("spurious", "hallucinated", "first"):
        bare = term("avem_dpo", rejected=rejected, gamma=0, lambda_av=0)(logps)
        assert torch.equal(bare.rows, term("dpo", rejected=rejected)(logps).rows)


def test_ablations_ask_for_no_branch_that_they_do_not_read() -> None:
    def branches(**options: Any) -> set[str]:
        return {need.branch for need in term("avem_dpo", **options).needs()}

    assert branches() == {"input", "negative", "text"}
    assert branches(lambda_av=0) == {"input", "text"}
    assert branches(gamma=0) == {"input", "negative"}


@pytest.mark.parametrize(
    ("single", "margin"),
    [
        # rho of the chosen answer is 1, of the rejected one -2; the gap is -1.5 and -0.5 a token
        ("full_weight", 0.1 * (1 + 2) + 0.2 * (-1.5 + 0.5)),
        ("own_weight", 0.1 * (1 + 0.3 * 2) + 0.2 * (-1.5 + 0.3 * 0.5)),
        ("leave_out", None),
    ],
)
def test_a_pair_with_one_rejected_answer(single: str, margin: float | None) -> None:
    values = {place: x for place, x in VALUES.items() if place[1] != "hallucinated"}
    out = term("avem_dpo", beta_vr=0.3, lambda_av=0, single_rejected=single)(flat(values))
    assert out.counted.tolist() == [margin is not None]
    assert out.rows.tolist() == pytest.approx([0.0 if margin is None else loss_of(margin)])
    # What is reported of the answers does not depend on it.
    if margin is not None:
        assert metric(out, "rewards/margins") == pytest.approx(0.1 * (1 + 2))
        assert metric(out, "rewards/accuracies") == 1
    # Nor does a pair with both.
    both = flat(VALUES)
    assert torch.equal(
        term("avem_dpo", single_rejected=single)(both).rows, term("avem_dpo")(both).rows
    )


def test_a_setting_for_one_rejected_answer_needs_pairs_that_may_have_two() -> None:
    with pytest.raises(ConfigError, match="single_rejected has no effect with rejected: first"):
        term("avem_dpo", rejected="first", single_rejected="own_weight")


WITHOUT_NEGATIVE = {place: x for place, x in VALUES.items() if place[0] != "negative"}


@pytest.mark.parametrize("lambda_av", [1, 3])
def test_a_pair_without_a_negative_is_left_out_of_the_modality_preference_alone(
    lambda_av: float,
) -> None:
    """Of two pairs one has no negative: both have the response's loss, one has the other part."""
    both = beside(flat(VALUES), flat(WITHOUT_NEGATIVE))
    out = term("avem_dpo", lambda_av=lambda_av)(both)
    assert out.counted.tolist() == [True, True]
    assert out.rows.tolist() == pytest.approx(
        [loss_of(0.1) + lambda_av * loss_of(0.5), loss_of(0.1)]
    )
    assert metric(out, "response/loss") == pytest.approx(loss_of(0.1))
    assert metric(out, "modality/loss") == pytest.approx(loss_of(0.5))  # of the one that has it
    assert metric(out, "modality/margins") == pytest.approx(0.5)
    assert metric(out, "modality/counted") == 0.5
    assert [int(out.metrics[f"modality/{n}"][1]) for n in ("loss", "rejected")] == [1, 1]


def test_a_pair_without_a_negative_moves_its_answers_and_no_negative() -> None:
    """By the response's gradient, to the bit: as without the modality preference."""
    found: list[dict[AnswerKey, torch.Tensor]] = []
    for lambda_av in (1, 0):
        leaves = with_gradient(flat(WITHOUT_NEGATIVE))
        term("avem_dpo", lambda_av=lambda_av)(leaves).rows.sum().backward()
        found.append({p: x.grad for p, x in leaves.policy.items() if x.grad is not None})
    assert not found[0].pop(("negative", "chosen")).any()
    assert found[0].keys() == found[1].keys()
    assert {p for p, grad in found[0].items() if grad.any()} == {
        ("input", answer) for answer in ANSWERS
    }
    assert all(torch.equal(found[0][p], grad) for p, grad in found[1].items())
    # beta * sigmoid(-margin) on each token of the chosen answer
    assert found[0]["input", "chosen"].tolist() == [pytest.approx([-0.1 / (1 + math.exp(0.1))] * 2)]


def test_a_pair_without_the_rejected_answer_that_is_compared_counts_for_neither_part() -> None:
    values = {p: x for p, x in VALUES.items() if p[1] != "spurious"}
    out = term("avem_dpo", rejected="spurious")(flat(values))
    assert not out.counted.any()
    assert out.rows.tolist() == [0.0]
    assert out.metrics["modality/loss"][1] == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_smoothing_is_of_the_answers_and_not_of_the_clips(loss_type: str) -> None:
    """One pair in five is taken to be swapped; which clip is the true one is known."""
    clean, flipped = loss_of(0.1), loss_of(-0.1)
    response = {
        "sigmoid": 0.8 * clean + 0.2 * flipped,
        "robust": (0.8 * clean - 0.2 * flipped) / 0.6,
    }[loss_type]
    out = term("avem_dpo", label_smoothing=0.2, loss_type=loss_type)(flat(VALUES))
    assert metric(out, "response/loss") == pytest.approx(response)
    assert out.rows.tolist() == pytest.approx([response + loss_of(0.5)])
