"""MER-UniBench's average of open-vocabulary F1, by hand and against the mean of the answers' F1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo import content
from mmemo.answers.emotion_wheels import load_grouping, overlap, precision_recall
from mmemo.errors import EvaluationError
from mmemo.evaluation.scorers.set_scores import (
    LOGGED,
    compare_sets,
    official_f1,
    read_sets,
    set_means,
)
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=200)
FORMS = load_grouping("forms")

# Precision and recall by hand under two groupings; the second does not know the truth of "b".
HAND = [
    [[1.0, 0.5], [1.0, 1.0]],  # a
    [[0.5, 1.0], None],  # b
    [[0.0, 0.0], [0.0, 0.0]],  # c: no words
    None,  # d: unscored
]
# Grouping 1: P = 1.5/3, R = 1.5/3, F1 = 1/2. Grouping 2: P = 1/2, R = 1/2, F1 = 1/2.
# Answer by answer: a (2/3 + 1) / 2 = 5/6, b 2/3, c 0: mean 1/2.


def rows(number: int, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"key": f"k{i}", "sample_id": str(i), "task": "open", "group": {"speaker": f"s{i % 3}"}}
        | fields
        for i in range(number)
    ]


def test_by_hand() -> None:
    found = set_means(rows(4), {"f1": HAND}, CONFIG)
    assert set(found) == {"f1_official", "f1_official_precision", "f1_official_recall"}
    for value in found.values():
        assert value["value"] == pytest.approx(1 / 2)
        assert (value["n"], value["unscored"], value["subsets"]) == (3, 1, {})
        assert value["low"] <= value["value"] <= value["high"]


def test_the_official_average_differs_from_the_mean_of_f1() -> None:
    # One precise answer and one complete one: the means over the answers hide that they trade.
    pairs = [[[1.0, 0.25]], [[0.25, 1.0]]]
    official = set_means(rows(2), {"f1": pairs}, CONFIG)["f1_official"]["value"]
    assert official == pytest.approx(0.625)  # P = R = 0.625
    assert np.mean([2 * p * r / (p + r) for ((p, r),) in pairs]) == pytest.approx(0.4)


def test_wheels_are_averaged_after_f1() -> None:
    # Wheel 1: P 1, R 1/2, F1 2/3. Wheel 2: all 0. The F1 of the wheels' mean P and R is 1/3 too, so
    # the third case tells them apart.
    sums = np.array([[2.0, 1.0, 2.0], [0.0, 0.0, 2.0]])
    assert official_f1(sums) == pytest.approx(1 / 3)
    assert official_f1(np.stack([sums, sums])) == pytest.approx([1 / 3] * 2)
    traded = np.array([[2.0, 0.5, 2.0], [0.5, 2.0, 2.0]])
    assert official_f1(traded) == pytest.approx(0.4)  # of the mean P and R it is 0.625
    # A wheel without answers does not count, and nothing is divided by it.
    assert official_f1(np.array([[2.0, 1.0, 2.0], [0.0, 0.0, 0.0]])) == pytest.approx(2 / 3)
    assert np.isnan(official_f1(np.zeros((2, 3))))


WORDS = st.sets(st.sampled_from(["happy", "sad", "angry", "moved"]), max_size=3)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
def test_equals_the_released_loop(clips: list[tuple[set[str], set[str]]]) -> None:
    # The scorer's loop, written down from its description.
    precisions: list[float] = []
    recalls: list[float] = []
    for said, true in clips:
        if true:
            precisions.append(len(said & true) / len(said) if said else 0.0)
            recalls.append(len(said & true) / len(true))
    pairs = [precision_recall(sorted(said), sorted(true), FORMS) for said, true in clips]
    found = set_means(rows(len(clips)), {"f1": pairs}, CONFIG)["f1_official"]
    if not precisions:
        assert (found["value"], found["n"]) == (None, 0)
        return
    p, r = np.mean(precisions), np.mean(recalls)
    assert found["value"] == pytest.approx(2 * p * r / (p + r) if p + r else 0.0, abs=1e-6)
    assert (found["n"], found["unscored"]) == (len(precisions), len(clips) - len(precisions))


def test_an_answer_s_own_f1_is_that_of_its_sets() -> None:
    found = overlap(["happy", "sad", "moved"], ["happy", "angry"], FORMS)
    assert found is not None
    assert found.f1 == pytest.approx(2 * 1 / (3 + 2))
    nothing = overlap([], ["happy"], FORMS)
    assert nothing is not None
    assert nothing.f1 == 0


def test_subsets_have_values_of_their_own() -> None:
    asked = rows(4)
    for row, subset in zip(asked, ["consistent", "video_aligned"] * 2, strict=True):
        row["conflict"] = subset
    pairs = [[[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 1.0]], None]
    found = set_means(asked, {"f1": pairs}, CONFIG)["f1_official"]["subsets"]
    assert {name: (one["value"], one["n"], one["unscored"]) for name, one in found.items()} == {
        "video_aligned": (0, 1, 1),
        "consistent": (1, 2, 0),
    }


def test_comparison_is_paired() -> None:
    ours = [[[1.0, 0.5]], [[1.0, 1.0]], [[1.0, 1.0]]]
    theirs = [[[0.5, 0.5]], [[1.0, 1.0]], None]
    found = compare_sets(rows(3), {"f1": ours}, {"f1": theirs}, CONFIG)["f1_official"]
    # The third answer counts in neither: ours P 1, R 3/4; theirs P = R = 3/4.
    assert (found["a"], found["b"]) == (pytest.approx(6 / 7, abs=1e-6), pytest.approx(3 / 4))
    assert found["value"] == pytest.approx(6 / 7 - 3 / 4, abs=1e-6)
    assert (found["n"], found["unscored"]) == (2, 1)
    same = compare_sets(rows(3), {"f1": ours}, {"f1": ours}, CONFIG)["f1_official"]
    assert same["value"] == 0
    assert compare_sets(rows(3), {"f1": ours}, {"g1": theirs}, CONFIG) == {}


def test_what_is_logged_wrongly_is_named() -> None:
    for wrong in ([0.5], [[0.5]], [["a", "b"]], 3.0):
        with pytest.raises(
            EvaluationError, match="score 'f1' logs a 'precision_recall' that is no"
        ):
            set_means(rows(1), {"f1": [wrong]}, CONFIG)  # type: ignore[list-item]


def test_scores_files_without_pairs_read_as_none(tmp_path: Path) -> None:
    asked, path = rows(2), tmp_path / "scores.jsonl"
    assert read_sets(path, asked) == {}
    lines = [{"key": row["key"], "scores": {"f1": 0.5}} for row in asked]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_sets(path, asked) == {}
    lines[0][LOGGED] = {"f1": [[1.0, 0.5]]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_sets(path, asked) == {"f1": [[[1.0, 0.5]], None]}


@pytest.mark.parametrize("spec", ["eval/ca_mer.py:words", "reward/emotion_wheel.py:wheel_f1"])
def test_scores_of_sets_log_their_pairs(spec: str, tmp_path: Path) -> None:
    from tests.answers.test_emotion_wheels import write_wheels

    folder = str(write_wheels(tmp_path / "w"))
    logged: dict[str, Any] = {}
    given: dict[str, Any] = {"labels": [["happy"], []], "log_extra": logged.__setitem__}
    if spec.startswith("eval"):
        given |= {"task": ["open_vocabulary", "emotion"], "value": "f1", "grouping": folder}
    else:
        given |= {"folder": folder, "need_tag": False}
    content.load(spec)(["?"] * 2, ["happy", "happy"], **given)
    scored, unscored = logged["precision_recall"]
    assert [tuple(pair) for pair in scored] == [(1, 1)] * 5
    assert unscored in (None, [None] * 5)
