"""Rankings: what order a text gives, and that no label gets a rank that the text does not give."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.answers.kinds import Ranked
from mmemo.answers.parsing import label_set

EMOTIONS = label_set(("happy", "sad", "angry", "fear", "surprise", "neutral"))
KIND = Ranked(EMOTIONS)
THREE = ["happy", "sad", "angry"]


@pytest.mark.parametrize(
    "text",
    [
        "happy, sad, angry",
        "Happy; Sadness; Anger.",
        "happy > sad > angry",
        "happy -> sad → angry",
        "angry < sad < happy",
        "1. happy 2. sad 3. angry",
        "1) Happy\n2) Sad\n3) Angry",
        "1.happy,2.sad,3.angry",
        "１．happy　２．sad　３．angry",
        "#1 happy #2 sad #3 angry",
        "1st: happy, 2nd: sad, 3rd: angry",
        "Top 1: happy; Top 2: sad; Top 3: angry",
        "3. angry\n2. sad\n1. happy",
        "1. happy\n1. sad\n1. angry",
        "- happy\n- sad\n- angry",
        "First: happy, second: sad, third: angry",
        "The most likely emotion is happy, followed by sad and then angry.",
        "The first is happy, the second is sad, and the third is angry.",
        "Here are the 3 most likely emotions: happy, sad, angry.",
        "From angry, sad and happy I choose:\n1. happy\n2. sad\n3. angry",
        "1. **Happy** - a bright tone, not sad.\n2. **Sad** – at times.\n3. Angry: loud, not happy",
        "1. happy\n2. sad\n3. angry\n\nLess likely:\n1. fear\n2. neutral",
        '["happy", "sad", "angry"]',
        '{"ranking": ["happy", "sad", "angry"]}',
        '{"1": "happy", "2": "sad", "3": "angry"}',
        '{"sad": 0.3, "happy": 0.6, "angry": 0.1}',
        "sad (30%), happy (60%), angry (10%)",
        "1. happy - 60%\n2. sad - 30%\n3. angry - 10%",
        "happy 9, sad 5, angry 1",
        "happy (1), sad (2), angry (3)",
        "高兴、悲伤、愤怒",
        "1、高兴 2、悲伤 3、愤怒",
        "①高兴②悲伤③愤怒",
        "第一：高兴；第二：悲伤；第三：愤怒",
        "首先是高兴，其次是悲伤，最后是愤怒",
        "<think>angry, sad</think><answer>happy, sad, angry, fear</answer>",
    ],
)
def test_every_form_of_a_list_gives_its_order(text: str) -> None:
    assert KIND.read(text).answer == THREE


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("happy", ["happy"]),
        ("happy, happy, sad", ["happy", "sad"]),
        ("Sure, here you go: happy, sad", ["happy", "sad"]),
        # Behind what is no label of the set, no rank is certain.
        ("happy, confused, sad", ["happy"]),
        ("1. happy 2. confused 3. sad", ["happy"]),
        ("happy, not sad, angry", ["happy"]),
    ],
)
def test_a_list_is_read_up_to_its_first_item_without_a_label(text: str, answer: list[str]) -> None:
    assert KIND.read(text).answer == answer


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "1. 2. 3.", "whatever, who knows"),
        *("confused, happy, sad", "1. confused 2. happy", "not happy, sad"),
        *(
            "happy or sad, angry",
            "happy = sad > angry",
            "happy sad angry",
            "1. happy, sad 2. angry",
        ),
        "2. happy 3. sad",
        "1. happy (20%) 2. sad (70%)",
        "sad: 2, happy: 1",
    ],
)
def test_an_order_that_cannot_be_told_is_malformed(text: str) -> None:
    assert KIND.read(text).status == "malformed"


def test_refusals_and_depth() -> None:
    assert KIND.read("I cannot tell, maybe happy.").status == "refused"
    assert Ranked(EMOTIONS, 2).read("happy, sad, angry").answer == ["happy", "sad"]


def test_labels_with_separators_and_letters() -> None:
    forty = Ranked(label_set("emonet"))
    text = "1. Hope/Enthusiasm/Optimism\n2. Impatience and Irritability\n3. Jealousy & Envy"
    assert forty.read(text).answer == [
        *("Hope/Enthusiasm/Optimism", "Impatience and Irritability", "Jealousy & Envy"),
    ]
    letters = Ranked(label_set(("A", "B", "C")))
    assert letters.read("A > C > B").answer == ["A", "C", "B"]
    assert letters.read("1. A 2. B").answer == ["A", "B"]


@pytest.mark.parametrize(
    "piece", ["(", " ", ">", "1. ", "happy, ", "happy > ", "%", "\n", "first "]
)
def test_long_texts_are_read_at_once(piece: str) -> None:
    started = time.monotonic()
    KIND.read(piece * (20_000 // len(piece)) + "happy")
    assert time.monotonic() - started < 5  # a second here is minutes over a benchmark


JOINS = st.sampled_from([", ", "; ", " > ", "\n", " -> ", "、", " and then "])
WORDS = st.permutations(EMOTIONS.labels)


@given(WORDS, JOINS, st.integers(1, 6))
def test_a_list_and_its_numbered_form_agree(words: list[str], join: str, n: int) -> None:
    wanted, kind = list(words[:n]), Ranked(EMOTIONS, 6)
    assert kind.read(join.join(wanted)).answer == wanted
    numbered = [f"{rank}. {word}" for rank, word in enumerate(wanted, start=1)]
    for parts in (numbered, numbered[::-1]):
        assert kind.read("\n".join(parts)).answer == wanted


PIECES = st.one_of(
    st.sampled_from([*EMOTIONS.labels, "不", "高兴", "not", "第", "1.", "2)", "#3", "30%", "0.5"]),
    st.sampled_from([",", ">", "<", "\n", "</answer>", "<think>", "{", "first", "then", "、", "="]),
    st.text(max_size=6),
    st.text(string.punctuation, max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=14).map(" ".join))
def test_any_text_is_read(text: str) -> None:
    read = KIND.read(text)
    assert read.status in ("ok", "refused", "malformed")
    if read.status == "ok":
        assert 1 <= len(read.answer) <= 3
        assert len(set(read.answer)) == len(read.answer)
        assert set(read.answer) <= set(EMOTIONS.labels)
    else:
        assert read.answer is None
