"""Claims about cues: denied and hedged mentions are no claims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import completion_text, one_line, prompt_text, think_text

CUES = {
    "smile": ("smile", "lip corners up"),
    "frown": ("frown", "brows lowered"),
    "brows": ("brows raised",),
    "inner": ("inner brows raised",),
    "tears": ("tears",),
}


@pytest.mark.parametrize(
    ("text", "asserted", "denied", "hedged"),
    [
        ("Face: happy, lip corners up.", {"smile"}, set(), set()),
        ("The INNER BROWS RAISED and a Smile.", {"inner", "smile"}, set(), set()),
        ("No frown.", set(), {"frown"}, set()),
        ("There is no frown, but a smile.", {"smile"}, {"frown"}, set()),
        ("without frown, smile", {"smile"}, {"frown"}, set()),
        ("No frown, smile or tears.", set(), {"frown", "smile", "tears"}, set()),
        ("Neither a frown nor a smile; brows raised.", {"brows"}, {"frown", "smile"}, set()),
        ("There isn't a smile.", set(), {"smile"}, set()),
        ("The smile is absent.", set(), {"smile"}, set()),
        ("The smile isn’t visible, the frown is.", {"frown"}, {"smile"}, set()),
        ("A smile is shown and tears are not.", {"smile"}, {"tears"}, set()),
        ("Maybe a smile.", set(), set(), {"smile"}),
        ("It might be a frown. A smile.", {"smile"}, set(), {"frown"}),
        ("either a smile or a frown", set(), set(), {"smile", "frown"}),
        ("It is not clear whether there is a smile.", set(), set(), {"smile"}),
        ("Not only a smile.", {"smile"}, set(), set()),
        ("A smile. No smile.", set(), {"smile"}, set()),
        ("Maybe a smile. A smile.", {"smile"}, set(), set()),
        ("smiles, brow, unsmile", set(), set(), set()),
        ("first line: no\nsmile", {"smile"}, set(), set()),
        ("", set(), set(), set()),
    ],
)
def test_mentions_are_read_in_their_clause(
    text: str, asserted: set[str], denied: set[str], hedged: set[str]
) -> None:
    claims = read_claims(text, CUES)
    assert (set(claims.asserted), set(claims.denied), set(claims.hedged)) == (
        asserted,
        denied,
        hedged,
    )


@given(st.text(max_size=120))
def test_no_cue_is_in_two_sets(text: str) -> None:
    claims = read_claims(text + " no smile maybe frown smile", CUES)
    assert not claims.asserted & claims.denied
    assert not claims.asserted & claims.hedged
    assert not claims.denied & claims.hedged


def test_nothing_to_look_for_finds_nothing() -> None:
    assert not read_claims("a smile", {}).asserted
    assert not read_claims("a smile", {"empty": (" ",)}).asserted


def test_texts_of_both_forms() -> None:
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "How?"}]}]
    assert prompt_text(chat) == prompt_text("How?") == "How?"
    answer = [{"role": "assistant", "content": "<think>a\n b</think>x"}]
    assert completion_text(answer) == completion_text("<think>a\n b</think>x")
    assert one_line(think_text(completion_text(answer))) == "a b"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert think_text("<THINK>cut <answer>no</answer>") == "cut"
    assert think_text("no tags") == ""
