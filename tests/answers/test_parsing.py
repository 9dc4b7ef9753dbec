"""Reading answers: strict, total, and never in favour of a vague one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.answers.parsing import (
    EMOTION_FORMS,
    STATUSES,
    LabelSet,
    answer_start,
    emotion_labels,
    parse,
    yes_no,
)
from mmemo.errors import EvaluationError

EMOTIONS = emotion_labels(["happy", "sad", "angry", "fear", "surprise", "neutral"])
LABELS = st.sampled_from(EMOTIONS.labels)
# Text that cannot open an answer tag by itself.
PROSE = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=60)


def read(text: str, labels: LabelSet = EMOTIONS) -> tuple[str, str | None]:
    parsed = parse(text, labels)
    return parsed.status, parsed.label


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Lowered brows.</think><answer>angry</answer>", "angry"),
        ("<answer> Anger. </answer>", "angry"),
        ("<ANSWER>**Sadness**</ANSWER>", "sad"),
        ("<answer>happy</answer> no wait <answer>fear</answer>", "fear"),
        ("<think>sad, or happy?</think>\nfearful", "fear"),
        ("surprised", "surprise"),
        ("<answer>The person is surprised.</answer>", "surprise"),
        ("<answer>angry", "angry"),
        ("<answer>no emotion</answer>", "neutral"),
        ("<answer>Happy, joyful, full of joy</answer>", "happy"),
        ("<think>never closed, sad</think><answer>ＨＡＰＰＹ</answer>", "happy"),
    ],
)
def test_reads_what_is_said(text: str, expected: str) -> None:
    assert read(text) == ("ok", expected)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "malformed"),
        ("<answer></answer>", "malformed"),
        ("<answer>angry</answer><answer></answer>", "malformed"),
        ("<answer>angry or sad</answer>", "malformed"),
        ("<answer>happy, sad, angry, fear, surprise, neutral</answer>", "malformed"),
        ("<answer>not happy</answer>", "malformed"),
        ("<answer>she isn’t sad</answer>", "malformed"),
        ("<answer>melancholy</answer>", "malformed"),
        ("<answer>unhappy</answer>", "malformed"),
        ("<answer>sadistic</answer>", "malformed"),
        ("<think>angry", "malformed"),
        ("<answer>I cannot tell.</answer>", "refused"),
        ("I can’t determine whether it is anger.", "refused"),
        ("<answer>unknown</answer>", "refused"),
        ("As an AI, I have no view on faces.", "refused"),
    ],
)
def test_counts_what_it_cannot_read(text: str, status: str) -> None:
    assert read(text) == (status, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>Yes</answer>", ("ok", "yes")),
        ("<answer>No, the brow does not show it.</answer>", ("ok", "no")),
        ("<answer>yes and no</answer>", ("malformed", None)),
        ("<answer>I would not say yes</answer>", ("malformed", None)),
        ("<answer>It is noted.</answer>", ("malformed", None)),
    ],
)
def test_yes_or_no(text: str, expected: tuple[str, str | None]) -> None:
    assert read(text, yes_no()) == expected


def test_a_letter_must_be_marked_as_a_choice() -> None:
    letters = LabelSet(("A", "B", "C"))
    assert read("<answer>(A)</answer>", letters) == ("ok", "A")
    assert read("<answer>b.</answer>", letters) == ("ok", "B")
    assert read("<answer>(B) brows lowered</answer>", letters) == ("ok", "B")
    assert read("<answer>C: a high pitch</answer>", letters) == ("ok", "C")
    assert read("<answer>It is (C), a high pitch.</answer>", letters) == ("ok", "C")
    assert read("<answer>(A) or (B)</answer>", letters) == ("malformed", None)
    assert read("<answer>A, B, C</answer>", letters) == ("malformed", None)
    # An English article is no option: the trap of the usual letter pattern.
    assert read("<answer>a person who smiles</answer>", letters) == ("malformed", None)


def test_a_longer_label_wins_over_the_one_inside_it() -> None:
    levels = LabelSet(("low", "very low", "high"))
    assert read("<answer>it is very low</answer>", levels) == ("ok", "very low")


def test_labels_of_scripts_without_spaces() -> None:
    labels = LabelSet(("生气", "高兴"))
    assert read("<answer>他很生气。</answer>", labels) == ("ok", "生气")
    assert read("<answer>生气还是高兴</answer>", labels) == ("malformed", None)


def test_two_labels_of_one_form_group_share_no_alias() -> None:
    labels = emotion_labels(["happy", "joy", "sad"])
    assert read("<answer>joy</answer>", labels) == ("ok", "joy")
    assert read("<answer>happiness</answer>", labels) == ("malformed", None)


def test_an_ambiguous_form_is_refused() -> None:
    with pytest.raises(EvaluationError, match="already means sad"):
        LabelSet(("sad", "blue"), {"blue": ("Sad",)})
    with pytest.raises(EvaluationError, match="not a label"):
        LabelSet(("sad",), {"mad": ("angry",)})


def test_no_form_stands_in_two_groups() -> None:
    forms = [form for group in EMOTION_FORMS for form in group]
    assert len(forms) == len(set(forms))


@settings(deadline=None)  # patterns are compiled when they are first used
@given(st.text(max_size=200))
def test_every_text_gets_one_status(text: str) -> None:
    parsed = parse(text, EMOTIONS)
    assert parsed.status in STATUSES
    assert (parsed.label is not None) == (parsed.status == "ok")
    assert parsed.label is None or parsed.label in EMOTIONS.labels


@settings(deadline=None)  # patterns are compiled when they are first used
@given(PROSE, LABELS, st.sampled_from([str.upper, str.title, str.lower]), PROSE)
def test_the_last_tag_decides_whatever_surrounds_it(before: str, label: str, case, after) -> None:
    text = f"{before}<answer>sad</answer>{before}<answer>{case(label)}</answer>{after}"
    assert read(text) == ("ok", label)


@settings(deadline=None)  # patterns are compiled when they are first used
@given(LABELS, st.data())
def test_every_form_means_its_label(label: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([label, *EMOTIONS.aliases[label]]))
    assert read(f"<answer>{form}</answer>") == ("ok", label)
    assert read(f"the answer is {form}.") == ("ok", label)


@settings(deadline=None)  # patterns are compiled when they are first used
@given(st.lists(LABELS, min_size=2, max_size=6, unique=True), st.sampled_from([", ", " ", "/"]))
def test_several_labels_are_never_an_answer(labels: list[str], glue: str) -> None:
    assert read(f"<answer>{glue.join(labels)}</answer>") == ("malformed", None)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("<think>Low brows.</think><answer>sad</answer>", "<think>Low brows.</think>"),
        ("<answer>sad</answer> or <ANSWER>happy", "<answer>sad</answer> or "),
        ("<think>Low brows.</think> sad", "<think>Low brows.</think>"),
        ("sad", ""),
        ("<think>Low brows", None),
    ],
)
def test_where_an_answer_begins(text: str, before: str | None) -> None:
    start = answer_start(text)
    assert (None if start is None else text[:start]) == before
