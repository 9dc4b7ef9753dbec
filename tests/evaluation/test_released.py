"""Released scorers repeated: by hand, and where a library is behind one, against the library."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from mmemo.evaluation.released.classes import emobench_labels, weighted
from mmemo.evaluation.released.letters import (
    SPELT,
    humanvbench,
    mmmu_letter,
    mmsu,
    mmsu_lmms_eval,
    omnibench,
    spelt,
)

FOUR = ["happy", "sad", "angry", "calm"]


def row(raw: str, truth: str = "B", choices: list[str] = FOUR, exact: bool = True) -> Any:
    return {"raw": raw, "truth": truth, "choices": choices, "group": {SPELT: spelt(exact)}}


def test_weighted_is_scikit_learns() -> None:
    rng = random.Random(0)
    for _ in range(50):
        labels = ["a", "b", "c", "d"][: rng.randrange(1, 5)]
        pairs = [(rng.choice(labels), rng.choice(["a", "b", "c", "d"])) for _ in range(20)]
        truth, answers = [one for one, _ in pairs], [one for _, one in pairs]
        more: dict[str, Any] = {"average": "weighted", "zero_division": 0}
        assert weighted(pairs) == pytest.approx(
            {
                "accuracy": accuracy_score(truth, answers),
                "precision": precision_score(truth, answers, **more),
                "recall": recall_score(truth, answers, **more),
                "f1": f1_score(truth, answers, **more),
            }
        )
    assert weighted([]) == {}


def test_emobench_drops_all_that_is_not_just_a_label() -> None:
    official = emobench_labels("true", "false")
    rows = [
        {"raw": raw, "truth": truth}
        for raw, truth in [
            *(("True", "true"), (" false\n", "false"), ("true.", "true"), ("", "true")),
            *(("<think>Hm.</think>false", "true"), ("It is true", "true")),
        ]
    ]
    told = official(rows)
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["dropped"] == 3


def test_mmsu_repeats_the_letter_before_an_empty_answer() -> None:
    told = mmsu([row(""), row("B"), row(""), row("None", "C"), row("E"), row("x\nB.")])
    # The first has no letter before it; E has none of its own and is dropped.
    assert told == {"accuracy": pytest.approx(3 / 4), "dropped": 2, "reused": 2}
    assert mmsu([row("B", exact=False)])["accuracy"] == 0
    # Two choices with the same text are both right.
    assert mmsu([row("A", choices=["sad", "sad"])])["accuracy"] == 1
    assert mmsu([row("D", choices=["a", "b"])])["accuracy"] == 0
    assert mmsu([]) == {"dropped": 0, "reused": 0}


def test_mmmu_letters() -> None:
    assert mmmu_letter("(A) or (C)", FOUR) == "C"
    assert mmmu_letter("A B C", FOUR) == "C"
    assert mmmu_letter("The answer is D.", FOUR) == "D"
    # With full stops only, all places are unknown and the first letter wins.
    assert mmmu_letter("Not B. But C.", FOUR) == "B"
    assert mmmu_letter("I think that the woman is sad", FOUR) == "B"
    assert mmmu_letter("She is sad", FOUR) is None
    assert mmmu_letter("", FOUR) is None


def test_lmms_eval_draws_letters() -> None:
    rows = [row("B"), row("sad"), row("B.", "C")]
    told = mmsu_lmms_eval(rows)
    assert told == {"lmms_eval_accuracy": pytest.approx((1 + 1 / 4) / 3), "lmms_eval_random": 1}
    # A missing choice is an empty text, which every long answer contains, at its very end.
    long = row("I think that the woman is sad", choices=["happy", "sad"])
    assert mmsu_lmms_eval([long])["lmms_eval_accuracy"] == 0


def test_omnibench_counts_unreadable_answers_as_wrong() -> None:
    told = omnibench([row("(B)"), row("sad"), row("PLAN B it is")])
    assert told == {"accuracy": pytest.approx(2 / 3), "dropped": 0, "unreadable": 1}


@pytest.mark.parametrize(
    ("raw", "right"),
    [
        ("B", True),
        ("Option B", True),
        ("The best answer is Option B, not A", True),
        ("the best answer is A", False),
        ("Based on it, C", False),
        ("Because of C", True),
        ("A. The man is sad, and walks slowly hom", True),
        ("", False),
    ],
)
def test_humanvbench_letters(raw: str, right: bool) -> None:
    choices = ["happy", "The man is sad, and walks slowly home", "calm"]
    assert humanvbench([row(raw, "B", choices)])["accuracy"] == right
