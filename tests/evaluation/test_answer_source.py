"""Signed reliance, against plain counting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import score_task
from mmemo.statistics import BootstrapConfig
from tests.report.fake_run import invent_rows, probe_rows

CONFIG = BootstrapConfig(resamples=300)
SUBSETS = ("video_aligned", "audio_aligned")


def reliance(rows: list[Row]) -> dict[str, Any]:
    return score_task(rows, CONFIG)["reliance"]


def values(part: dict[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in part.items()}


@pytest.mark.parametrize(("side", "sign"), [("audio", 1.0), ("video", -1.0)])
def test_a_model_that_follows_one_channel(side: str, sign: float) -> None:
    block = reliance(invent_rows(1.0, side=side))
    name = "voice" if side == "audio" else "face"
    for part in ("all", *SUBSETS, "errors"):
        assert block[part]["signed"]["value"] == sign
        assert block[part][name]["value"] == 1.0
    assert block["all"]["signed"]["n"] == 60
    assert block["errors"]["signed"]["n"] == 30
    assert block["left_out"] == 0


def test_a_right_model_relies_on_either_channel_as_the_clip_asks_and_has_no_errors() -> None:
    block = reliance(invent_rows(1.0))
    assert block["video_aligned"]["signed"]["value"] == -1.0
    assert block["audio_aligned"]["signed"]["value"] == 1.0
    assert block["all"]["signed"]["value"] == 0.0
    assert block["errors"]["signed"] == {"value": None, "low": None, "high": None, "n": 0}


def test_wrong_answers_are_counted_by_whose_label_they_are() -> None:
    rows = invent_rows(0.3, n=300)
    wrong = Counter[str]()
    for row in rows:
        if row["conflict"] in SUBSETS and row["answer"] != row["truth"]:
            labels = row["modality_labels"]
            said = {labels["audio"]: "voice", labels["video"]: "face"}
            wrong[said.get(row["answer"], "neither")] += 1
    total = wrong.total()
    assert min(wrong["voice"], wrong["face"]) > 5
    errors = reliance(rows)["errors"]
    for side in ("voice", "face", "neither"):
        assert errors[side]["value"] == pytest.approx(wrong[side] / total, abs=1e-6)
        assert errors[side]["n"] == total
    expected = (wrong["voice"] - wrong["face"]) / total
    assert errors["signed"]["value"] == pytest.approx(expected, abs=1e-6)
    assert errors["signed"]["low"] < expected < errors["signed"]["high"]


def test_voice_and_face_exchanged_turn_every_sign_and_change_nothing_else() -> None:
    rows = invent_rows(0.4, n=150, side="audio")
    turned: list[Row] = []
    for row in rows:
        labels = row["modality_labels"]
        other = {"video_aligned": "audio_aligned", "audio_aligned": "video_aligned"}
        conflict = other.get(row["conflict"], row["conflict"])
        exchanged = {**labels, "audio": labels["video"], "video": labels["audio"]}
        turned.append({**row, "conflict": conflict, "modality_labels": exchanged})
    found, back = reliance(rows), reliance(turned)
    names = {"all": "all", "errors": "errors", SUBSETS[0]: SUBSETS[1], SUBSETS[1]: SUBSETS[0]}
    for name, opposite in names.items():
        one, other_one = values(found[name]), values(back[opposite])
        assert one["signed"] == pytest.approx(-other_one["signed"], abs=1e-6)
        assert one["voice"] == pytest.approx(other_one["face"], abs=1e-6)
        assert one["neither"] == pytest.approx(other_one["neither"], abs=1e-6)
    assert found["errors"]["signed"]["value"] > 0.1


def test_a_benchmark_with_more_clips_of_one_kind_does_not_turn_the_sign() -> None:
    rows = invent_rows(0.4, n=300)
    more = [{**row, "sample_id": f"{row['sample_id']}-{copy}"} for row in rows for copy in range(5)
            if row["conflict"] == "video_aligned"]  # fmt: skip
    for part in ("all", "errors"):
        even, uneven = reliance(rows)[part], reliance([*rows, *more])[part]
        assert values(uneven) == pytest.approx(values(even), abs=1e-6)
        assert uneven["signed"]["n"] > even["signed"]["n"]


def test_one_kind_of_conflict_says_nothing_of_errors() -> None:
    rows = [row for row in invent_rows(0.4) if row["conflict"] != "audio_aligned"]
    block = reliance(rows)
    assert set(block) == {"all", "video_aligned", "left_out"}
    assert block["all"] == block["video_aligned"]


def test_intervals_resample_speakers() -> None:
    few, many = invent_rows(0.4, n=240, speakers=4), invent_rows(0.4, n=240, speakers=80)
    for rows in (few, many):  # speakers of whom each has one channel that is followed
        for row in rows:
            side = ("audio", "video")[int(row["group"]["speaker"][1:]) % 2]
            row["answer"], row["status"] = row["modality_labels"][side], "ok"
    wide, narrow = (reliance(rows)["all"]["signed"] for rows in (few, many))
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_rows_that_do_not_say_what_they_promise_are_left_out_and_counted() -> None:
    rows = invent_rows(0.5)
    whole = reliance(rows)["all"]["signed"]["n"]
    voiceless, agreeing, contradicting = [row for row in rows if row["conflict"] in SUBSETS][:3]
    voiceless["modality_labels"] = {"video": "sad"}
    agreeing["modality_labels"] = dict.fromkeys(("audio", "video"), agreeing["truth"])
    labels = contradicting["modality_labels"]
    contradicting["modality_labels"] = {"audio": labels["video"], "video": labels["audio"]}
    block = reliance(rows)
    assert block["left_out"] == 3
    assert block["all"]["signed"]["n"] == whole - 3


def test_probes_have_no_reliance() -> None:
    rows = invent_rows(0.5)
    probes = probe_rows(rows)
    for probe, row in zip(probes, rows, strict=False):
        probe["conflict"] = row["conflict"]
    assert "reliance" not in score_task(probes, CONFIG)
