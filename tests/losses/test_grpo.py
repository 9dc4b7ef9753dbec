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

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo")


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


def plain(one: dict[str, Tensor], beta: float, low: float, high: float) -> list[list[float]]:
    """Each token's loss by the formula, a row at a time."""
    found: list[list[float]] = []
    for row, advantage in enumerate(one["advantages"].tolist()):
        losses: list[float] = []
        for at in range(int(one["mask"][row].sum())):
            logp, old, ref = (float(one[n][row, at]) for n in ("logps", "old_logps", "ref_logps"))
            ratio = math.exp(logp - old)
            clipped = min(max(ratio, 1 - low), 1 + high)
            kl = ratio * (math.exp(ref - logp) - (ref - logp) - 1)
            losses.append(-min(ratio * advantage, clipped * advantage) + beta * kl)
        found.append(losses)
    return found


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any),
    beta=st.sampled_from([0.0, 0.04]),
)
def test_every_loss_type_is_its_formula(seed: int, lengths: list[int], beta: float) -> None:
    one = case(seed, lengths)
    tokens = plain(one, beta, 0.1, 0.25)
    sums, count = [sum(row) for row in tokens], sum(lengths)
    expected = {
        "grpo": sum(s / max(n, 1) for s, n in zip(sums, lengths, strict=True)) / len(lengths),
        "dr_grpo": sum(sums) / (len(lengths) * 8),
        "dapo": sum(sums) / count,
        "bnpo": sum(sums) / count,
    }
    for name in LOSS_TYPES:
        options: Any = {"loss_type": name, "max_completion_length": 8}
        out = grpo_loss(**one, beta=beta, epsilon=0.1, epsilon_high=0.25, **options)
        total = float(out.rows.sum()) / grpo_weight(one["mask"], options["loss_type"])
        assert total == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


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


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_and_masked_rows_have_no_gradient(loss_type: Any) -> None:
    one = case(3, [4, 0, 2])
    logps = one["logps"].requires_grad_()
    out = grpo_loss(
        **one,
        loss_type=loss_type,
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
        max_completion_length=4,
    )
    assert nothing.rows.abs().sum() == 0
    assert nothing.rows.requires_grad


def test_a_masked_row_still_counts_as_a_row() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    assert [grpo_weight(mask, name) for name in LOSS_TYPES] == [2.0, 2.0, 2.0, 1.0]
    assert grpo_weight(mask, "dapo", tokens_per_row=5.0) == 10.0


def test_what_is_missing_is_said() -> None:
    one: Any = {**case(0, [2, 1]), "ref_logps": None}
    with pytest.raises(ValueError, match="ref_logps is needed"):
        grpo_loss(**one, beta=0.04)
    with pytest.raises(ValueError, match="lacks max_completion_length"):
        grpo_loss(**one, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="'cispo' is unknown"):
        grpo_loss(**one, loss_type="cispo")
