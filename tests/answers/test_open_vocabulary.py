"""Open-vocabulary precision and recall: by hand, against scikit-learn, and the groupings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score
from sklearn.preprocessing import MultiLabelBinarizer

from mmemo.answers.emotion_wheels import load_grouping, overlap
from mmemo.answers.parsing import parse_open
from mmemo.errors import EvaluationError
from tests.answers.test_emotion_wheels import write_wheels

FORMS = load_grouping("forms")
WORDS = ["happy", "sad", "angry", "fear", "moved", "wistful"]


@pytest.mark.parametrize(
    ("said", "true", "precision", "recall"),
    [
        (["happy"], ["happy"], 1, 1),
        (["Joyful", "happiness"], ["happy", "surprised"], 1, 1 / 2),  # forms are one word
        (["happy", "sad", "moved"], ["happy", "wistful"], 1 / 3, 1 / 2),
        (["sad"], ["happy"], 0, 0),
        ([], ["happy"], 0, 0),
        (["not happy"], ["happy"], 0, 0),
    ],
)
def test_by_hand(said: list[str], true: list[str], precision: float, recall: float) -> None:
    found = overlap(said, true, FORMS)
    assert found is not None
    assert (found.precision, found.recall) == (pytest.approx(precision), pytest.approx(recall))
    assert found.average == pytest.approx((precision + recall) / 2)


Sets = st.lists(
    st.tuples(
        st.sets(st.sampled_from(WORDS), max_size=4),
        st.sets(st.sampled_from(WORDS), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(Sets)
def test_means_over_clips_equal_scikit_learn_s_sample_averages(clips: list[tuple[set, set]]):
    binary = MultiLabelBinarizer(classes=WORDS).fit([WORDS])
    said, true = (binary.transform([clip[side] for clip in clips]) for side in (0, 1))
    ours = [overlap(sorted(p), sorted(g), FORMS) for p, g in clips]
    for name, metric in (("precision", precision_score), ("recall", recall_score)):
        mean = sum(getattr(one, name) for one in ours) / len(ours)
        assert mean == pytest.approx(metric(true, said, average="samples", zero_division=0))


def test_a_file_of_groups_joins_words_and_their_forms(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"joy": ["happy", "glad"], "upset": ["sad", "angry"]}))
    groups = load_grouping(str(file))
    assert groups[0](["joyful", "Glad", "sadness", "moved"]) == {"joy", "upset", "moved"}
    assert overlap(["anger", "glad"], ["sad"], groups).precision == 1 / 2


def test_wheels_are_five_groupings_whose_mean_counts(tmp_path: Path) -> None:
    wheels = load_grouping(str(write_wheels(tmp_path / "w")))
    assert len(wheels) == 5
    # "fearful" is a word of the first wheel only, under "scared" as "worried" is on all five.
    found = overlap(["worried"], ["fearful"], wheels)
    alone = [overlap(["worried"], ["fearful"], [one]).precision for one in wheels]
    assert found.precision == pytest.approx(sum(alone) / 5)
    assert alone[0] == 1


def test_bad_groupings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    with pytest.raises(EvaluationError, match="use 'forms', a JSON file of groups, or"):
        load_grouping(str(file))
    for text, message in (
        ('{"joy": ["glad"], "ease": ["glad"]}', "'glad' is in the groups 'joy' and 'ease'"),
        ('{"joy": "glad"}', "'joy' must be a list"),
        ("[]", "holds no groups"),
        ("{", "cannot be read"),
    ):
        other = tmp_path / f"{len(text)}.json"
        other.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            load_grouping(str(other))


def test_a_truth_that_no_grouping_knows_cannot_be_scored(tmp_path: Path) -> None:
    official = load_grouping(str(write_wheels(tmp_path / "w")), "official")
    assert overlap(["happy"], ["neutral"], official) is None
    found = overlap(["neutral", "happy"], ["happy"], official)  # an unknown word is free there
    assert found is not None
    assert found.precision == 1


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<answer>happy, sad</answer>", "ok"),
        ("Happy and not sad", "ok"),
        ("I cannot tell from this clip.", "refused"),
        ("<think>happy</think><answer> </answer>", "malformed"),
        ("", "malformed"),
    ],
)
def test_open_answers_have_a_status_and_no_label(text: str, status: str) -> None:
    assert (parse_open(text).status, parse_open(text).label) == (status, None)
