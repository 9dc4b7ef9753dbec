"""Label smoothing: what it makes of a pair, its limits, and that it corrects for flipped labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmemo.errors import ConfigError
from mmemo.losses.base import AnswerKey, PreferenceLogps
from mmemo.losses.dpo import Dpo
from tests.losses.pairs import draw, flat, loss_of, term, with_gradient

VARIANTS = ("sigmoid", "robust")


def pair(margin: float, rejected: str = "spurious") -> PreferenceLogps:
    """A pair whose margin at beta 0.5 is ``margin``."""
    values: dict[AnswerKey, float] = {("input", "chosen"): 2 * margin - 3}
    values["input", rejected] = -3.0  # pyright: ignore[reportArgumentType]
    return flat(values)


def test_by_hand() -> None:
    """A margin of 0.8, and one label in five flipped."""
    clean, flipped = loss_of(0.8), loss_of(-0.8)
    wanted = {
        "sigmoid": 0.8 * clean + 0.2 * flipped,
        "robust": (0.8 * clean - 0.2 * flipped) / 0.6,
    }
    assert wanted == pytest.approx({"sigmoid": 0.531101, "robust": 0.104434}, abs=1e-6)
    for loss_type, value in wanted.items():
        out = term("dpo", beta=0.5, loss_type=loss_type, label_smoothing=0.2)(pair(0.8))
        assert float(out.rows[0]) == pytest.approx(value)


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_without_smoothing_it_is_dpo_to_the_bit(loss_type: str) -> None:
    for seed in range(3):
        one, other = with_gradient(draw(seed)), with_gradient(draw(seed))
        plain = term("dpo")(one)
        out = term("dpo", loss_type=loss_type, label_smoothing=0)(other)
        assert torch.equal(out.rows, plain.rows)
        plain.rows.sum().backward()
        out.rows.sum().backward()
        for key, leaf in one.policy.items():
            grad = other.policy[key].grad
            assert (leaf.grad is None) == (grad is None)
            if leaf.grad is not None and grad is not None:
                assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_a_little_smoothing_changes_little(loss_type: str) -> None:
    plain = term("dpo")(draw(1)).rows
    near = term("dpo", loss_type=loss_type, label_smoothing=1e-7)(draw(1)).rows
    torch.testing.assert_close(near, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(near, plain)


def pull(margin: float, **options: Any) -> float:
    """How strongly the chosen answer's reward is raised: -dL/dm."""
    leaves = with_gradient(pair(margin))
    term("dpo", beta=0.5, **options)(leaves).rows.sum().backward()
    grad = leaves.policy["input", "chosen"].grad
    assert grad is not None
    return -float(grad[0, 0]) / 0.5


def test_the_conservative_loss_stops_at_the_margin_of_its_confidence() -> None:
    target = math.log(0.9 / 0.1)
    given: Any = {"label_smoothing": 0.1}
    assert pull(target, **given) == pytest.approx(0, abs=1e-12)
    assert pull(target - 0.5, **given) > 0 > pull(target + 0.5, **given)


def test_the_robust_loss_pulls_at_every_margin_by_a_constant_more() -> None:
    for margin in (-3.0, 0.0, 3.0, 20.0):
        more = pull(margin, loss_type="robust", label_smoothing=0.1) - pull(margin)
        assert more == pytest.approx(0.1 / 0.8)


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.45])
def test_the_robust_loss_is_unbiased_under_flipped_labels_and_the_other_is_not(eps: float) -> None:
    def expected(margin: float, loss_type: str) -> float:
        one = Dpo(loss_type=loss_type, label_smoothing=eps)  # pyright: ignore[reportArgumentType]
        right, wrong = (
            float(one.margin_loss(torch.tensor(m, dtype=torch.float64))) for m in (margin, -margin)
        )
        return (1 - eps) * right + eps * wrong

    for margin in (-2.0, 0.3, 4.0):
        assert expected(margin, "robust") == pytest.approx(loss_of(margin))
        assert expected(margin, "sigmoid") != pytest.approx(loss_of(margin), rel=1e-3)


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, float("nan")])
def test_a_probability_that_says_nothing_is_refused(eps: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        term("dpo", label_smoothing=eps)


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_with_two_rejected_answers_it_is_the_mean_of_their_losses(loss_type: str) -> None:
    given: Any = {"loss_type": loss_type, "label_smoothing": 0.2}
    logps = draw(8)
    each = [term("dpo", rejected=r, **given)(logps).rows for r in ("spurious", "hallucinated")]
    torch.testing.assert_close(term("dpo", **given)(logps).rows, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("loss_type", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "bare"),
    [
        ("avem_dpo", {"gamma": 0, "lambda_av": 0}),
        ("mod_dpo", {"gamma": 0, "beta_inv": 0, "beta_sens": 0}),
        ("mdpo", {"lambda_conditional": 0, "lambda_anchor": 0}),
        ("ddpo", {"changed_weight": 1}),
    ],
)
def test_every_sigmoid_term_is_smoothed_as_dpo_is(
    kind: str, bare: dict[str, Any], loss_type: str
) -> None:
    """Without what they add, with one rejected answer: and dpo's is TRL's."""
    given: Any = {"rejected": "first", "loss_type": loss_type, "label_smoothing": 0.2}
    logps = draw(9)
    wanted = term("dpo", **given)(logps).rows
    torch.testing.assert_close(term(kind, **bare, **given)(logps).rows, wanted)
    assert not torch.allclose(wanted, term("dpo", rejected="first")(logps).rows)
