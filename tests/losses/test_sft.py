"""Answer-only cross-entropy: equal to the plain definition, however the rows are split up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mmemo.data.collate import IGNORE_INDEX
from mmemo.losses.sft import AnswerLoss, answer_loss, answer_positions, answer_tokens

V = 11


def rows(seed: int, answers: list[int], prompt: int = 4) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V) and labels (B, L) of rows with so many answer tokens, padded right."""
    generator = torch.Generator().manual_seed(seed)
    length = prompt + max(answers) + 1
    logits = torch.randn(len(answers), length, V, generator=generator)
    labels = torch.full((len(answers), length), IGNORE_INDEX)
    for row, count in enumerate(answers):
        labels[row, prompt : prompt + count] = torch.randint(V, (count,), generator=generator)
    return logits, labels


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' own definition, as a sum."""
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def loss_of(logits: Tensor, labels: Tensor) -> AnswerLoss:
    """The loss from the logits (B, L, V) of all positions."""
    tokens = answer_tokens(labels)
    spread = logits.flatten(0, 1)[tokens.predictors].log_softmax(-1)
    logps = spread.gather(1, tokens.targets[:, None]).squeeze(1)
    return answer_loss(logps, spread.argmax(-1) == tokens.targets, tokens.rows, len(labels))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), answers=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_rows_add_up_to_the_plain_definition(seed: int, answers: list[int]) -> None:
    logits, labels = rows(seed, answers)
    out = loss_of(logits, labels)
    torch.testing.assert_close(out.rows.sum(), reference(logits, labels))
    assert out.tokens.tolist() == answers
    best = logits[:, :-1].argmax(-1) == labels[:, 1:]
    assert out.correct.tolist() == best.sum(1).tolist()


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), answers=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_answer_positions_are_those_that_predict_in_some_row(seed: int, answers: list[int]) -> None:
    labels = rows(seed, answers)[1]
    positions = answer_positions(labels)
    assert len(positions) == max(answers)
    assert set((answer_tokens(labels).predictors % labels.shape[1]).tolist()) == set(
        positions.tolist()
    )


def test_only_answer_positions_get_a_gradient_and_it_points_to_the_answer() -> None:
    logits, labels = rows(0, [3, 1])
    logits.requires_grad_()
    loss_of(logits, labels).rows.sum().backward()
    assert logits.grad is not None
    scored = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX
    assert not logits.grad[~scored].any()
    wanted = functional.pad(labels[:, 1:], (0, 1), value=0)[scored]
    pull = logits.grad[scored]
    assert (pull.gather(1, wanted.unsqueeze(1)) < 0).all()
    assert ((pull > 0).sum(1) == V - 1).all()


def test_the_first_token_is_never_scored() -> None:
    logits, labels = rows(0, [2])
    labels[:, 0] = 3
    assert loss_of(logits, labels).tokens.tolist() == [2]
    assert len(answer_tokens(labels).targets) == 2


def test_a_row_without_an_answer_is_zero_and_does_not_break_the_gradient() -> None:
    logits, labels = rows(0, [2, 0])
    logits.requires_grad_()
    out = loss_of(logits, labels)
    assert out.rows[1].item() == 0
    out.rows.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    nothing = loss_of(logits, torch.full_like(labels, IGNORE_INDEX))
    assert nothing.rows.sum().item() == 0
    assert nothing.rows.requires_grad


def test_splitting_a_step_changes_nothing_and_a_mean_of_means_would() -> None:
    logits, labels = rows(3, [5, 1, 4, 1])
    counts = [len(answer_tokens(labels[i : i + 2]).targets) for i in (0, 2)]
    whole = loss_of(logits, labels).rows.sum() / sum(counts)
    parts = [loss_of(logits[i : i + 2], labels[i : i + 2]).rows.sum() for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / sum(counts), whole)
    naive = sum(part / count for part, count in zip(parts, counts, strict=True))
    assert abs(float(naive) / 2 - float(whole)) > 1e-3
