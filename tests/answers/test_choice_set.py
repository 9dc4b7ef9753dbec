"""Letters of choices, which an answer may also name by the whole text of one."""

from __future__ import annotations

import pytest

from mmemo.answers.label_set import ChoiceSet
from mmemo.answers.parsing import parse

TEXTS = ChoiceSet(["She is happy.", "She is sad.", "B", "yes", "same", "Same", "...", "ab"])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A", "A"),
        ("(b)", "B"),
        ("she is SAD", "B"),
        ("<think>A?</think><answer>She is sad.</answer>", "B"),
        ("yes", "D"),
        ("B", "B"),
        ("ab", "H"),
        ("A. She is happy.", "A"),
        ("The answer is C.", "C"),
        ("B, because she is happy to be sad", "B"),
        ("She is happy. Or she is sad.", None),
        ("same", None),
        ("...", None),
        ("I think she is sad", None),
        ("A, B, C", None),
    ],
)
def test_letters_and_whole_texts(text: str, label: str | None) -> None:
    assert parse(text, TEXTS).label == label


def test_any_number_of_choices() -> None:
    assert ChoiceSet([]).labels == ()
    assert ChoiceSet([str(number) for number in range(26)]).labels[-1] == "Z"
    assert parse("1", ChoiceSet(["1", "2"])).label == "A"
