"""The numbers of reliance files, against plain counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.sidecar import answers_key
from mmemo.evaluation.reliance.summary import (
    attention_numbers,
    changed_numbers,
    read_reliance,
    shapley_numbers,
    write_reliance,
)
from mmemo.statistics import BootstrapConfig
from tests.report.fake_run import invent_rows, write_evaluation

CONFIG = BootstrapConfig(resamples=300)
SUBSETS = ("video_aligned", "audio_aligned", "consistent")


def share(rows: list[Row], answers: list[Any]) -> float:
    return sum(row["answer"] == one for row, one in zip(rows, answers, strict=True)) / len(rows)


def swapped(rows: list[Row]) -> list[Row]:
    """Other answers to the same questions, some of which follow what was swapped in."""
    labels = rows[0]["labels"]
    found: list[Row] = []
    for index, (row, other) in enumerate(
        zip(rows, invent_rows(0.3, n=len(rows), seed=4), strict=True)
    ):
        shown = labels[(labels.index(row["truth"]) + 1) % len(labels)]
        answer = shown if index % 4 == 0 else other["answer"]
        found.append({**other, "answer": answer, "shown": [shown]})
    return found


def test_a_change_is_counted_on_each_subset_against_the_same_questions() -> None:
    plain = invent_rows(0.8, n=240)
    rows = swapped(plain)
    block = changed_numbers(rows, plain, CONFIG)
    assert list(block) == ["all", *SUBSETS]
    for place, found in block.items():
        some = [at for at, row in enumerate(rows) if place in ("all", row["conflict"])]
        now, before = [rows[at] for at in some], [plain[at] for at in some]
        truths, shown = [row["truth"] for row in now], [row["shown"][0] for row in now]
        expected = {
            "accuracy": share(now, truths),
            "plain": share(before, truths),
            "difference": share(now, truths) - share(before, truths),
            "followed": share(now, shown),
            "followed_plain": share(before, shown),
        }
        assert {name: one["value"] for name, one in found.items()} == pytest.approx(
            expected, abs=1e-6
        )
        assert {one["n"] for one in found.values()} == {len(some)}
    assert block["all"]["difference"]["p"] < 0.02
    assert block["all"]["difference"]["high"] < 0 < block["all"]["followed"]["low"]


def test_a_change_that_changes_nothing_has_no_difference() -> None:
    rows = invent_rows(0.6)
    block = changed_numbers(rows, rows, CONFIG)
    for found in block.values():
        assert found["difference"]["value"] == 0
        assert found["difference"]["p"] == 1.0
        assert "followed" not in found


def test_rows_without_a_conflict_field_have_no_subsets() -> None:
    rows = [{**row, "conflict": None} for row in invent_rows(0.6)]
    assert list(changed_numbers(rows, rows, CONFIG)) == ["all"]


def attending(n: int = 12, layers: int = 3, heads: int = 2) -> list[Row]:
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for row in invent_rows(0.5, n=n):
        mass = generator.random((layers, heads, 5))
        mass[..., 4] = 0  # no fusion
        mass /= mass.sum(-1, keepdims=True)
        tokens = [*generator.integers(1, 9, 4).tolist(), 0]
        layer_names = list(range(layers))
        rows.append({**row, "layers": layer_names, "prompt_tokens": tokens, "mass": mass.tolist()})
    return rows


def test_attention_is_averaged_and_kinds_that_are_not_there_are_left_out() -> None:
    rows = attending()
    block = attention_numbers(rows, CONFIG)
    mass = np.array([row["mass"] for row in rows])
    for at, kind in enumerate(("text", "video", "audio", "face")):
        assert block["subsets"]["all"][kind]["value"] == pytest.approx(
            mass[..., at].mean(), abs=1e-6
        )
        assert block["by_layer"][kind] == pytest.approx(mass[..., at].mean((0, 2)), abs=1e-6)
        assert np.allclose(block["by_head"][kind], mass[..., at].mean(0), atol=1e-6)
        some = mass[[row["conflict"] == "consistent" for row in rows]]
        consistent = block["subsets"]["consistent"][kind]["value"]
        assert consistent == pytest.approx(some[..., at].mean(), abs=1e-6)
        layers = block["by_subset"]["consistent"][kind]
        assert layers == pytest.approx(some[..., at].mean((0, 2)), abs=1e-6)
        assert block["by_subset"]["all"][kind] == block["by_layer"][kind]
        parts = [row["prompt_tokens"][at] / sum(row["prompt_tokens"]) for row in rows]
        assert block["tokens"][kind] == pytest.approx(np.mean(parts), abs=1e-6)
    assert "fusion" not in block["tokens"]
    assert "unchanged" not in block


def valued(n: int = 30) -> list[Row]:
    generator = np.random.default_rng(1)
    rows: list[Row] = []
    for index, row in enumerate(invent_rows(0.5, n=n)):
        players = ["audio", "text"] if index % 5 == 0 else ["video", "audio", "text"]
        worth = {"none": -2.0, "+".join(players): float(generator.normal())}
        shapley = {name: float(generator.normal()) for name in players}
        rows.append({**row, "players": players, "worth": worth, "shapley": shapley})
    return rows


def test_a_question_without_a_stream_counts_in_no_mean_of_it() -> None:
    rows = valued()
    block = shapley_numbers(rows, CONFIG)
    for name in ("video", "audio", "text"):
        known = [row["shapley"][name] for row in rows if name in row["shapley"]]
        found = block["subsets"]["all"][name]
        assert found["value"] == pytest.approx(np.mean(known), abs=1e-6)
        assert found["n"] == len(known)
        assert found["low"] < found["value"] < found["high"]
    assert block["worth"]["none"] == {"value": -2.0, "low": None, "high": None, "n": 30}
    assert block["worth"]["audio+text"]["n"] == 6


def test_what_is_damaged_or_of_other_answers_is_refused(tmp_path: Path) -> None:
    rows = invent_rows(0.5)
    result = write_evaluation(tmp_path, rows, tmp_path)
    assert read_reliance(result) is None
    values = {"task": "emotion", "answers": answers_key(rows), "changes": {}, "attention": None,
              "shapley": None}  # fmt: skip
    write_reliance(tmp_path, values, result.tasks)
    assert read_reliance(result) == {"schema": 1, **values}
    write_reliance(tmp_path, {**values, "answers": answers_key(rows[1:])}, result.tasks)
    with pytest.raises(EvaluationError, match=r"reliance\.json: does not fit the answers beside"):
        read_reliance(result)
    for damage in (b"{", b"[]", b"\xff", b"{}"):
        (tmp_path / "reliance.json").write_bytes(damage)
        with pytest.raises(EvaluationError, match=r"reliance\.json: is damaged; run the"):
            read_reliance(result)
