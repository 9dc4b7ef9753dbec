"""EmoDB's bars on made-up features and answers: who is learnt from, and how folds are pooled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emodb_bars import EMODB, answer_rows, arms_of, differences, probe_answers

from mmemo import files
from mmemo.errors import DataError

SPEAKERS = [speaker for people in EMODB.FOLDS for speaker in people]
LABELS = ["anger", "boredom", "fear"]
CLIPS: list[dict[str, Any]] = [
    {"sample_id": f"{speaker}-{label}", "label": label, "group": {"speaker": speaker}}
    for speaker in SPEAKERS
    for label in LABELS
]


def study(folder: Path, answers: dict[str, str]) -> Path:
    """A study with one arm that gives these answers, by sample; else the right ones."""
    for number, people in enumerate(EMODB.FOLDS, start=1):
        rows = [row for row in CLIPS if row["group"]["speaker"] in people]
        told = [answers.get(str(row["sample_id"]), str(row["label"])) for row in rows]
        file = folder / f"seeds/{number}/sft/evaluation/predictions.jsonl"
        file.parent.mkdir(parents=True)
        (folder / f"seeds/{number}/start").mkdir()
        files.write_rows(file, answer_rows(rows, told))
    return folder


def test_a_probe_never_learns_from_a_test_or_validation_speaker() -> None:
    """Each fold's test and validation speakers have a feature that the others lack; a probe that
    saw one of them would use it."""
    labels = np.array([row["label"] for row in CLIPS])
    speakers = np.array([row["group"]["speaker"] for row in CLIPS])
    inputs = np.array([[float(label == one) for one in LABELS] for label in labels])
    assert probe_answers(inputs, labels, speakers) == labels.tolist()
    # The same features mean another label for the last fold's speakers and those before them.
    turned = np.roll(inputs, 1, axis=1)
    odd = np.isin(speakers, [*EMODB.FOLDS[3], *EMODB.FOLDS[4]])[:, None]
    answers = np.array(probe_answers(np.where(odd, turned, inputs), labels, speakers))
    last = np.isin(speakers, EMODB.FOLDS[4])
    assert not (answers == labels)[last].any()


def test_folds_are_pooled_in_the_order_of_the_clips(tmp_path: Path) -> None:
    wrong = {"03-anger": "fear", "16-fear": "anger"}
    arms = arms_of(study(tmp_path, wrong), CLIPS)
    assert [row["sample_id"] for row in arms["sft"]] == [row["sample_id"] for row in CLIPS]
    assert sum(row["score"] for row in arms["sft"]) == len(CLIPS) - 2
    perfect = answer_rows(CLIPS, [row["label"] for row in CLIPS])
    (line,) = differences(arms, perfect)
    # UAR: boredom 10 of 10, anger and fear 9 of 10 each.
    assert line.startswith("| sft − ridge probe | -6.7 (")


def test_an_arm_without_all_folds_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path, {})
    (folder / "seeds/5/sft/evaluation/predictions.jsonl").unlink()
    assert arms_of(folder, CLIPS) == {}
    assert "sft: 4 of 5 folds" in capsys.readouterr().out


def test_a_clip_that_is_asked_twice_is_refused(tmp_path: Path) -> None:
    folder = study(tmp_path, {})
    file = folder / "seeds/5/sft/evaluation/predictions.jsonl"
    rows: list[dict[str, Any]] = files.read_rows(file)
    files.write_rows(file, [*rows[1:], rows[1]])
    with pytest.raises(DataError, match="do not ask each clip once"):
        arms_of(folder, CLIPS)
