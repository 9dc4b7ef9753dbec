from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmemo.losses.expert_balance import load_variation, weight_divergence

ALL = torch.ones(4, 2, dtype=torch.bool)


def weights(*rows: list[float]) -> Tensor:
    return torch.tensor([rows])  # one layer


def test_decisive_rows_that_differ_cost_nothing() -> None:
    """Only the mean is held."""
    third = 1 / 3
    even = weights(*[[third] * 3] * 4)
    mixed = weights([1.0, 0, 0], [0, 1, 0], [0, 0, 1], [third] * 3)
    for value in (even, mixed):
        assert abs(float(weight_divergence(value, ALL))) < 1e-6
    lean = weights(*[[0.2, 0.7, 0.1]] * 4)
    wanted = sum(w * math.log(3 * w) for w in (0.2, 0.7, 0.1))
    torch.testing.assert_close(weight_divergence(lean, ALL), torch.tensor(wanted))
    # No medium is dearer than another.
    turned = lean[..., [0, 2, 1]]
    torch.testing.assert_close(weight_divergence(turned, ALL), weight_divergence(lean, ALL))


def test_what_a_row_lacks_is_not_asked_of_it() -> None:
    present = torch.tensor([[True, False], [True, False], [True, True], [False, False]])
    equal = weights([0.5, 0.5, 0], [0.5, 0.5, 0], [1 / 3] * 3, [1, 0, 0])
    assert abs(float(weight_divergence(equal, present))) < 1e-6
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    text = weights([1.0, 0, 0], [1.0, 0, 0]).requires_grad_()
    value = weight_divergence(text, nothing)
    value.backward()
    assert float(value.detach()) == 0
    assert text.grad is not None
    assert bool(text.grad.isfinite().all())


def test_load_is_zero_when_even_and_largest_when_one_expert_does_all() -> None:
    picked = torch.eye(2)[[0, 1, 0, 1]]
    even = torch.stack([picked, picked.flip(0)], 1)[None]  # (1, 4, 2, 2)
    assert float(load_variation(even, ALL)) == 0
    one = torch.zeros(1, 4, 2, 3)
    one[..., 1] = 1
    torch.testing.assert_close(load_variation(one, ALL), torch.tensor(2.0 * (3 - 1)))
    absent = ALL.clone()
    absent[:, 1] = False
    torch.testing.assert_close(
        load_variation(one * absent[None, :, :, None], absent), torch.tensor(3.0 - 1)
    )


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_a_step_against_the_gradient_lowers_both(seed: int) -> None:
    """Through a softmax, from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(5, 2, generator=generator) < 0.7
    for penalty, shape in ((weight_divergence, (2, 5, 3)), (load_variation, (2, 5, 2, 3))):
        scores = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        def value(at: Tensor, penalty: object = penalty) -> Tensor:
            if penalty is weight_divergence:
                there = torch.nn.functional.pad(present, (1, 0), value=True)
                return weight_divergence(at.masked_fill(~there, float("-inf")).softmax(-1), present)
            return load_variation(at.softmax(-1) * present[..., None], present)

        before = value(scores)
        before.backward()
        assert scores.grad is not None
        assert bool(scores.grad.isfinite().all())
        after = value(scores.detach() - 0.05 * scores.grad)
        assert float(after) <= float(before.detach()) + 1e-12
