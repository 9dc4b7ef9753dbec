"""MoD-DPO and MoD-DPO++ by hand: tau, the barred branches, joint questions, old names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.config import dump, parse
from mmemo.errors import ConfigError
from mmemo.losses.objective import AnswerKey, ObjectiveConfig, PreferenceLogps
from tests.losses.pairs import (
    BRANCHES,
    at_reference,
    draw,
    flat,
    loss_of,
    metric,
    term,
    with_gradient,
)

VALUES: dict[AnswerKey, float] = {
    ("input", "chosen"): -1.0,
    ("input", "spurious"): -4.0,  # l(input) = 3, l_ref = 0
    ("irrelevant", "chosen"): -2.0,
    ("irrelevant", "spurious"): -3.0,  # l(irrelevant) = 1
    ("negative", "chosen"): -5.0,
    ("negative", "spurious"): -3.0,  # l(negative) = -2
    ("text", "chosen"): -3.0,
    ("text", "spurious"): -1.0,  # -1 a token
}


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        # tau = 0.1 + 0.02 - 0.05 = 0.07; 0.07 * 3 - 0.02 * 1 + 0.05 * -2
        ({}, 0.21 - 0.02 - 0.1),  # the reference finds every answer equally likely
        ({"beta_sens": 0}, 0.12 * 3 - 0.02),
        ({"beta_inv": 0}, 0.05 * 3 - 0.1),
        ({"beta_inv": 0, "beta_sens": 0}, 0.3),
    ],
)
def test_by_hand(options: dict[str, Any], margin: float) -> None:
    one = term("mod_dpo", **options)
    assert "text" not in {need.branch for need in one.needs()}
    out = one(flat(VALUES))
    assert out.rows.tolist() == pytest.approx([loss_of(margin)])
    assert metric(out, "margin") == pytest.approx(margin)
    assert metric(out, "rewards/margins") == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({}, 0.09),  # the reference finds every answer equally likely after the text
        ({"text_prior": "policy"}, 0.09 - 0.05),
        ({"text_prior": "policy", "sign": "minus"}, 0.09 + 0.05),
        ({"text_prior": "policy", "text_average": False, "gamma": 0.2}, 0.09 - 0.4),
        # as printed: the summed gap is -2
        (
            {
                "text_prior": "policy",
                "sign": "minus",
                "text_average": False,
                "text_clamp": None,
                "gamma": 3,
            },
            0.09 + 6,
        ),
    ],
)
def test_plus_plus_by_hand(options: dict[str, Any], margin: float) -> None:
    out = term("mod_dpo_plus_plus", **options)(flat(VALUES))
    assert out.rows.tolist() == pytest.approx([loss_of(margin)])
    assert metric(out, "margin") == pytest.approx(margin)
    assert metric(out, "rewards/margins") == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("old", "kind", "gamma"),
    [
        ({"gamma": 0.05}, "mod_dpo_plus_plus", 0.05),
        ({"gamma": 0.25, "beta_sens": 0.01}, "mod_dpo_plus_plus", 0.25),
        ({"sign": "minus"}, "mod_dpo_plus_plus", 0.05),  # its gamma was the default
        ({"gamma": 0, "sign": "minus", "text_clamp": None}, "mod_dpo", None),
        ({"gamma": 0.0}, "mod_dpo", None),
        ({"beta_inv": 0.1}, "mod_dpo", None),
        ({}, "mod_dpo", None),
    ],
)
def test_configs_from_when_it_had_the_text_term(
    old: dict[str, Any], kind: str, gamma: float | None
) -> None:
    (one,) = parse(ObjectiveConfig, {"terms": [{"kind": "mod_dpo", **old}]}).terms
    found = dump(one)
    assert (one.kind, one.title, found.get("gamma")) == (kind, kind, gamma)
    kept = old if gamma else {name: x for name, x in old.items() if name == "beta_inv"}
    assert {name: found[name] for name in kept} == kept
    assert parse(ObjectiveConfig, {"terms": [found]}).terms == [one]


def test_plus_plus_without_its_text_term_is_named_as_what_it_is() -> None:
    with pytest.raises(ConfigError, match="give kind: mod_dpo and leave gamma out"):
        term("mod_dpo_plus_plus", gamma=0)
    with pytest.raises(ConfigError, match="'gama': did you mean 'gamma'"):
        term("mod_dpo_plus_plus", gama=1)


def test_two_rejected_answers() -> None:
    values: dict[AnswerKey, float] = {**VALUES, **{(b, "hallucinated"): -2.0 for b in BRANCHES}}
    # 0.07 * 1 - 0.02 * 0 + 0.05 * -3 = -0.08
    out = term("mod_dpo")(flat(values))
    assert out.rows.tolist() == pytest.approx([(loss_of(0.09) + loss_of(-0.08)) / 2])
    assert metric(out, "margin") == pytest.approx(0.005)


def test_the_reference_has_beta_and_not_tau() -> None:
    logps = flat(VALUES)
    logps.reference["input", "spurious"].sub_(1.0)  # l_ref = 2
    out = term("mod_dpo")(logps)
    assert out.rows.tolist() == pytest.approx([loss_of(0.09 - 0.1 * 2)])


def test_where_replacing_a_modality_changes_nothing_an_untrained_policy_is_at_margin_0() -> None:
    logps = at_reference(draw(0))
    same: dict[AnswerKey, Tensor] = {
        (branch, answer): logps.policy["input", answer] for branch, answer in logps.policy
    }
    blind = PreferenceLogps(same, logps.reference, logps.mask, logps.changed, logps.present)
    assert metric(term("mod_dpo")(blind), "margin") == pytest.approx(0.0, abs=1e-12)
    # and else it is where the two modalities put it, as documented
    moved = {"invariant": {"beta_sens": 0}, "sensitive": {"beta_inv": 0}}
    for options in moved.values():
        assert abs(metric(term("mod_dpo", **options)(logps), "margin")) > 1e-3


def test_without_its_extras_it_is_dpo() -> None:
    logps = draw(1)
    bare = term("mod_dpo", beta_inv=0, beta_sens=0)(logps)
    torch.testing.assert_close(bare.rows, term("dpo")(logps).rows)


def test_which_way_the_replaced_modalities_move_a_pair() -> None:
    """By sigmoid(-margin): more is learnt from a pair that the irrelevant modality's replacement
    keeps apart, or that the relevant one's replacement does not."""

    def pull(**changes: float) -> float:
        values = dict(VALUES)
        for branch, by in changes.items():
            values[branch, "chosen"] += by  # pyright: ignore[reportArgumentType]
        leaves = with_gradient(flat(values))
        term("mod_dpo")(leaves).rows.sum().backward()
        grad = leaves.policy["input", "chosen"].grad
        assert grad is not None
        return float(grad.abs().sum())

    assert pull(irrelevant=2.0) > pull() > pull(irrelevant=-2.0)
    assert pull(negative=-2.0) > pull() > pull(negative=2.0)


def test_joint_questions_have_no_irrelevant_modality() -> None:
    absent: Any = {1: {("irrelevant", a) for a in ("chosen", "spurious", "hallucinated")}}
    logps = draw(2, 3, absent)
    assert term("mod_dpo")(logps).counted.tolist() == [True, False, True]
    assert term("mod_dpo", beta_inv=0)(logps).counted.all()


def test_a_sensitivity_that_unlearns_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower beta_sens"):
        term("mod_dpo", beta_sens=0.13)
    term("mod_dpo", beta_sens=0.119)


@pytest.mark.parametrize("branch", ["negative", "irrelevant"])
def test_a_pair_that_lacks_a_replaced_clip_is_not_counted(branch: str) -> None:
    """The margin is derived with both; without one it would be another method's."""
    values = {place: x for place, x in VALUES.items() if place[0] != branch}
    out = term("mod_dpo")(flat(values))
    assert (out.counted.tolist(), out.rows.tolist()) == ([False], [0.0])
    option = {"negative": "beta_sens", "irrelevant": "beta_inv"}[branch]
    assert term("mod_dpo", **{option: 0})(flat(values)).counted.all()


def test_smoothing_by_hand() -> None:
    right, wrong = loss_of(0.09), loss_of(-0.09)
    wanted = {"sigmoid": 0.9 * right + 0.1 * wrong, "robust": (0.9 * right - 0.1 * wrong) / 0.8}
    for loss_type, loss in wanted.items():
        out = term("mod_dpo", loss_type=loss_type, label_smoothing=0.1)(flat(VALUES))
        assert out.rows.tolist() == pytest.approx([loss])
