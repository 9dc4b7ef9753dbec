"""The GRPO loss: what each term does to the gradient, and how rows add up.

That it is TRL's is shown in ``tests/train/grpo/test_trl.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmemo.losses.grpo import GrpoLoss, grpo_loss, grpo_weight

CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo")
LEVELS = ("token", "sequence")


def case(seed: int, lengths: list[int]) -> dict[str, Tensor]:
    """Random log-probabilities of three policies, junk where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(*lengths, 1))

    def draw() -> Tensor:
        return -3 * torch.rand(shape, generator=generator)

    logps = draw()
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    near = logps + 0.3 * torch.randn(shape, generator=generator)
    return {
        "logps": logps,
        "old_logps": torch.where(mask, near, -torch.inf),
        "ref_logps": torch.where(mask, draw(), torch.inf),
        "advantages": torch.randn(len(lengths), generator=generator),
        "mask": mask.long(),
    }


def plain(
    one: dict[str, Tensor], loss_type: str, level: str, beta: float, **limits: float
) -> list[list[float]]:
    """Each token's loss by the formula, a row at a time."""
    found: list[list[float]] = []
    for row, A in enumerate(one["advantages"].tolist()):
        count = int(one["mask"][row].sum())
        logps, olds, refs = (
            one[name][row, :count].tolist() for name in ("logps", "old_logps", "ref_logps")
        )
        ratios = [math.exp(logp - old) for logp, old in zip(logps, olds, strict=True)]
        if level == "sequence" and ratios:
            ratios = [math.prod(ratios) ** (1 / count)] * count
        losses: list[float] = []
        for logp, ref, ratio in zip(logps, refs, ratios, strict=True):
            if loss_type == "cispo":
                policy = min(ratio, limits["high"]) * A * logp
            elif loss_type == "sapo":
                t = 1.0 if A > 0 else 1.05
                policy = 4 / t / (1 + math.exp(-t * (ratio - 1))) * A
            else:
                clipped = min(max(ratio, 1 - limits["low"]), 1 + limits["high"])
                policy = min(min(ratio, limits["delta"]) * A, clipped * A)
            losses.append(-policy + beta * ratio * (math.exp(ref - logp) - (ref - logp) - 1))
        found.append(losses)
    return found


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any),
    beta=st.sampled_from([0.0, 0.04]),
    level=st.sampled_from(LEVELS),
    delta=st.sampled_from([None, 1.3]),
)
def test_every_loss_type_is_its_formula(
    seed: int, lengths: list[int], beta: float, level: str, delta: float | None
) -> None:
    one = case(seed, lengths)
    for name in LOSS_TYPES:
        limits = {"low": 0.1, "high": 0.25, "delta": delta or math.inf}
        sums = [sum(row) for row in plain(one, name, level, beta, **limits)]
        means = [s / max(n, 1) for s, n in zip(sums, lengths, strict=True)]
        mean_row, mean_token = sum(sums) / len(lengths), sum(sums) / sum(lengths)
        expected = {
            "grpo": sum(means) / len(lengths),
            "sapo": sum(means) / len(lengths),
            "dr_grpo": mean_row / 8,
            "luspo": mean_row,
        }
        options: Any = {"loss_type": name, "max_completion_length": 8, "delta": delta}
        options |= {"importance_sampling_level": level, "epsilon": 0.1, "epsilon_high": 0.25}
        out = grpo_loss(**one, beta=beta, **options)
        total = float(out.rows.sum()) / grpo_weight(one["mask"], options["loss_type"])
        assert total == pytest.approx(expected.get(name, mean_token), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_splitting_a_step_changes_nothing_but_for_bnpo(loss_type: Any) -> None:
    one = case(1, [6, 1, 4, 2])
    options: Any = {"loss_type": loss_type, "max_completion_length": 8, "beta": 0.04}

    def step(*cuts: slice) -> float:
        parts = [{name: x[cut] for name, x in one.items()} for cut in cuts]
        weight = sum(grpo_weight(part["mask"], loss_type) for part in parts)
        return sum(float(grpo_loss(**part, **options).rows.sum()) for part in parts) / weight

    whole, uneven = step(slice(0, 4)), step(slice(0, 1), slice(1, 4))
    assert (uneven == pytest.approx(whole, rel=1e-5)) == (loss_type != "bnpo")


def gradient(logps: Tensor, advantages: list[float], **options: Any) -> tuple[Tensor, GrpoLoss]:
    logps = logps.clone().requires_grad_()
    options = {"old_logps": None, "ref_logps": None, "mask": torch.ones_like(logps), **options}
    out = grpo_loss(logps, advantages=torch.tensor(advantages), **options)
    out.rows.sum().backward()
    assert logps.grad is not None
    return logps.grad, out


def test_a_good_answer_becomes_likelier_and_a_bad_one_less_likely() -> None:
    grad, _ = gradient(torch.full((3, 2), -1.0), [1.0, -2.0, 0.0], loss_type="dapo")
    assert grad.tolist() == [[-1.0, -1.0], [2.0, 2.0], [0.0, 0.0]]


def test_the_kl_pulls_towards_the_reference() -> None:
    logps = torch.tensor([[-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.0, -0.5]])
    for corrected in (True, False):
        grad, out = gradient(
            logps, [0.0], ref_logps=ref, beta=0.1, use_bias_correction_kl=corrected
        )
        # Descent lowers what the reference finds unlikely, and raises what it finds likely.
        assert grad[0, 0] > 0
        assert grad[0, 1] == 0
        assert grad[0, 2] < 0
        total, count = out.metrics["kl"]
        assert count == 3
        assert total > 0
    # Where policy and reference are one, nothing pulls and the divergence is 0.
    grad, out = gradient(logps, [0.0], ref_logps=logps, beta=0.1)
    assert grad.abs().sum() == 0
    assert out.metrics["kl"][0] == 0


def test_the_corrected_kl_is_unbiased() -> None:
    """Its expected gradient over the policy's samples is that of the reverse KL; without the
    ratio it is not."""
    theta = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.5, 0.4, 0.1, 0.2], dtype=torch.float64).log_softmax(0)
    logps = theta.log_softmax(0)
    wanted = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), theta, retain_graph=True)[0]
    zeros, mask = torch.zeros(4, dtype=torch.float64), torch.ones(4, 1)
    found = []
    for corrected in (True, False):
        out = grpo_loss(
            logps[:, None],
            None,
            ref[:, None],
            zeros,
            mask,
            beta=1.0,
            use_bias_correction_kl=corrected,
        )
        expected = (logps.detach().exp() * out.rows).sum()
        found.append(torch.autograd.grad(expected, theta, retain_graph=True)[0])
    torch.testing.assert_close(found[0], wanted)
    assert (found[1] - wanted).abs().max() > 0.01


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves", "counted"),
    [
        (1.5, 1.0, False, "high"),  # already likelier: no more
        (1.5, -1.0, True, None),  # likelier, but bad: back
        (0.5, -1.0, False, "low"),
        (0.5, 1.0, True, None),
        (1.25, 1.0, True, None),  # below the raised upper clip
        (0.75, -1.0, False, "low"),
    ],
)
def test_clipping_stops_what_went_far_enough(
    ratio: float, advantage: float, moves: bool, counted: str | None
) -> None:
    logps = torch.full((1, 1), -1.0)
    grad, out = gradient(
        logps, [advantage], old_logps=logps - math.log(ratio), epsilon=0.2, epsilon_high=0.3
    )
    assert bool(grad.abs().sum() > 0) == moves
    for name in ("low", "high"):
        assert out.metrics[f"clip_ratio/{name}_mean"][0] == float(name == counted)
    assert out.metrics["clip_ratio/region_mean"][0] == float(counted is not None)


def test_a_sequence_moves_as_one() -> None:
    """Ratios 1.5 and 0.9 have the geometric mean 1.1619: none or both are clipped, and both have
    the same gradient, 1.1619 / 2 each."""
    logps = torch.full((1, 2), -1.0)
    old = logps - torch.tensor([[1.5, 0.9]]).log()
    options: Any = {"old_logps": old, "importance_sampling_level": "sequence", "loss_type": "grpo"}
    grad, out = gradient(logps, [1.0], epsilon=0.2, **options)
    assert grad.tolist() == [pytest.approx([-math.sqrt(1.35) / 2] * 2, rel=1e-6)]
    assert float(out.rows.detach()) == pytest.approx(-math.sqrt(1.35))
    grad, out = gradient(logps, [1.0], epsilon=0.1, **options)
    assert grad.abs().sum() == 0
    # Counted by the row, as in TRL.
    assert [float(x) for x in out.metrics["clip_ratio/high_mean"]] == [1.0, 1.0]
    # By the token, the first alone is clipped.
    options["importance_sampling_level"] = "token"
    assert gradient(logps, [1.0], epsilon=0.2, **options)[0].tolist() == [
        pytest.approx([0.0, -0.45])
    ]


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "counted"),
    [(1.5, 1.0, 1.5, 0), (6.0, 1.0, 5.0, 1), (6.0, -2.0, -10.0, 0), (0.1, 1.0, 0.1, 0)],
)
def test_cispo_limits_the_weight_and_keeps_the_gradient(
    ratio: float, advantage: float, weight: float, counted: int
) -> None:
    logps = torch.full((1, 1), -2.0)
    grad, out = gradient(
        logps, [advantage], old_logps=logps - math.log(ratio), loss_type="cispo", epsilon_high=5.0
    )
    assert float(grad) == pytest.approx(-weight, rel=1e-5)
    assert float(out.rows.detach()) == pytest.approx(2 * weight, rel=1e-5)
    assert float(out.metrics["cispo_clip_ratio"][0]) == counted


def test_sapo_fades_where_clipping_stops() -> None:
    """4 s(t(r - 1)) (1 - s(t(r - 1))) r A, with a temperature of its own below 0."""
    logps, ratio = torch.full((2, 1), -1.0), torch.tensor([[1.5], [1.5]])
    grad, _ = gradient(
        logps,
        [1.0, -1.0],
        old_logps=logps - ratio.log(),
        loss_type="sapo",
        sapo_temperatures=(1.0, 3.0),
    )
    gates = [1 / (1 + math.exp(-t * 0.5)) for t in (1.0, 3.0)]
    wanted = [-4 * gates[0] * (1 - gates[0]) * 1.5, 4 * gates[1] * (1 - gates[1]) * 1.5]
    assert grad.flatten().tolist() == pytest.approx(wanted, rel=1e-5)


def test_delta_limits_what_clipping_does_not() -> None:
    logps = torch.full((1, 1), -1.0)
    for ratio, moves in ((3.0, False), (1.8, True)):
        grad, _ = gradient(logps, [-1.0], old_logps=logps - math.log(ratio), delta=2.0)
        assert bool(grad.abs().sum() > 0) == moves


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("loss_type", "same"), [("cispo", "dapo"), ("sapo", "grpo"), ("grpo", "grpo")]
)
def test_where_the_policy_sampled_itself_all_are_one(loss_type: Any, same: Any, level: Any) -> None:
    one = case(2, [3, 5, 1])
    advantages = one["advantages"].tolist()
    found = [
        gradient(one["logps"], advantages, mask=one["mask"], **options)[0]
        for options in (
            {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 5.0},
            {"loss_type": same},
        )
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_and_masked_rows_have_no_gradient(loss_type: Any, level: Any) -> None:
    one = case(3, [4, 0, 2])
    logps = one["logps"].requires_grad_()
    out = grpo_loss(
        **one,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.04,
        max_completion_length=4,
        entropies=torch.full((3, 4), 2.0),
    )
    out.rows.sum().backward()
    assert logps.grad is not None
    assert logps.grad[one["mask"] == 0].abs().sum() == 0
    assert (logps.grad[one["mask"] == 1] != 0).any()
    assert torch.isfinite(logps.grad).all()
    total, count = out.metrics["entropy"]
    assert (float(total), int(count)) == (12.0, 6)
    assert not any(total.requires_grad for total, _ in out.metrics.values())
    nothing = grpo_loss(
        **{**one, "mask": torch.zeros_like(one["mask"])},
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=4,
    )
    assert nothing.rows.abs().sum() == 0
    assert nothing.rows.requires_grad


def test_a_masked_row_still_counts_as_a_row() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    assert [grpo_weight(mask, name) for name in LOSS_TYPES] == [
        *(2.0, 2.0, 2.0, 1.0, 2.0),
        *(2.0, 2.0),
    ]
    for name in ("dapo", "cispo"):
        assert grpo_weight(mask, name, tokens_per_row=5.0) == 10.0


def test_what_is_missing_is_said() -> None:
    one: Any = {**case(0, [2, 1]), "ref_logps": None}
    with pytest.raises(ValueError, match="ref_logps is needed"):
        grpo_loss(**one, beta=0.04)
    with pytest.raises(ValueError, match="lacks max_completion_length"):
        grpo_loss(**one, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="'ppo' is unknown"):
        grpo_loss(**one, loss_type="ppo")
