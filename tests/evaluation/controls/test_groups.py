"""Balanced groups and the level that chance gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmemo.evaluation.config import ControlsConfig, EvalConfig
from mmemo.evaluation.controls.groups import CLASS, balanced_groups
from mmemo.evaluation.predictions import Row
from mmemo.statistics import BootstrapConfig

LABELS = ["a", "b", "c"]


def config(seed: int = 0, **controls: Any) -> EvalConfig:
    """The two sections that groups read."""
    return EvalConfig.model_construct(
        controls=ControlsConfig(**{"simulations": 200, **controls}),
        bootstrap=BootstrapConfig(seed=seed),
    )


def rows(right: dict[str, float], n: int = 200, seed: int = 0, key: str = "gender") -> list[Row]:
    """``n`` answers of each group, right with a probability."""
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for group, share in right.items():
        for place in range(n):
            truth = LABELS[place % 3]
            wrong = LABELS[(place + 1) % 3]
            answer = truth if rng.random() < share else wrong
            row = {"truth": truth, "answer": answer, "status": "ok", "labels": LABELS}
            found.append({**row, "group": {key: group}})
    return found


def test_small_samples_by_hand() -> None:
    # Ten answers each, so that the balanced sample is all of them and no draw matters.
    asked = rows({"f": 1.0, "m": 0.0}, 10)
    for row in asked[10:15]:
        row["answer"] = row["truth"]
    block = balanced_groups(asked, config())["gender"]
    war = block["metrics"]["war"]
    assert block["balanced_to"] == 10
    assert block["n"] == {"f": 10, "m": 10}
    assert war["all"] == 0.75
    assert war["groups"] == {
        "f": {"value": 1.0, "difference": 0.25},
        "m": {"value": 0.5, "difference": -0.25},
    }
    assert (war["worst"], war["best"], war["difference"], war["gap"]) == ("m", "f", -0.25, 0.5)
    # Of m, a is right 2 of 4 times, b 2 of 3 and c 1 of 3.
    assert block["metrics"]["uar"]["groups"]["m"]["value"] == 0.5


def test_groups_are_balanced_and_small_ones_named() -> None:
    asked = rows({"f": 0.9, "m": 0.3}, 300)
    del asked[340:]  # 40 of m
    asked += rows({"x": 0.9}, 9)
    block = balanced_groups(asked, config())["gender"]
    assert block["balanced_to"] == 40
    assert block["left_out"] == {"x": 9}
    war = block["metrics"]["war"]
    # All is the mean of groups of equal size, although f has more answers.
    values = [one["value"] for one in war["groups"].values()]
    assert war["all"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert balanced_groups(rows({"f": 0.9}), config()).keys() == {CLASS}


def test_a_real_difference_is_beyond_chance_and_none_is_not() -> None:
    unfair = balanced_groups(rows({"f": 0.9, "m": 0.5}), config())["gender"]["metrics"]["war"]
    assert unfair["worst"] == "m"
    assert unfair["beyond_chance"]
    assert -unfair["difference"] == pytest.approx(0.2, abs=0.05)
    false_alarms = [
        balanced_groups(rows({"f": 0.7, "m": 0.7}, seed=seed), config())["gender"]
        for seed in range(20)
    ]
    assert not any(one["metrics"]["war"]["beyond_chance"] for one in false_alarms)


def test_the_level_of_chance_falls_with_the_size_of_the_groups() -> None:
    def level(n: int) -> float:
        block = balanced_groups(rows({"f": 0.7, "m": 0.7}, n), config())["gender"]
        return block["metrics"]["war"]["chance"]["exchanged"]["gap"]

    few, many = level(25), level(400)
    assert few > 2.5 * many  # a quarter, but for chance: it falls with the root of the size
    # The largest of 200 gaps with a deviation of sqrt(2 · .7 · .3 / 400) = .032.
    assert 2 * 0.032 < many < 4.5 * 0.032


def test_the_random_model_knows_nothing() -> None:
    war = balanced_groups(rows({"f": 1.0, "m": 1.0}, 300), config())["gender"]["metrics"]["war"]
    # Answers that are all right stay so when they are exchanged; guesses are right by a third.
    assert war["chance"]["exchanged"] == {"difference": 0.0, "gap": 0.0}
    deviation = (2 * (1 / 3) * (2 / 3) / 300) ** 0.5
    assert 2 * deviation < war["chance"]["random"]["gap"] < 4.5 * deviation


def test_classes_have_the_accuracy_of_their_questions() -> None:
    asked = rows({"f": 1.0, "m": 1.0}, 60)
    for row in asked:
        if row["truth"] == "c" and row["group"]["gender"] == "f":
            row["answer"], row["status"] = None, "malformed"
    block = balanced_groups(asked, config())[CLASS]
    war = block["metrics"]["war"]
    assert {name: one["value"] for name, one in war["groups"].items()} == {"a": 1, "b": 1, "c": 0.5}
    assert (war["worst"], war["beyond_chance"]) == ("c", True)
    assert list(block["metrics"]) == ["war"]


def test_numbers_have_ccc() -> None:
    rng = np.random.default_rng(1)
    asked: list[Row] = []
    for group, spread in (("f", 0.1), ("m", 2.0)):
        for truth in rng.normal(0, 1, 200).round(3).tolist():
            answer = round(truth + spread * float(rng.normal()), 3)
            row: Row = {"truth": truth, "answer": answer, "status": "ok", "labels": []}
            asked.append({**row, "group": {"gender": group}})
    asked.append({"truth": 1.0, "answer": None, "status": "malformed", "labels": [], "group": {}})
    found = balanced_groups(asked, config())
    assert list(found) == ["gender"]
    ccc = found["gender"]["metrics"]["ccc"]
    assert ccc["groups"]["f"]["value"] > 0.98
    # CCC of y = x + 2 e is 2 · 1 / (1 + 1 + 4) = 1/3.
    assert ccc["groups"]["m"]["value"] == pytest.approx(1 / 3, abs=0.12)
    assert ccc["worst"] == "m"
    assert ccc["beyond_chance"]
    named = [
        {**row, **{key: {"v": row[key], "a": 1} for key in ("truth", "answer")}}
        for row in asked[:-1]
    ]
    apart = balanced_groups(named, config())
    assert list(apart) == ["gender (v)", "gender (a)"]
    assert apart["gender (v)"]["metrics"]["ccc"]["groups"]["f"]["value"] > 0.98
    assert apart["gender (a)"]["metrics"] == {}  # where nothing varies there is no CCC
    assert balanced_groups([{**row, "truth": "a text"} for row in asked], config()) == {}


def test_the_same_seed_gives_the_same_numbers_in_any_order() -> None:
    asked = rows({"f": 0.8, "m": 0.6}, 50)
    one, two = (balanced_groups(asked, config()) for _ in range(2))
    assert one == two
    more = [{**row, "group": {"accent": "x", **row["group"]}} for row in asked]
    assert balanced_groups(more, config())["gender"] == one["gender"]
    assert balanced_groups(asked, config(seed=1)) != one
    assert balanced_groups(asked, config(simulations=0)) == {}


@pytest.mark.parametrize("seed", range(30))
def test_any_answers_give_numbers_in_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    asked: list[Row] = []
    for _ in range(int(rng.integers(0, 60))):
        status = ["ok", "refused", "malformed"][int(rng.integers(3))]
        answer = LABELS[int(rng.integers(3))] if status == "ok" else None
        group = {name: str(rng.integers(3)) for name in ("speaker", "age") if rng.random() < 0.8}
        row: Row = {"truth": LABELS[int(rng.integers(3))], "answer": answer, "status": status}
        asked.append({**row, "labels": LABELS, "group": group})
    for block in balanced_groups(asked, config(simulations=5, group_questions=2)).values():
        assert block["balanced_to"] >= 2
        for metric in block["metrics"].values():
            assert 0 <= metric["all"] <= 1
            assert 0 <= metric["gap"] <= 1
        # UAR of all is no mean of the groups', so that all groups may be above it.
        assert block["metrics"]["war"]["difference"] <= 1e-6
