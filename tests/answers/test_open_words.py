"""The emotion words of answers in any form, and the sentiment that they express."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmemo.answers.emotion_wheels import Wheels, load_wheels
from mmemo.answers.open_words import (
    SENTIMENTS,
    VALENCE,
    emotion_words,
    own_forms,
    sentiment_of,
    stated_sentiment,
)
from mmemo.answers.parsing import EMOTION_FORMS, base_form
from tests.answers.test_emotion_wheels import write_wheels

FORMS = frozenset({"at ease", "brave", "relaxed", "present", "moved", "in awe"})

CASES = {
    # Lists keep words that nobody knows.
    "[curiosity, humor, 'at ease']": ["curiosity", "humor", "at ease"],
    "happy": ["happy"],
    "Happy.": ["happy"],
    "1. joyful\n2. melancholic": ["joyful", "melancholic"],
    "very happy; at ease": ["happy", "at ease"],
    "sad and moved": ["sad", "moved"],
    "not happy, sad": ["sad"],
    "sad, sad, SAD": ["sad"],
    "present": ["present"],
    # Sentences: the stated emotion first, then all that is asserted.
    "The character's emotional state is happy, moved.": ["happy", "moved"],
    "He laughs, then the tears come. The emotions of the woman are: grief, relief and hope.": [
        *("grief", "relief", "hope"),
    ],
    "She does not look happy; rather, she seems anxious and worried.": ["anxious", "worried"],
    "The emotion is not anger but disappointment.": ["disappointment"],
    "He might be angry, but he is certainly sad about it.": ["sad"],
    "The man who is present in the clip is relaxed.": ["relaxed"],
    "There is no sign of fear, anger or sadness in this face at all.": [],
    "他很生气，没有开心": ["生气"],
    # The answer counts, not the reasoning.
    "<think>sad, or angry?</think><answer>brave and at ease</answer>": ["brave", "at ease"],
    "<think>happy": [],
    # Nothing.
    "": [],
    "[]": [],
    "I cannot determine the emotion.": [],
    "\ud800": [],
}


@pytest.mark.parametrize("text", CASES)
def test_words_of_answers(text: str) -> None:
    found = emotion_words(text, FORMS)
    if text == "\ud800":
        assert all(isinstance(word, str) for word in found)
    else:
        assert found == CASES[text]


def test_own_words_need_no_wheels() -> None:
    assert emotion_words("The speaker is joyful and a little scared.") == [
        *("joyful", "scared"),
    ]
    assert {"happiness", "afraid"} <= own_forms()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return load_wheels(write_wheels(tmp_path_factory.mktemp("wheels")))


def test_sentiment_by_hand(wheels: Wheels) -> None:
    assert sentiment_of(["happy", "grateful"]) == "positive"
    assert sentiment_of(["sad", "happy", "angry"]) == "negative"
    assert sentiment_of([]) == sentiment_of(["surprise"]) == sentiment_of(["sad", "happy"])
    assert sentiment_of([]) == "neutral"
    # Only the wheels know that a brave one is joyful on all of them but the first.
    assert sentiment_of(["brave"]) == "neutral"
    assert sentiment_of(["brave"], wheels) == "positive"
    assert sentiment_of(["timid"], wheels) == "negative"
    assert sentiment_of(["unheard of"], wheels) == "neutral"


def test_valence_is_of_words_that_exist() -> None:
    bases = {forms[0] for forms in EMOTION_FORMS}
    rings = {"joyful", "joy", "powerful", "peaceful", "genius", "mad", "disgusted", "scared"}
    rings |= {"fearful", "bad", "anger", "positive", "negative"}
    assert set(VALENCE) <= bases | rings
    for word in VALENCE:
        if word in bases:
            assert base_form(word) == word


def test_a_stated_sentiment_is_nothing_else() -> None:
    assert stated_sentiment("Positive.") == "positive"
    assert stated_sentiment("<answer>negative</answer>") == "negative"
    assert stated_sentiment("[positive]") == "positive"
    for text in ("", "mixed", "not positive", "positive, negative", "the positive one"):
        assert stated_sentiment(text) is None


TAGS = ("<answer>", "</answer>", "<think>", "</think>", "[", "]", "{}", "'", '"', "|", "\n")
SIGNS = (", ", "; ", "，", "1. ", "- ", "\x00", "&", "\u202e", "é", "😀", "𝒉appy", "nan", "None")
SAID = ("happy", "sad", "at ease", "生气", "没有", "not ", "no ", "neither ", " nor ", "but ")
PIECES = st.sampled_from((*TAGS, *SIGNS, *SAID, "The emotion is "))


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES | st.text(max_size=6), max_size=14).map("".join))
@example("[" * 500)
@example("happy, " * 2000)
def test_no_answer_breaks_the_reader(text: str) -> None:
    found = emotion_words(text, FORMS)
    assert all(isinstance(word, str) and word.strip() for word in found)
    assert len(set(found)) == len(found)
    assert sentiment_of(found) in SENTIMENTS
    assert stated_sentiment(text) in (*SENTIMENTS, None)


def test_the_real_wheels_add_their_forms(tmp_path: Path) -> None:
    made = load_wheels(write_wheels(tmp_path / "w"))
    assert {"happiness", "fears", "no words"} <= made.forms
    assert emotion_words("The man in the clip has fears.", made.forms) == ["fears"]
