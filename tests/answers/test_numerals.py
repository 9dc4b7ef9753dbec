"""Numbers in answers: how people and models write them, and what leaves open which one is meant."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.answers.kinds import Numbers

MOSI, SIMS = Numbers(-3, 3), Numbers(-1, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-0.5", -0.5),
        ("<answer>+2</answer>", 2.0),
        ("−1", -1.0),
        ("–2", -2.0),
        ("１．５", 1.5),
        ("－１", -1.0),
        ("٣", 3.0),
        ("1,5", 1.5),
        ("-.5", -0.5),
        ("1e-3", 0.001),
        ("-0", 0.0),
        ("1.5.", 1.5),
        ("**-1.4**", -1.4),
        ("\\boxed{-1.4}", -1.4),
        ('{"score": -1.4}', -1.4),
        ("minus one", -1.0),
        ("Zero.", 0.0),
        ("负0.5", -0.5),
        ("负一", -1.0),
        ("得分是0.5分", 0.5),
        ("分数：-0.5。", -0.5),
        ("-1 (negative)", -1.0),
        ("Negative: -0.8", -0.8),
        ("Score: - 2", -2.0),
        ("0.5, so 0.5", 0.5),
        ("2 on a scale from -3 to 3", 2.0),
        ("从-3到3，我给1.5", 1.5),
        ("From -3 (very negative) to 3 (very positive), I would say 1.", 1.0),
        ("Score => 0.5", 0.5),
        ("<b>0.5</b>", 0.5),
        ('{"score": 0.5, "confidence": 0.9}', 0.5),
        ("about ~0.5", 0.5),
        ("1.4/3", 1.4),
        ("2 out of 3", 2.0),
        ("GPT-4 would say 1", 1.0),
        ("I see 2 people. Final answer: 1.5", 1.5),
        ("score: 1.5 because of the smile at 2 s", 1.5),
        ("1 (confidence 90%)", 1.0),
    ],
)
def test_a_number_is_read_as_it_is_written(text: str, value: float) -> None:
    read = MOSI.read(text)
    assert (read.status, read.answer) == ("ok", value)
    assert str(read.answer) != "-0.0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "positive",
        "很积极",
        "0.5-0.7",
        "0.5 - 0.7",
        "-2~-1",
        "1 to 3",
        "from -1 to 2",
        "between -3 and 3",
        "在-3到3之间",
        "[-3, 3]",
        "1/2",
        "½",
        "1,000",
        "1 or 2",
        "1.5.2",
        "2nd",
        "0.5%",
        "5",
        "-3.01",
        "9" * 400,
        "1e999",
        "negative: 0.8",  # -0.8, or a slip
        "negative 0.8",
        "positive -0.8",
        "- 2",  # a minus, or the mark of a list
        "score: 1-2",
        "±0.5",
        "+/-0.5",
        "> 0.5",
        "≤1",
        '{"valence": 0.5, "arousal": 0.9}',
    ],
)
def test_what_leaves_open_which_number_is_meant_is_malformed(text: str) -> None:
    assert MOSI.read(text).status == "malformed"


def test_a_refusal_is_no_number() -> None:
    assert MOSI.read("I'm sorry, but I can't help with that.").status == "refused"


def test_the_scale_is_that_of_the_task() -> None:
    assert Numbers(0, 10).read("7/10").answer == 7
    assert MOSI.read("2/10").status == "malformed"  # another scale
    assert SIMS.read("0.3 on a scale of -1 to 1").answer == 0.3
    assert SIMS.read("1.5").status == "malformed"
    assert Numbers(0, 100).read("50%").answer == 50


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("arousal: -3, valence: 2", {"arousal": -3.0, "valence": 2.0}),
        ('{"arousal": -3, "valence": 2.5}', {"arousal": -3.0, "valence": 2.5}),
        ("Valence is 2 and arousal is 3", {"arousal": 3.0, "valence": 2.0}),
        ("arousal=3,valence=-0.5", {"arousal": 3.0, "valence": -0.5}),
        ("-3, 2", {"arousal": -3.0, "valence": 2.0}),
        ("3,2", None),
        ("3 2 1", None),
        ("arousal 3", None),
        ("arousal 3, valence 7", None),
        ("arousal 3, arousal 4, valence 1", None),
    ],
)
def test_named_numbers_keep_their_sign(text: str, value: dict[str, float] | None) -> None:
    read = Numbers(-5, 5, ("arousal", "valence")).read(text)
    assert (read.status, read.answer) == ("malformed" if value is None else "ok", value)


MARKS = tuple("-−–+.,07e/%~负分½{\n")
WORDS = ("12", "E5", "得分", "negative", "positive", "score:", "arousal", "valence", " to ", " of ")
PIECES = st.sampled_from((*MARKS, *WORDS, "<answer>"))


@settings(max_examples=600, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join)))
def test_any_text_is_read_or_counted(text: str) -> None:
    for kind in (MOSI, Numbers(0, 100), Numbers(-5, 5, ("arousal", "valence"))):
        read = kind.read(text)
        assert read.status in ("ok", "refused", "malformed")
        assert (read.answer is not None) == (read.status == "ok")
        if read.status == "ok":
            values = read.answer.values() if kind.names else [read.answer]
            assert all(kind.low <= value <= kind.high for value in values)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-300, 300), st.sampled_from(["{}", "Score: {}", "<answer>{}</answer>", "得分{}分"])
)
def test_every_number_of_the_scale_is_read_back(hundredths: int, form: str) -> None:
    value = hundredths / 100
    assert MOSI.read(form.format(value)).answer == value
