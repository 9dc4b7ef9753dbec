"""Graded reasoning: grades known by construction, found again by the rule that reads the text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from mmemo.config import parse
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.rewards.judge.rubric import DIMENSIONS, WORST
from mmemo.world.config import WorldConfig
from mmemo.world.grading import grade
from mmemo.world.manifest import manifests, write_manifests
from mmemo.world.plan import make_plans
from mmemo.world.rows import Row

SPLITS = ("train_graded", "val_graded", "test_graded")
FAULTS = {
    "missing_channel",
    "missing_cue",
    "wrong_side",
    "wrong_emotion",
    "not_weighed",
    "contradiction",
    "wrong_cue",
    "spurious_cue",
    "filler",
    "repetition",
    "broken_form",
    "junk",
}


def config_of(**size: int) -> WorldConfig:
    return parse(WorldConfig, {"output_dir": "unused", "seed": 5, "size": size})


@pytest.fixture(scope="module")
def made() -> dict[str, list[Row]]:
    config = config_of(graded_answers=6)
    return manifests(config, make_plans(config))


@pytest.fixture(scope="module")
def contrasts() -> list[Row]:
    config = config_of(graded_answers=1, graded_contrasts=8, train_clips=60)
    rows = manifests(config, make_plans(config))
    return [row for name in SPLITS for row in rows[name] if "contrast" in row]


@pytest.mark.parametrize("dimension", [0, 2], ids=["factual", "complete"])
def test_the_rule_finds_the_grades_of_contrasts_in_their_facts(
    contrasts: list[Row], dimension: int
) -> None:
    known = [row["grades"][DIMENSIONS[dimension]] for row in contrasts]
    assert known == [grade(row["candidate"], row)[dimension] for row in contrasts]
    assert set(known) == {1, 2, 3, 4, 5}


def test_contrasts_hold_the_text_and_change_the_facts(contrasts: list[Row]) -> None:
    kinds = Counter(row["contrast"] for row in contrasts)
    assert set(kinds) == {"other_facts", "cues_absent", "other_emotion", "constant"}
    name = DIMENSIONS[0]
    for kind, most in {"other_facts": 2.0, "cues_absent": 3.5, "constant": 2.0}.items():
        rows = [row for row in contrasts if row["contrast"] == kind]
        assert sum(row["grades"][name] for row in rows) / len(rows) < most, kind
    constant: dict[str, set[int]] = {}
    for row in contrasts:
        if row["contrast"] == "constant":
            constant.setdefault(row["candidate"], set()).add(row["grades"][name])
    assert len(constant) == 18  # six of each split
    assert max(map(len, constant.values())) > 2  # one text, different grades
    absent = [row for row in contrasts if row["contrast"] == "cues_absent"]
    assert all(not set(row["cues"]["present"]) & set(row["cues"]["absent"]) for row in absent)
    assert all(len(set(row["cues"]["absent"])) == len(row["cues"]["absent"]) for row in absent)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("dimension", range(4), ids=DIMENSIONS)
def test_the_rule_finds_the_known_grades(
    made: dict[str, list[Row]], name: str, dimension: int
) -> None:
    known = [row["grades"][DIMENSIONS[dimension]] for row in made[name]]
    read = [grade(row["candidate"], row)[dimension] for row in made[name]]
    assert float(spearmanr(known, read)[0]) > 0.97
    assert set(known) == {1, 2, 3, 4, 5}
    assert Counter(known).most_common(1)[0][1] < 0.75 * len(known)


def test_every_fault_is_there_at_its_severities_alone_and_with_others(
    made: dict[str, list[Row]],
) -> None:
    alone: dict[str, set[int]] = {}
    for row in made["train_graded"]:
        if len(row["faults"]) == 1:
            ((name, severity),) = row["faults"].items()
            alone.setdefault(name, set()).add(severity)
    assert set(alone) == FAULTS
    for name in ("wrong_cue", "missing_cue", "contradiction", "filler"):
        assert {1, 2, 3} <= alone[name], name
    numbers = Counter(len(row["faults"]) for row in made["train_graded"])
    assert min(numbers[count] for count in (0, 1, 2, 3)) > 0.04 * len(made["train_graded"])


def test_a_fault_costs_its_own_dimension_and_clean_answers_cost_nothing(
    made: dict[str, list[Row]],
) -> None:
    touched = {
        "wrong_cue": {DIMENSIONS[0]},
        "wrong_emotion": {DIMENSIONS[0]},
        "wrong_side": {DIMENSIONS[0]},
        "spurious_cue": {DIMENSIONS[1]},
        "filler": {DIMENSIONS[3]},
        "repetition": {DIMENSIONS[3]},
        "broken_form": {DIMENSIONS[3]},
    }
    for row in made["train_graded"]:
        lost = {name for name, value in row["grades"].items() if value < 5}
        if not row["faults"]:
            assert not lost, row["candidate"]
        elif len(row["faults"]) == 1 and next(iter(row["faults"])) in touched:
            assert lost == touched[next(iter(row["faults"]))], row["candidate"]
        if "junk" in row["faults"]:
            assert tuple(row["grades"].values()) == WORST


def test_speakers_are_apart_and_wordings_vary(made: dict[str, list[Row]]) -> None:
    people = [{row["group"]["speaker"] for row in made[name]} for name in SPLITS]
    assert not people[0] & people[1]
    assert not people[0] & people[2]
    clean = {row["candidate"].split(" ")[0] for row in made["train_graded"] if not row["faults"]}
    assert len(clean) > 8


def test_length_tells_little_of_the_grades(made: dict[str, list[Row]]) -> None:
    rows = [row for row in made["train_graded"] if "junk" not in row["faults"]]
    words = [len(row["candidate"].split()) for row in rows]
    total = [sum(row["grades"].values()) for row in rows]
    assert abs(float(spearmanr(words, total)[0])) < 0.35


def test_the_same_config_gives_the_same_bytes_and_the_knob_changes_no_other_manifest(
    tmp_path: Path,
) -> None:
    size = {"train_clips": 12, "val_clips": 6, "test_clips": 6, "train_speakers": 3}
    texts: list[dict[str, bytes]] = []
    for number, graded in enumerate((3, 3, 0)):
        config = config_of(**size, graded_answers=graded, graded_contrasts=2)
        write_manifests(config, make_plans(config), tmp_path / str(number))
        folder = tmp_path / str(number) / "manifests"
        texts.append({path.stem: path.read_bytes() for path in sorted(folder.iterdir())})
    assert texts[0] == texts[1]
    assert set(texts[0]) - set(texts[2]) == set(SPLITS)
    assert all(texts[0][name] == text for name, text in texts[2].items())
    samples = load_samples(
        DataConfig(
            manifests=[str(tmp_path / "0" / "manifests" / "train_graded.jsonl")],
            columns=["candidate", "grades", "faults", "contrast"],
        )
    )
    assert len(samples) == 60
    assert set(samples[0].columns["grades"]) == set(DIMENSIONS)
    assert json.loads(texts[0]["train_graded"].splitlines()[0])["prompt"][0]["role"] == "user"
