"""Which of a model's answers may stand in a pair."""

from __future__ import annotations

from collections import Counter

import pytest

from mmemo.generation.readable import vocabulary
from mmemo.pairs.sampled import can_be_answer, usable_answers


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


def test_an_answer_that_is_no_language_is_left_out_and_counted() -> None:
    closed = vocabulary(["Voice: sad, gloomy music.", "Voice: happy, cheerful music."] * 20)
    drawn = [
        ("Voice: sad, cheerful music.", [1]),
        ("Voice: sad, cheloomy music.", [2]),
        ("Voice: \ufffd sad", [3]),
        ("", [4]),
    ]
    counts: Counter[str] = Counter()
    assert usable_answers(drawn, closed, counts) == {"Voice: sad, cheerful music.": [1]}
    assert counts == {"answers_garbled": 2, "answers_unreadable": 1}
    # Free prose always has new words.
    free = vocabulary(["one two", "three four"])
    assert list(usable_answers(drawn, free, Counter())) == [text for text, _ in drawn[:2]]
    assert list(usable_answers(drawn, None, Counter())) == [text for text, _ in drawn[:3]]
