"""Answers against raters' votes: the three rules, KL and macro-F1 by hand, and the edge cases."""

from __future__ import annotations

from fractions import Fraction
from math import log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mmemo.errors import EvaluationError
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.votes import (
    all_inclusive_rule,
    majority_rule,
    plurality_rule,
    votes,
)
from mmemo.evaluation.scoring import score_rows
from mmemo.statistics import BootstrapConfig

LABELS = ("neutral", "angry", "sad", "happy")
CONFIG = BootstrapConfig(resamples=100)
EXAMPLE = {"angry": 2, "sad": 2, "neutral": 1}  # A, S, S, N, A


def row(number: int, human: Any, answer: Any) -> dict[str, Any]:
    status = "malformed" if answer is None else "ok"
    own = {"sample_id": f"r{number}", "task": "votes", "labels": [], "truth": human}
    speaker = {"group": {"speaker": f"s{number}"}, "media": {}}
    return {**own, **speaker, "votes": human, "answer": answer, "status": status}


def numbers(pairs: list[tuple[Any, Any]], **params: Any) -> dict[str, Any]:
    rows = [row(number, *pair) for number, pair in enumerate(pairs)]
    spec = use("votes", labels=list(LABELS), **params)
    scored = score_rows(rows, CONFIG, {"votes": [spec]})["votes"]["scored"]
    return {name: found["value"] for name, found in scored.items()} | {"n": scored["kl"]["n"]}


def test_the_worked_example_of_the_three_rules() -> None:
    assert all_inclusive_rule(EXAMPLE, 4) == {"angry", "sad"}
    assert plurality_rule(EXAMPLE) is None  # two of five and two of five
    assert majority_rule(EXAMPLE) is None
    assert majority_rule({"angry": 3, "sad": 2}) == "angry"
    assert majority_rule({"angry": 2, "sad": 2}) is None  # a half is no majority
    assert plurality_rule({"angry": 2, "sad": 1, "neutral": 1}) == "angry"


def test_a_share_of_just_one_in_c_is_not_above_it() -> None:
    assert all_inclusive_rule({"angry": 1, "sad": 3}, 4) == {"sad"}
    assert all_inclusive_rule(dict.fromkeys("abc", 5), 3) == set()
    assert all_inclusive_rule({}, 4) == set()


@given(st.dictionaries(st.sampled_from(LABELS), st.integers(0, 12)))
def test_the_rules_agree_with_exact_fractions(human: dict[str, int]) -> None:
    total = sum(human.values())
    shares = {label: Fraction(count, total) for label, count in human.items()} if total else {}
    assert all_inclusive_rule(human, 4) == {k for k, v in shares.items() if v > Fraction(1, 4)}
    assert majority_rule(human) == next((k for k, v in shares.items() if v > Fraction(1, 2)), None)
    top = [k for k, v in shares.items() if v == max(shares.values())]
    assert plurality_rule(human) == (top[0] if len(top) == 1 else None)


def test_kl_by_hand() -> None:
    # 0.05 of the answer is spread over four labels.
    said = {"angry": 0.95 * 0.5 + 0.0125, "sad": 0.95 * 0.5 + 0.0125, "neutral": 0.0125}
    expected = 0.4 * log(0.4 / said["angry"]) * 2 + 0.2 * log(0.2 / said["neutral"])
    found = numbers([(EXAMPLE, {"angry": 0.5, "sad": 0.5})])
    assert found["kl"] == pytest.approx(expected, abs=1e-6)
    assert numbers([(EXAMPLE, ["angry", "sad"])])["kl"] == found["kl"]
    single = numbers([({"happy": 9}, "happy")])
    assert single["kl"] == pytest.approx(log(1 / (0.95 + 0.0125)), abs=1e-6)


def test_an_answer_that_cannot_be_read_is_the_worst_or_left_out_of_kl() -> None:
    pairs = [({"happy": 3}, "happy"), ({"happy": 3}, None)]
    good, bad = log(1 / 0.9625), log(1 / 0.0125)
    assert numbers(pairs)["kl"] == pytest.approx((good + bad) / 2, abs=1e-6)
    left_out = numbers(pairs, unreadable="left_out")
    assert left_out["kl"] == pytest.approx(good, abs=1e-6)
    assert left_out["macro_f1"] == pytest.approx(2 / 3, abs=1e-6)  # it stays a miss
    assert left_out["majority_accuracy"] == 0.5


def test_macro_f1_is_of_all_rows_and_not_of_batches() -> None:
    pairs = [
        (EXAMPLE, ["angry", "sad"]),
        ({"sad": 4, "happy": 1}, "happy"),
        ({"neutral": 5}, {"neutral": 0.5, "angry": 0.5}),
    ]
    # angry: 1 right, 1 false. sad: 1 right, 1 missed. neutral: 1 right. happy is in no target.
    found = numbers(pairs)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3, abs=1e-6)
    truth = [[0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    said = [[0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    by_class = f1_score(truth, said, average=None, zero_division=0)
    assert found["macro_f1"] == pytest.approx(by_class[:3].mean(), abs=1e-6)
    by_batch = sum(numbers([pair])["macro_f1"] for pair in pairs) / 3
    assert by_batch != pytest.approx(found["macro_f1"])


def test_rules_leave_out_what_they_must_and_say_how_much() -> None:
    pairs = [
        (EXAMPLE, "angry"),  # a tie: all-inclusive only
        ({"sad": 2, "happy": 1, "angry": 1}, "sad"),  # half: no majority
        ({"happy": 3, "sad": 1}, "sad"),
        ({"happy": 3, "sad": 1}, ["happy", "sad"]),  # names no single label
    ]
    found = numbers(pairs)
    assert (found["majority_kept"], found["plurality_kept"]) == (0.5, 0.75)
    assert found["all_inclusive_kept"] == 1
    assert found["majority_accuracy"] == 0
    assert found["plurality_accuracy"] == pytest.approx(1 / 3, abs=1e-6)


def test_an_even_vote_has_no_target_and_counts_for_kl_alone() -> None:
    even = dict.fromkeys(LABELS, 2)
    alone, beside = [({"sad": 3}, "sad")], [({"sad": 3}, "sad"), (even, "happy")]
    assert numbers(beside)["macro_f1"] == numbers(alone)["macro_f1"] == 1
    assert numbers(beside)["all_inclusive_kept"] == 0.5
    assert numbers(beside)["kl"] > numbers(alone)["kl"]


def test_rows_without_votes_are_not_scored() -> None:
    assert numbers([({"sad": 3}, "sad"), ({}, "sad"), (None, "sad"), ({"sad": 0}, "sad")])["n"] == 1


@pytest.mark.parametrize("human", [{"bored": 1}, {"sad": -1}, {"sad": "2"}, ["sad"], {"sad": True}])
def test_votes_that_are_none_are_errors(human: Any) -> None:
    with pytest.raises(EvaluationError, match=r"r0: 'votes' (has|must map)"):
        numbers([(human, "sad")])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(EvaluationError, match="smoothing between 0 and 1"):
        use("votes", labels="crema_d", smoothing=0).load()
    with pytest.raises(EvaluationError, match="scorer 'votes'"):
        use("votes").load()
    assert votes(labels="crema_d").metrics["kl"].lower_is_better


def test_sides_follow_voice_or_words() -> None:
    implied = {"modality_labels": {"audio": "A", "text": "B, C"}}
    rows = [row(number, {}, answer) | implied for number, answer in enumerate("AABCD")]
    rows += [row(5, {}, None) | implied, row(6, {}, "A") | {"modality_labels": {"audio": "A"}}]
    rows += [row(7, {}, "A") | {"modality_labels": {"audio": "A", "text": "A,B"}}]
    found = score_rows(rows, CONFIG, {"votes": [use("sides")]})["votes"]["scored"]
    values = {name: one["value"] for name, one in found.items()}
    third = pytest.approx(1 / 3, abs=1e-6)
    assert values == {"signed": 0, "voice_share": third, "words_share": third}
    assert (found["signed"]["n"], found["signed"]["unscored"]) == (6, 2)
    with pytest.raises(EvaluationError, match="must be two of audio, video, text"):
        use("sides", first="audio", second="face").load()
