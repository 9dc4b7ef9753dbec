"""Distributions as answers: what is read, what is refused, and that nothing raises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo.answers.kinds import Distribution
from mmemo.answers.label_set import emotion_labels

KIND = Distribution(emotion_labels(("angry", "happy", "sad", "neutral")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("happy 60%, sad 40%", {"happy": 0.6, "sad": 0.4}),
        ("sad: 0.4; happy: 0.6", {"happy": 0.6, "sad": 0.4}),
        ("sad 0,4; happy 0,6", {"happy": 0.6, "sad": 0.4}),
        ("60% happy and 40 percent sad", {"happy": 0.6, "sad": 0.4}),
        ("60% happy,40% sad", {"happy": 0.6, "sad": 0.4}),
        ("happy 3/5, sad 2/5", {"happy": 0.6, "sad": 0.4}),
        ("happy 3, sad 1", {"happy": 0.75, "sad": 0.25}),  # numbers of raters
        ("- happy: 50%\n- sad: 25%\n- anger: 25%\n- neutral: 0%", None),
        ('{"happy": 0.75, "sad": 0.25}', {"happy": 0.75, "sad": 0.25}),
        ("happy (60%), sad (40%)", {"happy": 0.6, "sad": 0.4}),
        ("happy", {"happy": 1.0}),
        ("Joyful.", {"happy": 1.0}),
        ("happy, sad", {"happy": 0.5, "sad": 0.5}),
        ("<think>angry 100%</think><answer>sad 100%</answer>", {"sad": 1.0}),
    ],
)
def test_what_is_read(text: str, expected: dict[str, float] | None) -> None:
    found = KIND.read(text)
    assert found.status == "ok"
    if expected is None:
        expected = {"angry": 0.25, "happy": 0.5, "sad": 0.25}
    assert found.answer == pytest.approx(expected)
    order = [label for label in KIND.labels.labels if label in found.answer]
    assert list(found.answer) == order


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "malformed"),
        ("60%, 40%", "malformed"),
        ("happy 60%, sad", "malformed"),  # is sad the rest?
        ("happy 60% 70%", "malformed"),
        ("happy 60%, joyful 40%", "malformed"),  # one label twice
        ("happy 0%", "malformed"),
        ("happy -20%, sad 120%", "malformed"),
        ("happy 1/0", "malformed"),
        ("happy 60%, hungry 40%", "malformed"),
        ("I cannot answer that.", "refused"),
    ],
)
def test_what_is_not_read(text: str, status: str) -> None:
    found = KIND.read(text)
    assert (found.status, found.answer) == (status, None)


PIECES = st.sampled_from(
    [
        "happy",
        "sad",
        "neutral",
        "60%",
        "0.4",
        "-1",
        "1/0",
        ",",
        ";",
        "and",
        "\n",
        "{",
        '"',
        ":",
        "٣",
    ]
)


@given(st.lists(PIECES, max_size=8).map(" ".join) | st.text(max_size=40))
def test_any_text_is_read_or_counted(text: str) -> None:
    found = KIND.read(text)
    assert found.status in ("ok", "refused", "malformed")
    if found.status == "ok":
        assert sum(found.answer.values()) == pytest.approx(1)
        assert min(found.answer.values()) > 0
    else:
        assert found.answer is None
