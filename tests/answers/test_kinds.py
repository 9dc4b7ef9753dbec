"""Lists of labels and free texts: what is read, in every script, and that nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.answers.kinds import Numbers, Ranked, Several, Text
from mmemo.answers.listing import slashed
from mmemo.answers.parsing import STATUSES, LabelSet

KOREAN = slashed(
    [
        "불평/불만",
        "환영/호의",
        "안타까움/실망",
        "부담/안_내킴",
        "없음",
        "흐뭇함(귀여움/예쁨)",
        "슬픔",
    ]
)
NOVICE = slashed(
    ["Pleasure/Ecstasy", "Pain", "Fatigue/Exhaustion", "Jealousy & Envy", "Awe, Wonder"]
)
MARATHI = LabelSet(("Anger", "Happiness"), {"Anger": ["राग"], "Happiness": ["आनंद"]})
PLAIN = LabelSet(("joy", "sadness", "love and pride", "joy/sadness"))


@pytest.mark.parametrize(
    ("labels", "text", "expected"),
    [
        (KOREAN, "불평/불만, 슬픔", ["불평/불만", "슬픔"]),
        (KOREAN, "슬픔 / 불평 / 불만", ["불평/불만", "슬픔"]),
        (KOREAN, "불평／불만、부담/안 내킴", ["불평/불만", "부담/안_내킴"]),
        (KOREAN, "안_내킴 및 슬픔", ["부담/안_내킴", "슬픔"]),
        (KOREAN, "흐뭇함 (귀여움 / 예쁨)", ["흐뭇함(귀여움/예쁨)"]),
        (KOREAN, "흐뭇함", ["흐뭇함(귀여움/예쁨)"]),
        (KOREAN, "1. 불만\n2. 환영", ["불평/불만", "환영/호의"]),
        (KOREAN, '["없음"]', ["없음"]),
        (KOREAN, "<answer>- 슬픔\n- 실망</answer>", ["안타까움/실망", "슬픔"]),
        (KOREAN, "불평/분노", None),
        (NOVICE, "Pleasure / Ecstasy and pain", ["Pleasure/Ecstasy", "Pain"]),
        (NOVICE, "exhaustion, jealousy & envy", ["Fatigue/Exhaustion", "Jealousy & Envy"]),
        (NOVICE, "Pain, Awe, Wonder", ["Pain", "Awe, Wonder"]),
        (NOVICE, "Awe", None),
        (MARATHI, "आनंद आणि राग", ["Anger", "Happiness"]),
        (MARATHI, "राग व आनंद.", ["Anger", "Happiness"]),
        (MARATHI, "अनुराग", None),
        (PLAIN, "sadness, love and pride", ["sadness", "love and pride"]),
        (PLAIN, "joy, sadness", ["joy", "sadness"]),
        (PLAIN, "joy/sadness", ["joy/sadness"]),
        (PLAIN, "**joy**; *sadness*", ["joy", "sadness"]),
        (PLAIN, "The emotions are joy and sadness.", ["joy", "sadness"]),
        (PLAIN, "None.", []),
        (PLAIN, "None of the above", []),
        (PLAIN, "<answer>[]</answer>", []),
        (PLAIN, '{"labels": []}', []),
        (PLAIN, '{"labels": ["joy"]}', ["joy"]),
        (PLAIN, "joy sadness", ["joy", "sadness"]),
        (PLAIN, "Joy. Sadness.", ["joy", "sadness"]),
        (PLAIN, "joy&sadness, etc.", ["joy", "sadness"]),
        (PLAIN, "Both joy as well as sadness", None),
        (PLAIN, "joy as well as sadness", ["joy", "sadness"]),
        (PLAIN, "joy or sadness", None),
        (PLAIN, "neither joy nor sadness", None),
        (PLAIN, "Joy. Not sadness.", ["joy"]),
        (PLAIN, "He cries, his wife too.\n\nAnswer: joy, sadness", ["joy", "sadness"]),
        (PLAIN, "joy, boredom\nAnswer: boredom", None),
        (KOREAN, "슬픔과 환영", ["환영/호의", "슬픔"]),
        (KOREAN, "슬픔과 실망이 느껴집니다.", ["안타까움/실망", "슬픔"]),
        (KOREAN, "슬픔과 거리가 먼 환영", None),
        (KOREAN, "이 시는 어둡다.\n정답： 슬픔, 없음", ["없음", "슬픔"]),
        (PLAIN, "joy, not sadness", None),
        (PLAIN, "joy, boredom", None),
        (PLAIN, "love and hate", None),
        (PLAIN, ", ; /", None),
        (PLAIN, "", None),
        (LabelSet(("高兴", "悲伤", "平和")), "高兴和悲伤、平和", ["高兴", "悲伤", "平和"]),
    ],
)
def test_lists_of_labels(labels: LabelSet, text: str, expected: list[str] | None) -> None:
    read = Several(labels).read(text)
    assert read.answer == expected, read
    assert (read.status == "ok") == (expected is not None)


def test_a_label_is_named_by_a_part_that_no_other_has() -> None:
    labels = slashed(["a/b", "b/c", "c", "d (e)"])
    assert labels.forms == {
        "a/b": "a/b",
        "a": "a/b",
        "b/c": "b/c",
        "c": "c",
        "d (e": "d (e)",
        "d": "d (e)",
        "e": "d (e)",
    }
    assert Ranked(labels, 2).read("c, a, e").answer == ["c", "a/b"]
    assert Several(PLAIN).read("I cannot tell").status == "refused"


def test_free_texts() -> None:
    kind = Text()
    assert kind.read("<think>x</think> She left. ").answer == "She left."
    assert kind.read("<think>x</think>").status == "malformed"
    for refusal in (
        "I'm sorry. I cannot answer this question!",
        "As an AI, I can't help with that.",
    ):
        assert kind.read(refusal).status == "refused"
        assert Text(refusals=False).read(refusal).answer == refusal
    for reply in (
        "I can't say how sorry I am. Do you want to talk about your father a little?",
        "The nurse was not sure what to do, so she called the doctor. He came at once and helped.",
    ):
        assert kind.read(reply).answer == reply


PIECES = st.sampled_from(
    [
        *KOREAN.labels,
        *NOVICE.labels,
        "and",
        "/",
        ",",
        "(",
        ")",
        "및",
        "none",
        "not",
        "\n1. ",
        "x",
        "와",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=8).map(" ".join)))
def test_nothing_makes_a_reader_raise(text: str) -> None:
    kinds = (Several(KOREAN), Several(NOVICE, none=""), Several(MARATHI), Ranked(NOVICE, 2), Text())
    for kind in (*kinds, Numbers(1, 7, ("empathy", "distress")), Numbers(0, 1)):
        read = kind.read(text)
        assert read.status in STATUSES
        assert (read.answer is not None) == (read.status == "ok")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(KOREAN.labels), min_size=1, unique=True),
    st.sampled_from([", ", "; ", "\n", "、", " / ", " 및 ", "\n- "]),
)
def test_every_list_of_labels_is_read_back(labels: list[str], separator: str) -> None:
    read = Several(KOREAN).read(separator.join(labels))
    assert read.answer == [label for label in KOREAN.labels if label in labels]
