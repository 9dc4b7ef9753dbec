"""Claims about cues: denied and hedged mentions are no claims."""

from __future__ import annotations

import re
import time

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
        ("without frown, smile", set(), {"frown", "smile"}, set()),
        ("No frown, lip corners up.", {"smile"}, {"frown"}, set()),
        ("No frown, dimples or wide eyes, tears or sobs.", set(), {"frown", "tears"}, set()),
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


UNITS = {f"AU{unit}": (f"AU{unit}",) for unit in (1, 4, 12, 15)}
UNITS["AU12"] = ("AU12", "lip corner puller")


@pytest.mark.parametrize(
    "text",
    [
        *("AU12: absent", "AU12 is not present", "AU12 isn't visible.", "AU12 remains inactive"),
        *("AU4 and AU12 are not active", "AU4, AU12 and AU15: none", "No AU4, AU12 or AU15"),
        *("Not active: AU4, AU12", "Inactive units: AU4 and AU12.", "No AU4, AU12."),
        *("Neither AU4 nor AU12 is active", "None of AU4, AU12 and AU15 is active"),
        *("AU4/AU12 not present", "AU4 and AU12 both absent", "AU4 & AU12 aren't active"),
        *("There is no sign of AU4, AU12, AU15.", "I do not see AU4, AU12 or AU15"),
        *("AU12 | 0", "| AU12 | 0 |", "| AU12 | lip corner puller | no |", "AU12=0", "AU12 = 0.0"),
        *("AU12 (absent)", "AU12 (lip corner puller): absent", "AU12 - absent", "AU12: no"),
        *("AU12: false", '{"AU4": 0, "AU12": 0}', "AU12 ✗", "**AU12**: absent", "AU12: 0%"),
        *("AU4: no\nAU12: no", "AU12, absent", "AU12 shows no activation", "AU12 is off"),
        *("AUs that are not active are AU4 and AU12", "The following are absent: AU4, AU12"),
        *("Not active:\n- AU4\n- AU12", "### Absent\n1. AU4\n2. AU12", "lacks AU4 and AU12"),
        *("没有AU12", "AU12未激活", "AU12不存在", "AU12：无", "无AU4和AU12", "未见AU4或AU12"),
        *("AU4和AU12均未出现", "AU4、AU12、AU15：无", "AU4与AU12都不活跃", "没有 AU4、AU12"),
    ],
)
def test_every_form_of_denial_denies_all_that_it_lists(text: str) -> None:
    claims = read_claims(text, UNITS)
    assert not claims.asserted
    assert "AU12" in claims.denied
    assert claims.denied == set(re.findall(r"AU\d+", text))


@pytest.mark.parametrize(
    ("text", "asserted"),
    [
        ("AU12: present", {"AU12"}),
        ("AU12: 0.8", {"AU12"}),
        ("AU12: 0.05", {"AU12"}),
        ("AU12 | 1 | AU4 | 0", {"AU12"}),
        ("AU12: absent, AU4: present", {"AU4"}),
        ("AU12 (present), AU4 (absent)", {"AU12"}),
        ("AU4, AU12 (absent)", {"AU4"}),
        ("AU1, AU4 is not active", {"AU1"}),
        ("AU1 is not active and AU4 is", {"AU4"}),
        ("AU1, AU4, no AU15", {"AU1", "AU4"}),
        ("AU1 and AU4 without AU15 or AU12", {"AU1", "AU4"}),
        ("AU4 because she is not happy", {"AU4"}),
        ("She is not happy: AU4", {"AU4"}),
        ("Active: AU1, AU4. Not active: AU12", {"AU1", "AU4"}),
        ("Not active: AU12, active: AU4", {"AU4"}),
        ("Not active:\n- AU4\n\nActive:\n- AU12", {"AU12"}),
        ("AU4 is active and not AU12", {"AU4"}),
        ("AU12 is not absent", {"AU12"}),
        ("AU4 rather than AU12", {"AU4"}),
        ("AU12, no doubt", {"AU12"}),
        ('{"AU12": 0, "AU4": 1}', {"AU4"}),
        ("| unit | value |\n|---|---|\n| AU12 | 0 |\n| AU4 | 3 |", {"AU4"}),
        ("AU4激活，AU12未激活", {"AU4"}),
        ("有AU4，没有AU12", {"AU4"}),
    ],
)
def test_a_denial_denies_no_more_than_it_says(text: str, asserted: set[str]) -> None:
    assert read_claims(text, UNITS).asserted == asserted


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


WORDINGS = {"AU4": ["AU4"], "AU6": ["AU6"], "AU12": ["AU12", "smile"], "tears": ["tears", "眼泪"]}


@pytest.mark.parametrize(
    ("text", "asserted"),
    [
        ("AU12 fails to appear.", ""),
        ("The face fails to show AU12.", ""),
        ("AU12 is no longer active.", ""),
        ("Her smile has faded and there are tears.", "tears"),
        ("AU12 is far from active.", ""),
        ("Anything but a smile.", ""),
        ("It is false that she has a smile.", ""),
        ("Is AU12 active? No. AU4 is.", "AU4"),
        ("AU12? Not present. AU4? Present.", "AU4"),
        ("AU12 was expected but is missing.", ""),
        ("AU4 (AU12 absent)", "AU4"),
        ("AU4 w/o AU12", "AU4"),
        ("~~AU12~~ AU4", "AU4"),
        ("- [x] AU4\n- [ ] AU12", "AU4"),
        ("✗ AU12 ✓ AU4", "AU4"),
        ("AU4 ✓ AU12 ✗", "AU4"),
        ("AU12 (intensity: 0)", ""),
        ("AU12 intensity 3", "AU12"),
        ("| AU4 | AU12 | AU6 |\n|---|---|---|\n| 1 | 0 | 1 |", "AU4 AU6"),
        ("AU4,AU12,AU6\n1,0,1", "AU4 AU6"),
        ("There's no lack of tears.", "tears"),
        ("She cannot hide her smile.", "AU12"),
        ("AU4 and AU12 are active and she isn't happy", "AU4 AU12"),
        ("激活:AU4;未激活:AU12、AU6", "AU4"),
        ("既没有AU12也没有眼泪", ""),
        ("不是没有眼泪", "tears"),
    ],
)
def test_forms_of_denial(text: str, asserted: str) -> None:
    assert read_claims(text, WORDINGS).asserted == frozenset(asserted.split())


def test_long_lists_of_cues_take_no_time() -> None:
    start = time.process_time()
    for piece in ("AU4, ", "either AU4 or ", "no AU4, ", "AU4 (", "| AU4 | AU12 |\n", "? no "):
        read_claims(piece * (100_000 // len(piece)), WORDINGS)
    assert time.process_time() - start < 12
