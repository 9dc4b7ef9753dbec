"""The numbers of a results file, against plain counting."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmemo.evaluation.comparison import compare_rows
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import constant_rows, score_rows, score_task
from mmemo.statistics import BootstrapConfig
from tests.report.fake_run import invent_rows, probe_rows

CONFIG = BootstrapConfig(resamples=300)


def share(rows: list[Row]) -> float:
    return sum(row["answer"] == row["truth"] for row in rows) / len(rows)


def of(rows: list[Row], conflict: str) -> list[Row]:
    return [row for row in rows if row["conflict"] == conflict]


def test_subsets_and_averages_are_what_counting_gives() -> None:
    rows = invent_rows(0.6)[:-4]  # so that subsets differ in size
    block = score_task(rows, CONFIG)
    parts = {name: share(of(rows, name)) for name in block["subsets"]}
    for name, value in parts.items():
        assert block["subsets"][name]["war"]["value"] == pytest.approx(value, abs=1e-6)
        assert block["subsets"][name]["n"] == len(of(rows, name))
    assert block["average"]["value"] == pytest.approx(np.mean(list(parts.values())), abs=1e-6)
    conflict = (parts["video_aligned"] + parts["audio_aligned"]) / 2
    assert block["conflict_average"]["value"] == pytest.approx(conflict, abs=1e-6)
    gap = parts["audio_aligned"] - parts["video_aligned"]
    assert block["conflict_gap"]["value"] == pytest.approx(gap, abs=1e-6)
    assert block["metrics"]["war"]["value"] == pytest.approx(share(rows), abs=1e-6)
    assert block["metrics"]["war"]["value"] != pytest.approx(block["average"]["value"], abs=1e-4)
    assert sum(map(sum, block["confusion"]["counts"])) == len(rows) == block["n"]


def test_unread_answers_stay_in_the_denominator_and_in_the_matrix() -> None:
    rows = invent_rows(0.5)
    block = score_task(rows, CONFIG)
    refused, malformed = (
        sum(row["status"] == status for row in rows) for status in ("refused", "malformed")
    )
    assert refused
    assert malformed
    assert block["statuses"] == {
        "ok": len(rows) - refused - malformed,
        "refused": refused,
        "malformed": malformed,
    }
    assert block["confusion"]["columns"][-2:] == ["refused", "malformed"]
    columns = np.array(block["confusion"]["counts"]).sum(0)
    assert columns[-2:].tolist() == [refused, malformed]


def test_the_worst_gap_names_its_groups() -> None:
    rows = invent_rows(1.0)
    for row in rows:
        if row["group"]["gender"] == "m" and row["conflict"] == "consistent":
            row["answer"], row["status"] = None, "malformed"
    group = score_task(rows, CONFIG)["groups"]["gender"]
    assert (group["worst"], group["best"]) == ("m", "f")
    assert group["worst_gap"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert "speaker" not in score_task(rows, CONFIG)["groups"]


def test_tasks_are_scored_apart_and_probes_as_yes_and_no() -> None:
    rows = invent_rows(0.7)
    probes = probe_rows(rows)
    blocks = score_rows([*rows, *probes], CONFIG)
    assert list(blocks) == ["emotion", "probe_cue"]
    assert blocks["emotion"] == score_task(rows, CONFIG)
    found = blocks["probe_cue"]["yes_no"]
    yes = share([row for row in probes if row["truth"] == "yes"])
    no = share([row for row in probes if row["truth"] == "no"])
    assert found["accuracy_yes"]["value"] == pytest.approx(yes)
    assert found["accuracy_no"]["value"] == pytest.approx(no)
    assert found["harmonic_mean"]["value"] == pytest.approx(2 * yes * no / (yes + no), abs=1e-6)
    said_yes = sum(row["answer"] == "yes" for row in probes) / len(probes)
    assert found["yes_rate"]["value"] == pytest.approx(said_yes)
    ordinary = blocks["probe_cue"]["classes"]["yes"]["f1"]
    assert found["f1"] == ordinary
    # The right n: the questions with that answer, and for F1 those that are or were answered yes.
    assert found["accuracy_yes"]["n"] == sum(row["truth"] == "yes" for row in probes)
    assert ordinary["n"] == sum("yes" in (row["truth"], row["answer"]) for row in probes)


def test_rows_without_a_conflict_field_average_to_accuracy() -> None:
    rows = [{**row, "conflict": None, "modality_labels": {}} for row in invent_rows(0.6)]
    block = score_task(rows, CONFIG)
    assert block["average"] == block["metrics"]["war"]
    assert "reliance" not in block
    assert "conflict_average" not in block
    assert "conflict_gap" not in block


def test_the_majority_answer_has_uar_of_one_class() -> None:
    rows = invent_rows(0.6)
    block = score_task(constant_rows(rows, "sad"), CONFIG)
    present = len({row["truth"] for row in rows})
    assert block["metrics"]["uar"]["value"] == pytest.approx(1 / present, abs=1e-6)
    assert block["classes"]["sad"]["recall"]["value"] == 1.0


def test_a_comparison_with_itself_finds_nothing_and_with_a_worse_run_finds_it() -> None:
    good, bad = invent_rows(0.9), invent_rows(0.2, seed=5)
    same = compare_rows(good, good, CONFIG)
    assert same["differences"]["average"]["value"] == 0
    assert same["differences"]["average"]["p"] == 1.0
    assert same["discordant"] == {"only_a": 0, "only_b": 0}
    found = compare_rows(good, bad, CONFIG)
    difference = found["differences"]["average"]
    expected = score_task(good, CONFIG)["average"]["value"]
    expected -= score_task(bad, CONFIG)["average"]["value"]
    assert difference["value"] == pytest.approx(expected, abs=1e-6)
    assert difference["low"] > 0
    assert difference["p"] < 0.02
    assert found["discordant"]["only_a"] > 10 * found["discordant"]["only_b"]
    back = compare_rows(bad, good, CONFIG)["differences"]["average"]
    assert back["value"] == -difference["value"]


def test_a_paired_interval_is_narrower_than_two_single_ones() -> None:
    good = invent_rows(0.8)
    almost = [dict(row) for row in good]
    right = next(index for index, row in enumerate(good) if row["answer"] == row["truth"])
    almost[right].update(answer=None, status="malformed")
    paired = compare_rows(good, almost, CONFIG)["differences"]["war"]
    single = score_task(good, CONFIG)["metrics"]["war"]
    assert paired["high"] - paired["low"] < 0.5 * (single["high"] - single["low"])


def test_numbers_are_the_same_every_time_and_are_json() -> None:
    rows = invent_rows(0.6)
    first, second = score_task(rows, CONFIG), score_task(rows, CONFIG)
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    other = BootstrapConfig(resamples=300, seed=1)
    assert score_task(rows, other) == first  # few clusters need no random draws
