"""Whole evaluations with their controls, on real clips with a tiny random model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import load_config, parse
from mmemo.errors import ConfigError
from mmemo.evaluation.config import ControlsConfig, EvalConfig
from mmemo.evaluation.controls.robustness import _is_same, edits_to_try
from mmemo.evaluation.controls.run import read_controls
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import read_predictions
from mmemo.evaluation.results import read_results
from mmemo.evaluation.runner import check_eval, run_eval
from mmemo.evaluation.script import zero_shot_config
from mmemo.media.edits import EDITS
from mmemo.report.collect import read_run
from mmemo.report.page import render
from mmemo.run_log import read_events
from tests.evaluation.world import config_of, save_model, write_world

ROWS = 12
CONTROLS: dict[str, Any] = {
    "baselines": True,
    "paraphrases": True,
    "robustness": True,
    "edits": ["gain_-2", "blur_2"],
    "nbest": [1, 2, 5],
    "simulations": 20,
}
FOLDERS = [
    *(f"baselines/{name}" for name in ("text_only", "video_only", "audio_only", "face_only")),
    *("paraphrases/wording_1", "paraphrases/wording_2", "robustness/gain_-2", "robustness/blur_2"),
]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A world, a model, and the folder of its evaluation with all controls."""
    root = tmp_path_factory.mktemp("controls")
    world, model = write_world(root / "world", ROWS), save_model(root / "model")
    run_eval(config_of(world, model, root / "out", controls=CONTROLS))
    return world, model, root / "out"


def test_each_control_is_an_evaluation_of_its_own(shared: tuple[Path, Path, Path]) -> None:
    _, _, out = shared
    main = read_results(out)
    for folder in FOLDERS:
        result = read_results(out / folder)
        assert result.main["n"] == ROWS
        assert result.role == "baseline"
        assert result.made["model"] == main.made["model"]
        assert "balanced_groups" not in result.main
    text, sound = (read_results(out / f"baselines/{one}_only") for one in ("text", "audio"))
    assert text.made["data"]["modalities"] == []
    assert sound.made["data"]["modalities"] == ["audio"]
    assert "<|video|>" not in sound.made["prompts"]["example"]
    assert all(not row["media"] for row in text.rows())
    worded = read_results(out / "paraphrases/wording_2")
    assert worded.made["prompts"]["wording"] == {"number": 2, "by": {"emotion": "engine"}}
    assert read_results(out / "robustness/blur_2").made["decode"]["edit"] == "blur_2"
    assert "edit" not in main.made["decode"]
    assert main.made["training"]["status"] == "unknown"
    assert main.made["benchmark"]["labels"]["emotion"]["sha256"]


def test_the_tables_have_differences_and_one_correction(shared: tuple[Path, Path, Path]) -> None:
    _, _, out = shared
    names = {
        "baselines": ["model", "text only", "video only", "audio only", "face only"],
        "paraphrases": ["wording 0", "wording 1", "wording 2"],
        "robustness": ["model", "gain_-2", "blur_2"],
    }
    for file, wanted in names.items():
        values = read(out / f"{file}.json")
        (block,) = values["tasks"].values()
        assert [row["name"] for row in block["rows"]][: len(wanted)] == wanted
        assert block["metrics"] == ["average", "uar"]
        for row in block["rows"][1:]:
            assert set(row["differences"]) == {"average", "uar"}
            for metric, found in row["differences"].items():
                assert "p_holm" in found
                assert found["a"] == block["rows"][0]["values"][metric]["value"]
                assert found["b"] == row["values"][metric]["value"]
        with (out / f"{file}.csv").open(encoding="utf-8", newline="") as handle:
            assert len(list(csv.DictReader(handle))) == 2 * len(block["rows"])
    constant = read(out / "baselines.json")["tasks"]["emotion"]["rows"][-1]
    # Of 12 rows, happy and sad are right three times each, and happy comes first by name.
    assert (constant["kind"], constant["answer"], constant["oracle"]) == ("constant", "happy", True)
    assert constant["values"]["uar"]["value"] == pytest.approx(1 / 5)


def test_wordings_have_mean_and_range(shared: tuple[Path, Path, Path]) -> None:
    _, _, out = shared
    block = read(out / "paraphrases.json")["tasks"]["emotion"]
    for metric in block["metrics"]:
        values = [row["values"][metric]["value"] for row in block["rows"]]
        over = block["over"][metric]
        assert over["mean"] == pytest.approx(sum(values) / 3, abs=1e-6)
        assert (over["lowest"], over["highest"]) == (min(values), max(values))
    runs = [out, out / "paraphrases/wording_1", out / "paraphrases/wording_2"]
    rows = [read_predictions(run / "predictions.jsonl") for run in runs]
    alike = [len({(r["status"], r["answer"]) for r in some}) == 1 for some in zip(*rows)]  # noqa: B905
    assert block["alike"]["value"] == pytest.approx(sum(alike) / ROWS, abs=1e-6)


def test_every_label_has_a_rank(shared: tuple[Path, Path, Path]) -> None:
    _, _, out = shared
    ranked = read_predictions(out / "nbest.jsonl")
    assert len(ranked) == ROWS
    for row in ranked:
        assert sorted(row["ranked"]) == sorted(row["labels"])
        assert row["logps"] == sorted(row["logps"], reverse=True)
        assert sum(2.718281828**one for one in row["logps"]) == pytest.approx(1, abs=1e-4)
    block = read(out / "nbest.json")["tasks"]["emotion"]
    for n in (1, 2, 5):
        share = sum(row["truth"] in row["ranked"][:n] for row in ranked) / ROWS
        assert block["best"][str(n)]["value"] == pytest.approx(share, abs=1e-6)
        labels = len(ranked[0]["labels"])
        assert block["best"][str(n)]["chance"] == pytest.approx(n / labels, abs=1e-6)


def test_the_report_shows_the_controls(shared: tuple[Path, Path, Path]) -> None:
    _, _, out = shared
    page = render(read_run(out), title="run", gallery=0)
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for told in (
        "text only",
        "most common label of these questions: oracle",
        "Gain of -2 dB",
        "Gaussian blur of 2 px",
        "wording 2 (framed by the engine)",
        "Questions whose right label is among the n",
        "Training data: unknown (no record of its training lies beside the model)",
    ):
        assert told in text
    assert set(read_controls(read_results(out))) == {"nbest", *CONTROLS} - {"edits", "simulations"}


def test_controls_resume_and_are_repeated_from_their_folder(
    shared: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, model, out = shared
    before = {path: (out / path / "predictions.jsonl").read_bytes() for path in FOLDERS}
    json_before = {name: read(out / f"{name}.json") for name in ("baselines", "robustness")}

    def refuse(*_: Any) -> Any:
        raise AssertionError("an answer was generated again")

    monkeypatch.setattr(AnswerGenerator, "answer", refuse)
    run_eval(config_of(world, model, out, controls=CONTROLS))
    for path, content in before.items():
        assert (out / path / "predictions.jsonl").read_bytes() == content
        kept = [
            e["kept"] for e in read_events(out / path / "events.jsonl") if e["kind"] == "answers"
        ]
        assert kept == [0, ROWS]
    assert {name: read(out / f"{name}.json") for name in json_before} == json_before
    for path in ("baselines/audio_only", "robustness/gain_-2", "paraphrases/wording_1"):
        values = read_results(out / path).values
        again = run_eval(load_config(EvalConfig, out / path / "config.yaml", []))
        assert again.values == values


def test_tables_of_other_answers_are_removed(
    shared: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    world, model, _ = shared
    controls = {"baselines": True, "simulations": 0}
    config = config_of(world, model, tmp_path / "a", controls=controls)
    run_eval(config)
    assert (tmp_path / "a/baselines.json").exists()
    run_eval(config_of(world, model, tmp_path / "a"))
    assert (tmp_path / "a/baselines.json").exists()  # the answers are the same
    run_eval(config_of(world, model, tmp_path / "a", generation={"max_new_tokens": 7}))
    assert not (tmp_path / "a/baselines.json").exists()
    assert not (tmp_path / "a/baselines.csv").exists()


def test_what_cannot_be_controlled_is_refused_before_any_answer(
    shared: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    world, model, _ = shared

    def refused(data: dict[str, Any], controls: dict[str, Any], sentence: str) -> None:
        config = config_of(world, model, tmp_path / "x", controls=controls)
        data = {"data": config.data.model_copy(update=data)}
        with pytest.raises(ConfigError, match=sentence):
            check_eval(config.model_copy(update=data))

    refused({"modalities": []}, {"robustness": True}, "no question shows a sound or picture")
    edit = {"robustness": True, "edits": ["blur_1"]}
    refused({"modalities": ["audio"]}, edit, "no question shows a sound or picture")
    _, _, questions = check_eval(config_of(world, model, tmp_path / "x"))
    assert edits_to_try(questions) == list(EDITS)
    with pytest.raises(ValueError, match="no edit 'blr'"):
        ControlsConfig(edits=["blr"])
    with pytest.raises(ValueError, match="must be 1 or more"):
        ControlsConfig(nbest=[0, 1])


def test_a_number_is_unchanged_within_a_twentieth_of_the_scale() -> None:
    def same(one: Any, other: Any, scale: float | None = 4.0) -> bool:
        return _is_same(*({"status": "ok", "answer": a} for a in (one, other)), scale)  # pyright: ignore

    assert same(1.0, 1.19)
    assert not same(1.0, 1.2)  # exactly .05 of 4
    assert same({"a": 1, "v": 2}, {"v": 2.1, "a": 1.1})
    assert not same({"a": 1, "v": 2}, {"v": 2.3, "a": 1})
    assert not same(1.0, None)
    assert same("sad", "sad", None)
    assert not same("sad", "happy", None)


def test_the_options_hold_for_a_benchmark_of_its_own() -> None:
    words = ["--data", "a.jsonl", "--model", "m", "--baselines", "--paraphrases", "--nbest", "2,1"]
    config = zero_shot_config("eval/world_conflict.py", [*words, "--controls.edits=[gain_1]"])
    assert config.controls.baselines
    assert config.controls.paraphrases
    assert not config.controls.robustness
    assert not config.reliance.enabled
    assert config.controls.nbest == [1, 2]
    assert config.controls.edits == ["gain_1"]


def test_the_majority_rows_may_stand_where_they_stood() -> None:
    base = {"output_dir": "o", "model": {"path": "m"}, "data": {"manifests": ["a.jsonl"]}}
    rows = {"manifests": ["t.jsonl"]}
    outside = parse(EvalConfig, {**base, "majority_from": rows, "controls": {"baselines": True}})
    inside = parse(EvalConfig, {**base, "controls": {"majority_from": rows, "baselines": True}})
    assert outside == inside
    assert outside.majority_from is not None
    assert parse(EvalConfig, {**base, "majority_from": None}) == parse(EvalConfig, base)
    with pytest.raises(ConfigError, match="manifests"):
        parse(EvalConfig, {**base, "majority_from": {"manifests": []}})
