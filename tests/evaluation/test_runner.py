"""``run_eval`` on real clips with a tiny random model: resume, identity of answers, exclusion."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import dump, parse
from mmemo.content import sha256
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation import predictions
from mmemo.evaluation.config import AnswerGenerationConfig, EvalConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import read_predictions
from mmemo.evaluation.results import compare, read_results
from mmemo.evaluation.runner import run_eval
from mmemo.run_log import read_events
from tests import children
from tests.evaluation.world import config_of, row_of, save_model, write_world
from tests.media_files import write_clip
from tests.models.parts import values

ROWS = 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world and a model; tests must not change them."""
    root = tmp_path_factory.mktemp("eval")
    return write_world(root / "world", ROWS), save_model(root / "model")


def kept(folder: Path) -> list[int]:
    """For each run in a folder, how many answers it took from the one before."""
    events = read_events(folder / "events.jsonl")
    return [event["kept"] for event in events if event["kind"] == "answers"]


def test_every_question_is_answered_once_in_order(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    result = run_eval(config_of(world, model, tmp_path / "out"))
    rows = result.rows()
    assert [row["sample_id"] for row in rows] == [f"test-{i:03d}" for i in range(ROWS)]
    assert result.main["n"] == sum(result.main["statuses"].values()) == ROWS
    assert len({row["raw"] for row in rows}) > 1  # the model looks at its input
    assert result.made["model"]["fingerprint"]
    assert "×" in result.made["prompts"]["example"]  # runs of media tokens are folded
    assert read_results(tmp_path / "out").values == result.values


def test_padding_and_batching_do_not_change_greedy_answers(
    shared: tuple[Path, Path], tmp_path: Path
):
    world, model = shared
    alone = run_eval(config_of(world, model, tmp_path / "1", per_device_eval_batch_size=1))
    together = run_eval(config_of(world, model, tmp_path / "10", per_device_eval_batch_size=10))
    assert [row["raw"] for row in alone.rows()] == [row["raw"] for row in together.rows()]


def test_the_store_off_gives_the_same_answers(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    on = run_eval(config_of(world, model, tmp_path / "on"))
    off = run_eval(config_of(world, model, tmp_path / "off", store={"enabled": False}))
    names = (tmp_path / "on/predictions.jsonl", tmp_path / "off/predictions.jsonl")
    assert on.values["tasks"] == off.values["tasks"]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_run_that_stopped_goes_on_without_repeating(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world, model = shared
    whole = run_eval(config_of(world, model, tmp_path / "whole"))
    asked: list[str] = []
    plain = AnswerGenerator.answer

    def stop_at_third(self: AnswerGenerator, questions: Any, draw: str) -> Any:
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(question.sample.sample_id for question in questions)
        return plain(self, questions, draw)

    monkeypatch.setattr(AnswerGenerator, "answer", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_eval(config_of(world, model, tmp_path / "cut"))
    assert not (tmp_path / "cut/results.json").exists()
    asked.clear()
    monkeypatch.setattr(AnswerGenerator, "answer", plain)
    again = run_eval(config_of(world, model, tmp_path / "cut"))
    assert kept(tmp_path / "cut") == [0, 6]
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again.values == whole.values
    run_eval(config_of(world, model, tmp_path / "cut"))
    assert kept(tmp_path / "cut") == [0, 6, ROWS]


def test_answers_of_another_parser_are_read_again(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    whole = run_eval(config_of(world, model, tmp_path / "out"))
    file = tmp_path / "out/predictions.jsonl"
    right = file.read_bytes()
    rows = read_predictions(file)
    for row in rows:
        row |= {"status": "ok", "answer": row["truth"], "score": 1.0}
        del row["strict_status"], row["strict_answer"]  # as in a file of version 0.1
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    again = run_eval(config_of(world, model, tmp_path / "out"))
    assert kept(tmp_path / "out") == [0, ROWS]
    assert again.values == whole.values
    assert file.read_bytes() == right
    by_reading = again.main["by_reading"]
    assert list(by_reading) == ["verdict", "strict"]
    for found in by_reading.values():
        assert sum(found[status] for status in ("ok", "refused", "malformed")) == ROWS


Change = Callable[[Path, Path, Path], EvalConfig]


def other_model(world: Path, model: Path, out: Path) -> EvalConfig:
    return config_of(world, save_model(model.parent / "other", seed=1), out)


def more_frames(world: Path, model: Path, out: Path) -> EvalConfig:
    sampling = {**values()["sampling"], "frames": 3}
    return config_of(world, save_model(model.parent / "frames", sampling=sampling), out)


def swapped_clip(world: Path, model: Path, out: Path) -> EvalConfig:
    write_clip(world / "clips/0.mp4", seconds=1.0, fps=4, tone=700.0)
    return config_of(world, model, out)


def other_prompt(world: Path, model: Path, out: Path) -> EvalConfig:
    path = world / "test_conflict.jsonl"
    path.write_text(path.read_text().replace("(0)", "(zero)"))
    return config_of(world, model, out)


def other_truth(world: Path, model: Path, out: Path) -> EvalConfig:
    path = world / "test_conflict.jsonl"
    path.write_text(path.read_text().replace('"label": "happy"', '"label": "neutral"'))
    return config_of(world, model, out)


def other_benchmark(world: Path, model: Path, out: Path) -> EvalConfig:
    file = world / "bench.py"
    file.write_text(Path("eval/world_conflict.py").read_text() + "\n# edited\n")
    return config_of(world, model, out, benchmark=str(file))


def longer_answers(world: Path, model: Path, out: Path) -> EvalConfig:
    return config_of(world, model, out, generation={"max_new_tokens": 9})


def other_batches(world: Path, model: Path, out: Path) -> EvalConfig:
    return config_of(world, model, out, per_device_eval_batch_size=4)


def no_sound(world: Path, model: Path, out: Path) -> EvalConfig:
    data = config_of(world, model, out).data.model_dump()
    return config_of(world, model, out, data={**data, "modalities": ["video", "face"]})


CHANGES: list[Change] = [
    other_model,
    more_frames,
    swapped_clip,
    other_prompt,
    other_truth,
    other_benchmark,
    longer_answers,
    other_batches,
    no_sound,
]


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_answer_survives_a_change_of(change: Change, own_model: Path, tmp_path: Path):
    world, out = write_world(tmp_path / "world", ROWS), tmp_path / "out"
    run_eval(config_of(world, own_model, out))
    run_eval(change(world, own_model, out))
    assert kept(out)[1] == 0
    fresh = change(world, own_model, tmp_path / "fresh")
    run_eval(fresh)
    name = "predictions.jsonl"
    assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_no_answer_survives_other_versions_of_libraries_and_draws_stay(
    own_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    world, out = write_world(tmp_path / "world", ROWS), tmp_path / "out"
    sampled = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    config = config_of(world, own_model, out, generation=sampled)
    before = run_eval(config).rows()
    capsys.readouterr()
    monkeypatch.setattr(
        "mmemo.evaluation.cache.versions", lambda: {"torch": "99.1", "transformers": "88.2"}
    )
    after = run_eval(config).rows()
    assert kept(out) == [0, 0]
    words = " ".join(capsys.readouterr().out.split())
    assert f"{ROWS} earlier answers will be replaced" in words
    assert "other versions than torch 99.1 and transformers 88.2" in words
    assert {row["key"] for row in before}.isdisjoint({row["key"] for row in after})
    # The same seed draws the same random numbers.
    assert [row["raw"] for row in before] == [row["raw"] for row in after]


def test_sampled_answers_depend_on_the_seed_and_on_nothing_else(
    shared: tuple[Path, Path], tmp_path: Path
):
    world, model = shared

    def answers(name: str, seed: int) -> list[str]:
        generation = {"max_new_tokens": 8, "do_sample": True}
        config = config_of(world, model, tmp_path / name, generation=generation, seed=seed)
        return [row["raw"] for row in run_eval(config).rows()]

    first = answers("a", 0)
    (tmp_path / "b").mkdir()
    lines = (tmp_path / "a/predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b/predictions.jsonl").write_bytes(b"".join(lines[:6]))
    assert answers("b", 0) == first
    assert kept(tmp_path / "b") == [6]
    assert answers("a", 1) != first
    assert kept(tmp_path / "a") == [0, 0]


def test_bad_clips_are_left_out_and_counted(
    tmp_path: Path, own_model: Path, capsys: pytest.CaptureFixture[str]
):
    world = write_world(tmp_path / "world", ROWS)
    (world / "clips/2.mp4").write_bytes((world / "clips/2.mp4").read_bytes()[:600])
    decode = {"workers": 1, "max_bad_share": 0.5}
    result = run_eval(config_of(world, own_model, tmp_path / "out", decode=decode))
    assert "1 bad clip left out (" in capsys.readouterr().out
    bad = sum(row_of(index)["videos"] == ["clips/2.mp4"] for index in range(ROWS))
    assert result.excluded == bad == 3
    assert result.main["n"] == ROWS - bad
    assert result.values["excluded"]["clips"] == 1
    bounds = result.values["bounds"]
    assert bounds["asked"] == ROWS
    assert bounds["best"] - bounds["worst"] >= bad / ROWS
    rows = [json.loads(line) for line in (tmp_path / "out/bad_clips.jsonl").open()]
    assert [row["path"] for row in rows] == ["clips/2.mp4"]


def test_text_only_and_majority_baselines(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    data = {"manifests": [str(world / "test_conflict.jsonl")], "media_root": str(world)}
    text = config_of(
        world, model, tmp_path / "text", data={**data, "modalities": []}, majority_from=data
    )
    result = run_eval(text)
    assert all(not row["media"] for row in result.rows())
    assert "<|" not in result.made["prompts"]["example"].replace("<|im_", "")
    majority = result.values["baselines"]["majority"]
    assert majority["label"] == "angry"  # ties go by name
    manifest = world / "test_conflict.jsonl"
    assert sum(majority["counts"].values()) == ROWS
    assert majority["manifests"] == {str(manifest): sha256(manifest)}
    full = run_eval(config_of(world, model, tmp_path / "full"))
    assert compare(full, result)[0].tasks["emotion"]["unpaired"] == 0


def test_unlike_runs_are_not_compared(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    first = run_eval(config_of(world, model, tmp_path / "a"))
    other = write_world(tmp_path / "world", ROWS)
    text = (other / "test_conflict.jsonl").read_text()
    (other / "test_conflict.jsonl").write_text(text.replace("test-0", "else-0"))
    second = run_eval(config_of(other, model, tmp_path / "b"))
    with pytest.raises(EvaluationError, match="no question in common"):
        compare(first, second)


def slowly(config: str) -> None:
    """Evaluate one question at a time, slowly enough to be killed between two."""
    plain = predictions.PredictionsFile.append

    def slow(self: Any, rows: Any) -> None:
        time.sleep(0.02)
        plain(self, rows)

    predictions.PredictionsFile.append = slow  # type: ignore[method-assign]
    run_eval(parse(EvalConfig, json.loads(config)))


@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_thirty_kills_end_with_the_same_bytes(shared: tuple[Path, Path], tmp_path: Path):
    """Each run is killed by SIGKILL at a random moment between its first answers and its end."""
    world, model = shared

    def config(name: str) -> EvalConfig:
        return config_of(world, model, tmp_path / name, per_device_eval_batch_size=1)

    run_eval(config("whole"))
    expected = (tmp_path / "whole/predictions.jsonl").read_bytes()
    delays = random.Random(0)
    kills, name = 0, 0
    while kills < 30:
        folder = tmp_path / f"cut-{name}"
        child = children.start(slowly, json.dumps(dump(config(folder.name))))
        while not (folder / "predictions.jsonl").exists():
            assert child.is_alive() or (folder / "predictions.jsonl").exists()
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.25))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if (folder / "results.json").exists():
            name += 1  # it had come to its end: a new folder
        else:
            kept_bytes = (folder / "predictions.jsonl").read_bytes()
            assert expected.startswith(kept_bytes[: kept_bytes.rfind(b"\n") + 1])
    for done in range(name + 1):
        run_eval(config(f"cut-{done}"))
        assert (tmp_path / f"cut-{done}/predictions.jsonl").read_bytes() == expected


ALL_LAYERS = {"layers": [0, 1], "head_gate": 0.0}
DECODING: list[dict[str, Any]] = [
    {"reallocation": {**ALL_LAYERS, "threshold": 1.0, "share": 0.9}},
    {"amplification": {"layers": [0, 1], "alpha": 3.0}},
    {"sinks": {**ALL_LAYERS, "sink": 1.1, "keep": 0.0}},
    {"contrast": {"alpha": 3.0}},
]


@pytest.mark.parametrize("changes", DECODING, ids=lambda given: next(iter(given)))
def test_a_way_of_decoding_changes_answers_and_is_recorded(
    shared: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
):
    world, model = shared
    out = tmp_path / "out"
    plain = [row["raw"] for row in run_eval(config_of(world, model, out)).rows()]
    found = run_eval(config_of(world, model, out, generation={"max_new_tokens": 8, **changes}))
    assert kept(out) == [0, 0]  # none of the plain answers is taken for one of these
    assert plain != [row["raw"] for row in found.rows()]
    (name,) = changes
    assert found.made["generation"][name].items() >= changes[name].items()
    again = run_eval(
        config_of(
            world,
            model,
            tmp_path / "1",
            generation={"max_new_tokens": 8, **changes},
            per_device_eval_batch_size=1,
        )
    )
    assert [row["raw"] for row in again.rows()] == [row["raw"] for row in found.rows()]


def test_a_change_that_does_not_fit_leaves_what_is_there(shared: tuple[Path, Path], tmp_path: Path):
    world, model = shared
    out = tmp_path / "out"
    before = run_eval(config_of(world, model, out)).rows()
    layers = {"reallocation": {"layers": [9]}}
    with pytest.raises(ConfigError, match="layers \\[9\\] do not fit"):
        run_eval(config_of(world, model, out, generation={"max_new_tokens": 8, **layers}))
    alone = {"manifests": [str(world / "test_conflict.jsonl")], "media_root": str(world)}
    with pytest.raises(ConfigError, match="no question shows both audio and video or face"):
        run_eval(
            config_of(
                world,
                model,
                out,
                data={**alone, "modalities": ["audio"]},
                generation={"max_new_tokens": 8, "reallocation": ALL_LAYERS},
            )
        )
    assert read_predictions(out / "predictions.jsonl") == before
    assert run_eval(config_of(world, model, out)).rows() == before
    assert kept(out)[-1] == len(before)


def test_ways_of_decoding_that_do_not_go_together():
    with pytest.raises(ConfigError, match="at most one of"):
        parse(AnswerGenerationConfig, {"reallocation": {}, "sinks": {}})
    with pytest.raises(ConfigError, match="repetition_penalty"):
        parse(AnswerGenerationConfig, {"contrast": {}, "repetition_penalty": 1.2})
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        parse(AnswerGenerationConfig, {"reallocation": {"treshold": 2}})


def test_the_labels_of_voice_and_face_are_the_benchmarks_own(own_model: Path, tmp_path: Path):
    """``happiness`` is ``happy``: else an answer that follows it would count as neither's."""
    world = write_world(tmp_path / "world", ROWS)
    path = world / "test_conflict.jsonl"
    nouns = {"happy": "Happiness", "angry": "anger", "surprise": "surprised"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        said = row["modality_labels"]
        row["modality_labels"] = {key: nouns.get(label, label) for key, label in said.items()}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_eval(config_of(world, own_model, tmp_path / "out"))
    for index, row in enumerate(result.rows()):
        assert row["modality_labels"] == row_of(index)["modality_labels"]
    assert result.main["reliance"]["left_out"] == 0
    assert result.main["reliance"]["errors"]["signed"]["n"] > 0
