"""Cross-entropy of the chosen answer: per token, and without the reference."""

from __future__ import annotations

import pytest
import torch

from tests.losses.pairs import draw, metric, term


def test_each_pair_is_its_mean_over_tokens() -> None:
    logps = draw(0)
    out = term("sft")(logps)
    mask, values = logps.mask["chosen"], logps.policy["input", "chosen"]
    wanted = [-float(values[row, mask[row]].mean()) for row in range(4)]
    assert out.rows.tolist() == pytest.approx(wanted)
    assert metric(out, "nll") == pytest.approx(sum(wanted) / 4)


def test_a_pair_without_any_rejected_answer_counts_too() -> None:
    logps = draw(0, 2, {1: {("input", "spurious"), ("input", "hallucinated")}})
    assert term("sft")(logps).counted.all()
    assert term("dpo")(logps).counted.tolist() == [True, False]


def test_it_asks_for_no_reference() -> None:
    (need,) = term("sft").needs()
    assert not need.reference
    logps = draw(0)
    logps.reference["input", "chosen"].fill_(torch.nan)
    assert torch.isfinite(term("sft")(logps).rows).all()
