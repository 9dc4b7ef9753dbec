"""Token-weighted DPO: changed spans weigh more, under the policy and the reference alike."""

from __future__ import annotations

import pytest
import torch

from mmemo.losses.objective import AnswerKey
from tests.losses.pairs import ANSWERS, draw, flat, loss_of, term, with_gradient

VALUES: dict[AnswerKey, float] = {("input", "chosen"): -1.0, ("input", "spurious"): -4.0}


@pytest.mark.parametrize(
    ("average", "margin"),
    [
        # rho a token: 0.5 (chosen), -1 (spurious); the chosen answer's second token is changed
        (False, 0.5 + 3 * 0.5 + 2),
        (True, 0.5 + 1),
    ],
)
def test_by_hand(average: bool, margin: float) -> None:
    logps = flat(VALUES)
    logps.changed["chosen"][:, 1] = True
    out = term("ddpo", changed_weight=3, average=average)(logps)
    assert out.rows.tolist() == pytest.approx([loss_of(0.1 * margin)])


def test_the_average_divides_by_the_weights() -> None:
    logps = flat(VALUES)
    logps.changed["chosen"][:, 1] = True
    logps.policy["input", "chosen"][:, 1] = -1.0  # only the unchanged token has rho 0.5
    out = term("ddpo", changed_weight=3, average=True)(logps)
    assert out.rows.tolist() == pytest.approx([loss_of(0.1 * (0.5 / 4 + 1))])


def test_with_weight_1_it_is_dpo() -> None:
    logps = draw(0)
    assert torch.equal(term("ddpo", changed_weight=1)(logps).rows, term("dpo")(logps).rows)


def test_a_changed_token_gets_that_much_more_of_the_gradient() -> None:
    logps = with_gradient(draw(1))
    term("ddpo", changed_weight=2.5)(logps).rows.sum().backward()
    for answer in ANSWERS:
        grad = logps.policy["input", answer].grad
        assert grad is not None
        for row in range(len(grad)):
            mask, changed = logps.mask[answer][row], logps.changed[answer][row]
            if (mask & changed).any() and (mask & ~changed).any():
                ratio = grad[row][mask & changed][0] / grad[row][mask & ~changed][0]
                assert float(ratio) == pytest.approx(2.5)
