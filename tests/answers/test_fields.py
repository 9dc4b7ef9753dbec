"""Answers with one label for each of several fields."""

from __future__ import annotations

import random

import pytest

from mmemo.answers.kinds import Fields
from mmemo.answers.parsing import LabelSet

KIND = Fields(
    {
        "emotion": LabelSet(("happy", "sad", "neutral")),
        "intent": LabelSet(("agreeing", "asking", "neutral")),
    }
)


@pytest.mark.parametrize(
    ("text", "emotion", "intent"),
    [
        ("Emotion: happy\nIntent: asking", "happy", "asking"),
        ("The intent is agreeing and the emotion is sad.", "sad", "agreeing"),
        ("<think>sad?</think><answer>happy, neutral</answer>", "happy", "neutral"),
        ("neutral and neutral", "neutral", "neutral"),
        ("happy_asking", "happy", "asking"),
        ("A happy emotion; an asking intent", "happy", "asking"),
        ('{"emotion": "happy", "intent": "asking"}', "happy", "asking"),
    ],
)
def test_both_are_read(text: str, emotion: str, intent: str) -> None:
    read = KIND.read(text)
    assert (read.status, read.answer) == ("ok", {"emotion": emotion, "intent": intent})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "happy",
        "neutral",
        "happy, sad, asking",
        "asking, happy",
        "Emotion: happy or sad. Intent: asking",
        "Emotion: happy. Emotion: sad. Intent: asking",
        "Emotion: asking. Intent: happy",
    ],
)
def test_what_cannot_be_told(text: str) -> None:
    assert KIND.read(text).status == "malformed"


def test_no_text_breaks_the_reader() -> None:
    rng = random.Random(0)
    pieces = ["emotion", "intent", ":", "happy", "neutral", "asking", ", ", " and ", "\n", "\0"]
    pieces += ["<answer>", "</answer>", "<think>", "I cannot say", "not", "\ud800", "_", "ＳＡＤ"]
    read = 0
    for _ in range(3000):
        found = KIND.read("".join(rng.choices(pieces, k=rng.randrange(10))))
        assert found.status in ("ok", "refused", "malformed")
        assert (found.answer is not None) == (found.status == "ok")
        if found.answer is not None:
            read += 1
            assert set(found.answer) == {"emotion", "intent"}
    assert read > 10
