"""``mmemo eval --reliance`` on real clips with tiny random models."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.config import dump, parse
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation import generate
from mmemo.evaluation.benchmark import load_benchmark
from mmemo.evaluation.config import AnswerGenerationConfig, EvalConfig, RelianceConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import read_predictions
from mmemo.evaluation.reliance.measure import sample_questions
from mmemo.evaluation.reliance.perturb import Perturbation, perturb
from mmemo.evaluation.reliance.summary import read_reliance
from mmemo.evaluation.results import EvalResult, read_results
from mmemo.evaluation.runner import check_eval, run_eval
from mmemo.media.config import DecodeConfig
from mmemo.models.build import ModelConfig, load_model
from mmemo.report.page import build_report
from mmemo.run_log import read_events
from tests.evaluation.world import config_of, save_model, write_world
from tests.models.native_files import FED, save_omni

ROWS = 9
CHANGES = [
    f"{kind}_{streams}"
    for streams in ("audio", "video_face", "video", "face")
    for kind in ("blanked", "swapped")
]
OWN: dict[str, Any] = {"enabled": True, "attention_questions": 6, "shapley_questions": 3}


def config(world: Path, folder: Path, out: Path, **changes: Any) -> EvalConfig:
    given = {"per_device_eval_batch_size": 8, "reliance": OWN, "generation": {"max_new_tokens": 8}}
    return config_of(world, folder, out, **{**given, **changes})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world and a model; tests must not change them."""
    root = tmp_path_factory.mktemp("eval")
    return write_world(root / "world", ROWS), save_model(root / "model")


@pytest.fixture(scope="module")
def measured(shared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> EvalResult:
    """An evaluation; tests must not change it."""
    return run_eval(config(*shared, tmp_path_factory.mktemp("out") / "evaluation"))


def files(folder: Path) -> dict[str, bytes]:
    names = ["reliance.json", "reliance.csv", *(f"reliance/{name}.jsonl" for name in CHANGES)]
    names += ["reliance/attention.jsonl", "reliance/shapley.jsonl", "predictions.jsonl"]
    return {name: (folder / name).read_bytes() for name in names}


def found_in(result: EvalResult) -> Any:
    found = read_reliance(result)
    assert found is not None
    return found


def test_every_question_is_asked_again_under_every_change(measured: EvalResult) -> None:
    found = found_in(measured)
    assert list(found["changes"]) == CHANGES
    plain = {row["sample_id"]: row for row in measured.rows()}
    for name, change in found["changes"].items():
        rows = read_predictions(measured.folder / f"reliance/{name}.jsonl")
        assert change["n"] == len(rows) == ROWS - change["left_out"]
        for row in rows:
            own = plain[row["sample_id"]]
            assert row["truth"] == own["truth"]
            for stream, path in row["media"].items():
                swapped = change["kind"] == "swapped" and stream in change["streams"]
                assert (path != own["media"][stream]) == swapped
        right = sum(row["answer"] == row["truth"] for row in rows)
        assert change["subsets"]["all"]["accuracy"]["value"] == pytest.approx(right / len(rows))
    raws = {row["sample_id"]: row["raw"] for row in measured.rows()}
    for name in ("blanked_audio", "blanked_video_face"):
        rows = read_predictions(measured.folder / f"reliance/{name}.jsonl")
        assert any(row["raw"] != raws[row["sample_id"]] for row in rows)


def test_the_model_is_shown_the_changed_streams_and_the_others_as_they_are(
    shared: tuple[Path, Path],
) -> None:
    world, folder = shared
    made = config(*shared, Path("x"))
    questions = load_benchmark("eval/world_conflict.py").questions(made.data)
    samples = [question.sample for question in questions]
    loaded = load_model(parse(ModelConfig, {"path": str(folder)}))
    limits, generation = DecodeConfig(workers=1), AnswerGenerationConfig()
    with AnswerGenerator(
        loaded, samples, None, world, limits, generation=generation, seed=0, max_length=None
    ) as generator:
        swap = perturb(Perturbation("swapped", ("audio",)), questions[:1], questions, 0)
        (donor,) = [one for one in samples if one.sample_id == swap.noted[0]["donor"]]
        plain, lent = generator.collate(samples[:1]), generator.collate([donor])
        seen = generator.collate([question.sample for question in swap.questions])
        assert torch.equal(seen["audio_features"], lent["audio_features"])
        assert not torch.equal(seen["audio_features"], plain["audio_features"])
        empty = generator.blanked(["audio"]).collate(samples[:1])
        assert not empty["audio_features"].any()
        for batch in (seen, empty):
            for name in ("input_ids", "video_features", "face_features", "audio_features_mask"):
                assert torch.equal(batch[name], plain[name])
        assert torch.equal(
            generator.collate(samples[:1])["audio_features"], plain["audio_features"]
        )


def test_attention_and_shapley_values_are_of_a_sample(measured: EvalResult) -> None:
    found = found_in(measured)
    attention, shapley = found["attention"], found["shapley"]
    assert attention["n"] == 6
    assert set(attention["tokens"]) == {"text", "video", "audio", "face", "fusion"}
    for place in attention["subsets"].values():
        assert sum(one["value"] for one in place.values()) == pytest.approx(1, abs=1e-4)
    assert sum(attention["tokens"].values()) == pytest.approx(1, abs=1e-4)
    assert attention["layers"] == [0, 1]
    for kind, by_head in attention["by_head"].items():
        means = [sum(heads) / len(heads) for heads in by_head]
        assert means == pytest.approx(attention["by_layer"][kind], abs=1e-5)
        whole = attention["subsets"]["all"][kind]["value"]
        assert sum(means) / 2 == pytest.approx(whole, abs=1e-5)
    assert shapley["n"] == 3
    assert set(shapley["subsets"]["all"]) == {"video", "audio", "face", "text"}
    total = sum(one["value"] for one in shapley["subsets"]["all"].values())
    worth = shapley["worth"]
    gain = worth["video+audio+face+text"]["value"] - worth["none"]["value"]
    assert total == pytest.approx(gain, abs=1e-4)
    assert Counter(row["conflict"] for row in lines(measured, "shapley")) == {
        "video_aligned": 1, "audio_aligned": 1, "consistent": 1
    }  # fmt: skip


def lines(result: EvalResult, name: str) -> list[dict[str, Any]]:
    return read_predictions(result.folder / f"reliance/{name}.jsonl")


def test_the_table_has_every_number(measured: EvalResult) -> None:
    with (measured.folder / "reliance.csv").open() as handle:
        table = list(csv.DictReader(handle))
    values = {
        (row["measure"], row["change"], row["of"], row["subset"]): row["value"]
        for row in table
        if not row["layer"]
    }
    found = found_in(measured)
    gap = found["changes"]["swapped_video_face"]["subsets"]["consistent"]["difference"]
    assert float(values["difference", "swapped", "video+face", "consistent"]) == gap["value"]
    signed = measured.main["reliance"]["errors"]["signed"]["value"]
    assert float(values["wrong answers", "", "signed", "all"]) == signed
    war = measured.main["subsets"]["audio_aligned"]["war"]["value"]
    assert float(values["accuracy", "", "", "audio_aligned"]) == war
    for measure, name in (("shapley", "text"), ("attention", "audio")):
        expected = found[measure]["subsets"]["all"][name]["value"]
        assert float(values[measure, "", name, "all"]) == expected
    second = [row for row in table if row["layer"] == "1" and row["of"] == "audio"]
    listed = found["attention"]["by_head"]["audio"][1]
    assert [float(row["value"]) for row in second if row["head"]] == listed
    layers = {row["subset"]: float(row["value"]) for row in second if not row["head"]}
    by_subset = found["attention"]["by_subset"]
    assert layers == {subset: one["audio"][1] for subset, one in by_subset.items()}


def test_a_run_that_stopped_goes_on_without_repeating(
    shared: tuple[Path, Path], measured: EvalResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut while it asks about changed clips, then while it computes Shapley values."""
    asked: list[str] = []
    plain, worth = AnswerGenerator.answer, generate.AnswerGenerator.collate
    out = tmp_path / "evaluation"

    def cut_answers(self: AnswerGenerator, questions: Any, draw: str) -> Any:
        asked.extend(question.sample.sample_id for question in questions)
        if len(asked) > 3 * ROWS + 8:
            raise KeyboardInterrupt
        return plain(self, questions, draw)

    monkeypatch.setattr(AnswerGenerator, "answer", cut_answers)
    with pytest.raises(KeyboardInterrupt):
        run_eval(config(*shared, out))
    assert (out / "results.json").exists()
    assert not (out / "reliance.json").exists()
    monkeypatch.setattr(AnswerGenerator, "answer", plain)

    def cut_shapley(self: AnswerGenerator, samples: Any) -> Any:
        if len(samples) == 8 and (out / "reliance/shapley.jsonl").stat().st_size:
            raise KeyboardInterrupt
        return worth(self, samples)

    monkeypatch.setattr(AnswerGenerator, "collate", cut_shapley)
    with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
        run_eval(config(*shared, out))
    monkeypatch.setattr(AnswerGenerator, "collate", worth)
    run_eval(config(*shared, out))
    assert files(out) == files(measured.folder)
    taken = [e["kept"] for e in read_events(out / "events.jsonl") if e["kind"] == "reliance"]
    assert 8 in taken
    again = run_eval(config(*shared, out))
    last = [e["to_do"] for e in read_events(out / "events.jsonl") if e["kind"] == "reliance"][-10:]
    assert last == [0] * 10
    assert read_reliance(again) == read_reliance(measured)


def test_it_is_off_unless_asked_for_and_stays_beside_its_own_answers(
    shared: tuple[Path, Path], tmp_path: Path
) -> None:
    few = {**OWN, "change": [["audio"]], "questions": 3, "attention_questions": 0,
           "shapley_questions": 0}  # fmt: skip
    result = run_eval(config(*shared, tmp_path / "out", reliance=few))
    found = found_in(result)
    assert (found["attention"], found["shapley"]) == (None, None)
    assert found["changes"]["blanked_audio"]["n"] == 3
    off = {**few, "enabled": False}
    run_eval(config(*shared, tmp_path / "out", reliance=off))
    assert read_reliance(read_results(tmp_path / "out")) is not None
    other = config(*shared, tmp_path / "out", reliance=off, generation={"max_new_tokens": 5})
    assert read_reliance(run_eval(other)) is None
    assert not (tmp_path / "out/reliance.csv").exists()
    (tmp_path / "out/reliance.json").write_text('{"schema": 1, "answers": "x"}')
    with pytest.raises(EvaluationError, match="run the evaluation again with --reliance"):
        build_report(tmp_path / "out", tmp_path / "report.html")


def test_nothing_survives_a_change_of_the_sample(shared: tuple[Path, Path], tmp_path: Path) -> None:
    few = {**OWN, "change": [["audio"]], "attention_questions": 2, "shapley_questions": 2}
    run_eval(config(*shared, tmp_path / "out", reliance=few))
    for change in ({"instruction": "Say it."}, {"seed": 1}, {"answer": "It is {label}."}):
        run_eval(config(*shared, tmp_path / "out", reliance={**few, **change}))
        fresh = config(*shared, tmp_path / "fresh", reliance={**few, **change})
        run_eval(fresh)
        for name in ("reliance.json", "reliance/shapley.jsonl", "reliance/swapped_audio.jsonl"):
            assert (tmp_path / "out" / name).read_bytes() == (
                tmp_path / "fresh" / name
            ).read_bytes()


def test_attention_that_is_moved_is_shown_with_and_without(
    shared: tuple[Path, Path], tmp_path: Path
) -> None:
    moved = {"layers": [0, 1], "head_gate": 0.0, "threshold": 1.0, "share": 0.9}
    few = {**OWN, "change": [["audio"]], "questions": 1, "shapley_questions": 0}
    generation = {"max_new_tokens": 4, "reallocation": moved}
    result = run_eval(config(*shared, tmp_path, reliance=few, generation=generation))
    attention = found_in(result)["attention"]
    with_it, without = (attention[key]["all"]["audio"]["value"] for key in ("subsets", "unchanged"))
    assert with_it != pytest.approx(without, abs=1e-3)


def test_a_model_whose_attention_cannot_be_seen_says_so(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("Strange does not take its attention from transformers' interface")

    monkeypatch.setattr(generate, "reallocating", refuse)
    few = {**OWN, "change": [["audio"]], "questions": 1, "shapley_questions": 0}
    found = found_in(run_eval(config(*shared, tmp_path, reliance=few)))
    assert found["attention"] is None
    assert "Strange" in found["attention_missing"]
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Attention could not be measured: Strange does not" in page


def test_without_clips_there_is_nothing_to_measure(shared: tuple[Path, Path], tmp_path: Path):
    data = {**config(*shared, tmp_path).data.model_dump(), "modalities": []}
    with pytest.raises(ConfigError, match="leave --reliance out"):
        check_eval(config(*shared, tmp_path, data=data))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"change": [[]]}, "one or more streams"),
        ({"change": [["audio", "audio"]]}, "one or more streams, each once"),
        ({"change": [["sound"]]}, "audio"),
        ({"answer": "happy"}, "{label}"),
        ({"shaply_questions": 3}, "did you mean 'shapley_questions'"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(RelianceConfig, given)


def test_a_draw_is_even_over_subsets_and_a_larger_one_holds_it(shared: tuple[Path, Path]) -> None:
    questions = load_benchmark("eval/world_conflict.py").questions(config(*shared, Path("x")).data)
    for seed in range(5):
        before: set[str] = set()
        for count in range(1, ROWS + 2):
            some = sample_questions(questions, count, seed)
            names = [one.sample.sample_id for one in some]
            assert len(names) == min(count, ROWS)
            assert names == sorted(names)
            assert before <= set(names)
            before = set(names)
            sizes = Counter(one.sample.truth.conflict for one in some)
            assert (
                max(sizes.values())
                - min(sizes[one] for one in ("video_aligned", "audio_aligned", "consistent"))
                <= 1
            )
    assert sample_questions(questions, None, 0) == questions
    assert sample_questions(questions, 3, 0) != sample_questions(questions, 3, 4)


def test_the_switch_of_the_command_line_and_the_report(
    shared: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run/evaluation"
    values = dump(config(*shared, out, reliance={**OWN, "enabled": False, "questions": 6}))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "eval.yaml"), "--reliance"])
    assert done.exit_code == 0, done.exception
    assert "video and face swapped" in done.output
    assert "Contributions to the right answer" in done.output
    found = found_in(read_results(out))
    assert found["made"]["questions"] == 6  # what the file says of it still holds
    page = build_report(tmp_path / "run", tmp_path / "report.html").read_text()
    assert "Which modalities model relies on" in page
    assert page.count("Shapley values of the log-probability") == 1


def test_a_native_model(shared: tuple[Path, Path], tmp_path: Path) -> None:
    world, _ = shared
    data = {**config(*shared, tmp_path).data.model_dump(), "modalities": ["video", "audio"]}
    model = {"path": str(save_omni(tmp_path / "omni")), "native": FED, "sampling": {"frames": 4}}
    own = {**OWN, "questions": 3, "attention_questions": 2, "shapley_questions": 1}
    values = dump(config(world, tmp_path, tmp_path / "out", data=data, reliance=own))
    result = run_eval(parse(EvalConfig, {**values, "model": model}))
    found = found_in(result)
    assert list(found["changes"]) == [
        "blanked_audio", "swapped_audio", "blanked_video", "swapped_video"
    ]  # fmt: skip
    assert set(found["attention"]["tokens"]) == {"text", "video", "audio"}
    assert set(found["shapley"]["subsets"]["all"]) == {"text", "video", "audio"}
    assert json.loads((tmp_path / "out/reliance.json").read_text()) == found
