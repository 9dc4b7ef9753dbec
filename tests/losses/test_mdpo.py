"""mDPO by hand, and the anchor alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmemo.losses.objective import AnswerKey
from tests.losses.pairs import beside, draw, flat, loss_of, metric, term

VALUES: dict[AnswerKey, float] = {
    ("input", "chosen"): -1.0,  # rho 1
    ("input", "spurious"): -4.0,  # rho -2
    ("input", "hallucinated"): 2.0,  # rho 4
    ("negative", "chosen"): -6.0,  # rho -4
}


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, (loss_of(0.3) + loss_of(-0.3)) / 2 + loss_of(0.5) + loss_of(0.1)),
        ({"rejected": "spurious"}, loss_of(0.3) + loss_of(0.5) + loss_of(0.1)),
        ({"rejected": "first", "delta": 0.4}, loss_of(0.3) + loss_of(0.5) + loss_of(-0.3)),
        ({"rejected": "spurious", "lambda_anchor": 0}, loss_of(0.3) + loss_of(0.5)),
        ({"rejected": "spurious", "lambda_conditional": 0}, loss_of(0.3) + loss_of(0.1)),
        (
            {"rejected": "spurious", "beta": 0.2, "lambda_anchor": 2, "lambda_conditional": 3},
            loss_of(0.6) + 3 * loss_of(1.0) + 2 * loss_of(0.2),
        ),
    ],
)
def test_by_hand(options: dict[str, Any], loss: float) -> None:
    assert term("mdpo", **options)(flat(VALUES)).rows.tolist() == pytest.approx([loss])


def test_it_is_the_sum_of_dpo_and_what_it_adds() -> None:
    logps = draw(0)
    whole, plain = term("mdpo", lambda_conditional=0)(logps), term("dpo")(logps)
    anchor = term("anchor")(logps)
    torch.testing.assert_close(whole.rows, plain.rows + anchor.rows)
    bare = term("mdpo", lambda_conditional=0, lambda_anchor=0)
    assert torch.equal(bare(logps).rows, plain.rows)
    assert {need.branch for need in bare.needs()} == {"input"}


def test_the_anchor_by_hand() -> None:
    assert term("anchor")(flat(VALUES)).rows.tolist() == pytest.approx([loss_of(0.1)])
    out = term("anchor", beta=0.5, delta=1)(flat(VALUES))
    assert out.rows.tolist() == pytest.approx([loss_of(-0.5)])
    assert metric(out, "rewards/chosen") == pytest.approx(0.5)


def test_the_anchor_stops_what_dpo_allows() -> None:
    """Both answers become less likely, the rejected one more so: dpo falls, the anchor rises."""
    before: dict[AnswerKey, float] = {("input", "chosen"): -2.0, ("input", "spurious"): -2.0}
    after: dict[AnswerKey, float] = {("input", "chosen"): -12.0, ("input", "spurious"): -22.0}

    def losses(kind: str) -> list[float]:
        return [float(term(kind)(flat(values)).rows) for values in (before, after)]

    assert losses("dpo")[1] < losses("dpo")[0]
    assert losses("anchor")[1] > losses("anchor")[0]


def test_the_right_clip_is_preferred_to_the_wrong_one() -> None:
    out = term("mdpo")(flat(VALUES))
    assert metric(out, "modality/margins") == pytest.approx(0.5)
    assert metric(out, "modality/rejected") == pytest.approx(-0.4)
    assert metric(out, "modality/accuracies") == 1
    wrong: dict[AnswerKey, float] = {**VALUES, ("negative", "chosen"): 0.0}
    assert metric(term("mdpo")(flat(wrong)), "modality/accuracies") == 0


def test_a_pair_without_a_negative_has_the_other_two_parts() -> None:
    lacking = {place: x for place, x in VALUES.items() if place[0] != "negative"}
    out = term("mdpo", rejected="spurious")(beside(flat(lacking), flat(VALUES)))
    rest = loss_of(0.3) + loss_of(0.1)
    assert out.counted.tolist() == [True, True]
    assert out.rows.tolist() == pytest.approx([rest, rest + loss_of(0.5)])
    assert metric(out, "modality/counted") == 0.5
    assert metric(out, "modality/margins") == pytest.approx(0.5)


def test_smoothing_is_of_the_answers_alone() -> None:
    given: Any = {"rejected": "spurious", "label_smoothing": 0.2}
    response = 0.8 * loss_of(0.3) + 0.2 * loss_of(-0.3)
    out = term("mdpo", **given)(flat(VALUES))
    assert out.rows.tolist() == pytest.approx([response + loss_of(0.5) + loss_of(0.1)])
