"""The numbers of ``gates.json`` and ``gates.csv``, against plain counting."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.gates import drop_gates, gate_numbers, read_gates, write_gates
from mmemo.evaluation.reliance.sidecar import answers_key
from mmemo.statistics import BootstrapConfig
from tests.report.fake_run import invent_rows, write_evaluation

CONFIG = BootstrapConfig(resamples=300)
MEDIA = ["video", "audio", "face", "fusion"]
SIZES = (2, 1, 3)
"""Linear layers with experts in each decoder layer."""


def choosing(n: int = 60, *, weights: bool = True, use: bool = True, layers: Any = (0, 1, 2)):
    """Gates that weigh the voice more where the voice is right; its expert goes by the emotion, in
    every linear layer another, and that of the face by nothing. There is no fusion, and no video in
    every fifth clip."""
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for index, row in enumerate(invent_rows(0.5, n=n)):
        there = np.array([index % 5 > 0, True, True, False])
        found: Row = {**row, "modalities": MEDIA, "layers": list(layers)}
        found["media"] = {"video": f"{index}.mp4"}
        if weights:
            each = 0.2 + 0.05 * generator.random((len(layers), 5))
            each[:, 2] += 0.2 * (row["conflict"] == "audio_aligned")
            each[:, 1:] *= there
            found["weights"] = (each / each.sum(-1, keepdims=True)).tolist()
        if use:
            emotion = row["labels"].index(row["truth"])
            picks = generator.integers(0, 3, (sum(SIZES), 4))
            picks[:, 1] = [(emotion + place) % 3 for place in range(sum(SIZES))]
            one = np.eye(3)[picks] * there[:, None]
            found["use"] = [part.tolist() for part in np.split(one, np.cumsum(SIZES)[:-1])]
        rows.append(found)
    return rows


def test_weights_are_means_over_layers_and_questions() -> None:
    rows = choosing()
    block = gate_numbers(rows, CONFIG)
    weights = np.array([row["weights"] for row in rows])
    assert block["n"] == 60
    assert block["sizes"]["subsets"] == {
        "all": 60, "video_aligned": 20, "audio_aligned": 20, "consistent": 20
    }  # fmt: skip
    for place, found in block["weights"]["subsets"].items():
        some = [place in ("all", row["conflict"]) for row in rows]
        assert list(found) == ["text", "video", "audio", "face"]  # there is no fusion
        for at, one in enumerate(found.values()):
            assert one["value"] == pytest.approx(weights[some][..., at].mean(), abs=1e-6)
            assert one["low"] <= one["value"] <= one["high"]
            assert one["n"] == sum(some)
            layers = block["weights"]["by_layer"][place][list(found)[at]]
            assert layers == pytest.approx(weights[some][..., at].mean(0), abs=1e-6)
    for emotion, found in block["weights"]["emotions"].items():
        some = [row["truth"] == emotion for row in rows]
        assert block["sizes"]["emotions"][emotion] == sum(some)
        assert found["face"] == pytest.approx(weights[some][..., 3].mean(), abs=1e-6)


def test_the_shift_is_from_the_face_to_the_voice() -> None:
    found = gate_numbers(choosing(), CONFIG)["weights"]
    ends = [
        found["subsets"][place]["audio"]["value"] for place in ("audio_aligned", "video_aligned")
    ]
    voice = found["shift"]["audio"]
    assert voice["value"] == pytest.approx(ends[0] - ends[1], abs=2e-6)
    assert 0.05 < voice["low"] < voice["value"] < voice["high"]
    assert found["shift"]["face"]["high"] < 0
    assert voice["n"] == 40


def test_experts_are_counted_from_the_one_that_each_layer_uses_most() -> None:
    rows = choosing()
    use = gate_numbers(rows, CONFIG)["use"]
    assert list(use["subsets"]) == ["video", "audio", "face"]
    expected: list[Any] = [[] for _ in SIZES]
    for layer, size in enumerate(SIZES):
        for linear in range(size):
            picks = [int(np.argmax(row["use"][layer][linear][1])) for row in rows]
            counts = sorted((picks.count(expert) for expert in range(3)), reverse=True)
            expected[layer].append([count / len(rows) for count in counts])
    for layer, shares in enumerate(use["by_layer"]["audio"]):
        assert shares == pytest.approx(np.mean(expected[layer], 0), abs=1e-6)
    whole = np.mean([one for layer in expected for one in layer], 0)
    assert use["subsets"]["audio"]["all"] == pytest.approx(whole, abs=1e-6)
    # The same expert in every layer, for clips of one emotion.
    for shares in use["emotions"]["audio"].values():
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_pairs_of_clips_tell_whether_experts_go_by_emotion() -> None:
    rows = choosing(30)
    again = {**rows[0], "sample_id": "again", "task": "emotion"}
    alike = gate_numbers([*rows, again], CONFIG)["use"]["alike"]  # one clip counts once
    for at, medium in enumerate(MEDIA[:3]):
        same, other = list[float](), list[float]()
        for one, two in itertools.combinations(rows, 2):
            picks = [np.concatenate(row["use"])[:, at] for row in (one, two)]
            if picks[0].any() and picks[1].any():
                pair = float((picks[0] * picks[1]).sum(-1).mean())
                (same if one["truth"] == two["truth"] else other).append(pair)
        found = alike[medium]
        assert found["same"] == pytest.approx(np.mean(same), abs=1e-6)
        assert found["other"] == pytest.approx(np.mean(other), abs=1e-6)
    assert alike["audio"]["same"] == 1
    assert alike["audio"]["other"] < 0.5


def test_what_an_adapter_does_not_choose_is_none() -> None:
    gate = gate_numbers(choosing(use=False, layers=[None]), CONFIG)
    assert gate["layers"] is None
    assert gate["use"] is None
    hydra = gate_numbers(choosing(weights=False), CONFIG)
    assert hydra["weights"] is None
    assert hydra["use"]["subsets"]["audio"]["all"]


def test_open_questions_and_those_without_subsets_have_fewer_groups() -> None:
    rows = [{**row, "conflict": None, "labels": [], "truth": "tense, low"} for row in choosing()]
    block = gate_numbers(rows, CONFIG)
    assert list(block["weights"]["subsets"]) == list(block["use"]["subsets"]["audio"]) == ["all"]
    assert block["weights"]["shift"] == block["weights"]["emotions"] == {}
    assert block["use"]["alike"]["audio"] == {"same": None, "other": None}


@pytest.mark.parametrize("kept", ["weights", "use", "both"])
def test_the_table_has_the_same_numbers(tmp_path: Path, kept: str) -> None:
    rows = choosing(weights=kept != "use", use=kept != "weights",
                    layers=[None] if kept == "weights" else (0, 1, 2))  # fmt: skip
    found = gate_numbers(rows, CONFIG)
    write_gates(tmp_path, found)
    with (tmp_path / "gates.csv").open() as handle:
        table = list(csv.DictReader(handle))
    names = ("measure", "of", "expert", "subset", "emotion", "layer")
    values = {tuple(row[name] for name in names): float(row["value"]) for row in table}
    assert len(values) == len(table)
    if kept != "use":
        weights = found["weights"]
        one = weights["subsets"]["consistent"]["audio"]["value"]
        assert values["weight", "audio", "", "consistent", "", ""] == one
        assert values["weight", "face", "", "all", "sad", ""] == weights["emotions"]["sad"]["face"]
        moved = values["weight", "audio", "", "audio_aligned minus video_aligned", "", ""]
        assert moved == weights["shift"]["audio"]["value"]
    if kept == "both":
        one = found["weights"]["by_layer"]["all"]["text"][2]
        assert values["weight", "text", "", "all", "", "2"] == one
    assert any(row["layer"] for row in table) == (kept != "weights")
    if kept != "weights":
        use = found["use"]
        assert values["use", "face", "2", "all", "sad", ""] == use["emotions"]["face"]["sad"][1]
        one = use["subsets"]["video"]["audio_aligned"][0]
        assert values["use", "video", "1", "audio_aligned", "", ""] == one
        assert values["use", "audio", "3", "all", "", "1"] == use["by_layer"]["audio"][1][2]
        assert values["alike", "face", "", "all", "other", ""] == use["alike"]["face"]["other"]


def test_what_is_damaged_or_of_other_answers_is_refused(tmp_path: Path) -> None:
    rows = choosing()
    result = write_evaluation(tmp_path, rows, tmp_path)
    assert read_gates(result) is None
    values = {"answers": answers_key(rows), **gate_numbers(rows, CONFIG)}
    write_gates(tmp_path, values)
    assert read_gates(result) == {"schema": 1, **values}
    write_gates(tmp_path, {**values, "answers": answers_key(rows[1:])})
    with pytest.raises(EvaluationError, match=r"gates\.json: does not fit the answers beside"):
        read_gates(result)
    (tmp_path / "gates.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"gates\.json: is damaged; run the evaluation again"):
        read_gates(result)
    drop_gates(tmp_path)
    assert read_gates(result) is None
    assert not (tmp_path / "gates.csv").exists()
