"""Which of a model's answers may stand in a pair."""

from __future__ import annotations

import pytest

from mmemo.pairs.sampled import can_be_answer


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>It is loud.</think><answer>angry</answer>", True),
        ("ise: \ufffd surprise", True),
        ("sad\x00", False),
        (" \n", False),
        ("", False),
        ("a <video> of a man", False),
        ("<audio>", False),
        ("<image>", False),
    ],
)
def test_an_answer_that_training_would_refuse_is_left_out(text: str, fits: bool) -> None:
    assert can_be_answer(text) == fits
