"""The public API: what a script does with a model, a clip, answers and a config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmemo
from mmemo.config import dump
from mmemo.errors import ConfigError, DataError, EvaluationError, MediaError
from mmemo.evaluation.generate import AnswerGenerator
from tests.evaluation.world import config_of, save_model, write_world
from tests.media_files import write_clip, write_wav
from tests.models import chat_templates


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    write_world(root / "world")
    save_model(root / "model")
    return root


@pytest.fixture(scope="module")
def model(home: Path) -> Any:
    return mmemo.load_model(home / "model")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, mmemo; mmemo.MmemoError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(mmemo, name) is not None for name in mmemo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmemo.nothing  # noqa: B018


def test_a_clip_gives_features_of_every_stream_that_the_model_reads(home: Path, model: Any) -> None:
    clip = home / "world/clips/0.mp4"
    found = mmemo.process_clip(model, clip)
    assert set(found) == {"video", "audio", "face"}
    again = mmemo.process_clip(model, {"video": clip, "audio": clip, "face": clip})
    for name, features in found.items():
        assert features["x"].ndim >= 2
        assert torch.equal(features["x"], again[name]["x"])


def test_sound_alone_gives_audio_alone(tmp_path: Path, model: Any) -> None:
    write_wav(tmp_path / "a.wav", seconds=1.0)
    assert set(mmemo.process_clip(model, tmp_path / "a.wav")) == {"audio"}


def test_files_of_two_folders_make_one_clip(tmp_path: Path, home: Path, model: Any) -> None:
    write_wav(tmp_path / "a.wav", seconds=1.0)
    clip = {"video": home / "world/clips/0.mp4", "audio": tmp_path / "a.wav"}
    found = mmemo.process_clip(model, clip)
    assert set(found) == {"video", "audio"}
    alone = mmemo.process_clip(model, tmp_path / "a.wav")["audio"]["x"]
    assert torch.equal(found["audio"]["x"], alone)


@pytest.mark.parametrize(
    ("clip", "error", "words"),
    [
        ("missing.mp4", MediaError, "missing"),
        ({}, DataError, "nothing"),
        ({"smell": "a.mp4"}, DataError, "smell"),
    ],
)
def test_a_clip_that_cannot_be_used_is_named(
    model: Any, clip: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        mmemo.process_clip(model, clip)


def test_an_answer_depends_on_clip_and_question_and_repeats(home: Path, model: Any) -> None:
    clips = [home / f"world/clips/{index}.mp4" for index in range(3)]
    ask = {"max_new_tokens": 12}
    first = [mmemo.answer(model, clip, "What does she feel?", **ask) for clip in clips]
    again = [mmemo.answer(model, clip, "What does she feel?", **ask) for clip in clips]
    assert first == again
    others = [mmemo.answer(model, clip, "Is the voice loud?", **ask) for clip in clips]
    assert first != others
    with pytest.raises(ConfigError, match="max_new_token"):
        mmemo.answer(model, clips[0], "What?", max_new_token=3)


def test_an_answer_begins_with_what_the_template_opens(
    home: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = home / "world/clips/0.mp4"
    monkeypatch.setattr(model.processor, "chat_template", chat_templates.PREFILLED)
    text = mmemo.answer(model, clip, "What does she feel?", max_new_tokens=4)
    assert text.startswith("<think>")
    monkeypatch.setattr(model.processor, "chat_template", chat_templates.QWEN3_NOT_THINKING)
    assert "think" not in mmemo.answer(model, clip, "What does she feel?", max_new_tokens=4)


def test_sampled_answers_follow_the_seed(home: Path, model: Any) -> None:
    clip = home / "world/clips/0.mp4"
    draws = {
        seed: mmemo.answer(model, clip, "Why?", seed=seed, do_sample=True, max_new_tokens=16)
        for seed in range(4)
    }
    assert len(set(draws.values())) > 1
    assert draws[2] == mmemo.answer(model, clip, "Why?", seed=2, do_sample=True, max_new_tokens=16)


def test_scores_equal_those_counted_by_hand() -> None:
    answers = ["<answer>sad</answer>", "happiness", "sad", "I cannot tell.", "sad"]
    truths = ["sad", "happy", "happy", "happy", "sad"]
    found = mmemo.score(answers, truths, ["happy", "sad"], speakers=list("aabbc"))
    assert found["n"] == 5
    assert found["metrics"]["war"]["value"] == pytest.approx(3 / 5)
    assert found["metrics"]["uar"]["value"] == pytest.approx((1 / 3 + 1) / 2, abs=1e-6)
    assert found["clusters"] == 3
    assert found["statuses"]["ok"] == 4
    low, high = (found["metrics"]["war"][name] for name in ("low", "high"))
    assert low <= 3 / 5 <= high


def test_score_refuses_what_does_not_fit() -> None:
    with pytest.raises(EvaluationError, match="2 answers and 1 truths"):
        mmemo.score(["sad", "sad"], ["sad"], ["sad", "happy"])
    with pytest.raises(EvaluationError, match=r"truths\[0\] is 'sadd'"):
        mmemo.score(["sad"], ["sadd"], ["sad", "happy"])
    with pytest.raises(EvaluationError, match="no answer"):
        mmemo.score([], [], ["sad", "happy"])
    with pytest.raises(EvaluationError, match=r"conflicts\[1\] is 'voice'.*audio_aligned"):
        mmemo.score(["sad"] * 2, ["sad"] * 2, ["sad", "happy"], conflicts=[None, "voice"])
    with pytest.raises(ConfigError, match="score: 'resamples'"):
        mmemo.score(["sad"], ["sad"], ["sad", "happy"], resamples=1)


def test_evaluate_is_the_command_line_and_score_agrees_with_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["<answer>sad</answer>", "<answer>happy</answer>", "who knows", "fear"]

    def answers(self: AnswerGenerator, questions: Any, draw: str) -> list[tuple[str, int, bool]]:
        ids = [int(one.sample.sample_id.removeprefix("test-")) for one in questions]
        return [(said[number % 4], 3, True) for number in ids]

    monkeypatch.setattr(AnswerGenerator, "answer", answers)
    config = dump(config_of(home / "world", home / "model", tmp_path / "out"))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    found = mmemo.evaluate(tmp_path / "eval.yaml", "name=mine")
    assert found["name"] == "mine"
    rows = _rows(tmp_path / "out")
    again = mmemo.score(
        [row["raw"] for row in rows],
        [row["truth"] for row in rows],
        rows[0]["labels"],
        speakers=[row["group"]["speaker"] for row in rows],
        conflicts=[row["conflict"] for row in rows],
        resamples=100,
    )
    assert again["metrics"] == found["tasks"]["emotion"]["metrics"]
    assert again["metrics"]["war"]["value"] > 0
    with pytest.raises(ConfigError, match="no config of a stage that trains"):
        mmemo.train_model(tmp_path / "eval.yaml")


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_train_gives_a_model_that_loads(home: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", seconds=1.0, fps=4, tone=200.0)
    row = (home / "world/test_conflict.jsonl").read_text().splitlines()[0]
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(home / "model")},
        "data": {"manifests": [str(tmp_path / "rows.jsonl")], "media_root": str(home / "world")},
        "store": {"path": str(tmp_path / "features")},
        "decode": {"workers": 1},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    final = mmemo.train_model(tmp_path / "sft.yaml", "train.max_steps=1", "model.lora={r: 2}")
    trained = mmemo.load_model(final)
    text = mmemo.answer(trained, home / "world/clips/0.mp4", "What?", max_new_tokens=4)
    assert isinstance(text, str)


def test_training_starts_the_ranks_that_the_config_asks_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(
        "mmemo.train.distributed.launch",
        lambda argv, processes, **_: started.append((list(argv), processes)),
    )
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(home / "model")},
        "data": {"manifests": ["rows.jsonl"]},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    final = mmemo.train_model(tmp_path / "sft.yaml", "run.processes=2")
    assert final == tmp_path / "run/final"
    assert started == [(["sft", str(tmp_path / "run/launch.yaml")], 2)]


def test_faces_that_are_placed_by_boxes_need_a_manifest(
    home: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = home / "world/clips/0.mp4"
    sampling = model.model.sampling
    face = sampling.face.model_copy(update={"detector": "boxes"})
    monkeypatch.setattr(model.model, "sampling", sampling.model_copy(update={"face": face}))
    with pytest.raises(DataError, match="by boxes from a manifest"):
        mmemo.process_clip(model, clip)
    assert set(mmemo.process_clip(model, {"video": clip, "audio": clip})) == {"video", "audio"}


def test_no_public_name_is_also_a_module_of_the_package() -> None:
    """Else importing that module anywhere would replace the function."""
    folder = Path(mmemo.__file__).parent
    assert not [
        name
        for name in mmemo.__all__
        if (folder / f"{name}.py").exists() or (folder / name).is_dir()
    ]
