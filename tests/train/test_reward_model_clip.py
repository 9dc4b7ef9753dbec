"""A reward model that reads the clip's features: it grades what the text alone cannot tell."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from transformers import ViTConfig, ViTModel

from mmemo.config import load_config, parse
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError, DataError
from mmemo.features.encode import run_encode
from mmemo.features.inputs import ClipRows, StageInputs
from mmemo.features.keys import sampling_part
from mmemo.media.clip import DecodedClip
from mmemo.models.config import ModelConfig
from mmemo.rewards.judge.calibration import refusal
from mmemo.rewards.judge.clip_features import ClipEncoders
from mmemo.rewards.judge.open import open_judge
from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig
from mmemo.rewards.judge.rubric import DIMENSIONS, JudgeItem, clip_media
from mmemo.stages import guess
from mmemo.train.reward_model import (
    RewardModelConfig,
    build_scorer,
    check_reward_model,
    item_of,
    load_graded,
    run_reward_model,
)
from mmemo.train.sft import SftConfig
from reward.reasoning import reasoning
from tests.media_files import write_clip
from tests.models.parts import IMAGES, VIT

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 220, 20),
    "blue": (20, 20, 220),
    "white": (240, 240, 240),
}
QUESTION = "<video>How does the room feel?"


def painted(colour: str, shade: int) -> Callable[[int, tuple[int, int]], NDArray[np.uint8]]:
    def draw(_: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        lighter = np.add(COLOURS[colour], shade)
        return np.full((size[1], size[0], 3), lighter, dtype=np.uint8)

    return draw


def answer(colour: str) -> str:
    return (
        f"<think>The light in the room is {colour}, so it is a {colour} scene and the person seems "
        f"to be at ease with {colour} light.</think><answer>{colour}</answer>"
    )


def write(folder: Path, name: str, shown: Sequence[str]) -> None:
    """A clip of one colour each, and for each clip an answer for every colour. No text tells them
    apart, and all have the same facts."""
    lines: list[str] = []
    for number, colour in enumerate(shown):
        clip = f"{name}/{number}.mp4"
        # No two files are the same, because features are kept by their content.
        draw = painted(colour, number + (8 if name == "test" else 0))
        write_clip(folder / clip, seconds=0.5, size=(32, 32), audio=False, draw=draw)
        for said in COLOURS:
            grade = 5 if said == colour else 1
            row = {
                "sample_id": f"{name}-{number}-{said}",
                "prompt": [{"role": "user", "content": QUESTION}],
                "videos": [clip],
                "candidate": answer(said),
                "grades": dict.fromkeys(DIMENSIONS, grade),
                "group": {"speaker": f"{name}-{number % 4}"},
            }
            lines.append(json.dumps(row))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(folder: Path, out: Path, **model: Any) -> RewardModelConfig:
    scratch = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}
    branch = {"encoder_config": VIT, "preprocessor": IMAGES, "tokens": 2}
    text = {"text": {"scratch": {**scratch, "vocab_size": 400}}, "max_length": 256}
    data = {"media_root": str(folder)}
    values: dict[str, Any] = {
        "output_dir": str(out),
        "model": {**text, "video": branch, "sampling": {"frames": 2}, "facts": False, **model},
        "data": {"manifests": [str(folder / "train.jsonl")], **data},
        "test_data": {"manifests": [str(folder / "test.jsonl")], **data},
        "train": {"max_steps": 90, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
        "run": {"use_cpu": True, "save_steps": 90, "logging_steps": 20, "threads": 1},
        "bootstrap": {"resamples": 100},
        "decode": {"workers": 1},
    }
    return parse(RewardModelConfig, values)


class Encoded:
    """Counts the clips that encoders encode."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clips: Counter[str] = Counter()
        inner = ClipEncoders.encode

        def encode(one: ClipEncoders, modality: Any, clips: Sequence[DecodedClip]) -> Any:
            self.clips.update(clip.name for clip in clips)
            return inner(one, modality, clips)

        patch.setattr(ClipEncoders, "encode", encode)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """Folder of the run ``run``, with its clips, and how often each clip was encoded."""
    folder = tmp_path_factory.mktemp("clips")
    write(folder, "train", [*COLOURS] * 2)
    # Half way round, every clip has another colour.
    write(folder, "test", ["red", "green", "blue", "white", "green", "blue", "white", "red"])
    with pytest.MonkeyPatch.context() as patch:
        encoded = Encoded(patch)
        run_reward_model(config_of(folder, folder / "run"))
    return folder, encoded.clips


def judge_of(folder: Path, **fields: Any) -> LocalJudge:
    path = str(folder / "run" / "final")
    return LocalJudge(LocalJudgeConfig(model=path, use_cpu=True, rounded=False, **fields))


def test_it_grades_by_the_clip_alone(trained: tuple[Path, Counter[str]]) -> None:
    folder, encoded = trained
    found = json.loads((folder / "run" / "calibration.json").read_text())
    swapped = found["swapped"]
    assert swapped["own"] > 4
    assert swapped["other"] < 2
    assert swapped["drop"]["low"] > 1
    assert found["constant"]["reward"] < 0.5
    assert refusal(found) is None
    assert found["unscored"] == 0
    # Each clip was encoded once, although it has four answers and is read in each epoch.
    assert set(encoded.values()) == {1}
    assert len(encoded) == 16


def test_without_features_it_cannot(trained: tuple[Path, Counter[str]], tmp_path: Path) -> None:
    """The same rows tell a model of text nothing, and are refused before it is trained."""
    folder, _ = trained
    text = config_of(folder, tmp_path, video=None, sampling=None, facts=True)
    with pytest.raises(DataError, match="all rows have the same facts"):
        run_reward_model(text)
    _, reader = build_scorer(text.model, [answer(one) for one in COLOURS])
    right, wrong = [item_of(row) for row in load_graded(text.data)][0:5:4]
    assert right.completion == wrong.completion
    assert right.clip != wrong.clip
    assert reader.read(right) == reader.read(wrong)
    with pytest.raises(ConfigError, match="facts: false needs a branch"):
        config_of(folder, tmp_path, video=None, sampling=None)


def test_the_reward_reads_the_stored_features(
    trained: tuple[Path, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row's ``media`` finds what training stored; a clip that is new is encoded and stored; one
    that is broken costs its own completions their reward, and no others."""
    folder, _ = trained
    encoded = Encoded(monkeypatch)
    (folder / "broken.mp4").write_bytes(b"no clip")
    write_clip(folder / "new.mp4", seconds=0.5, size=(32, 32), audio=False, draw=painted("blue", 5))
    clips = ["test/0.mp4", "test/0.mp4", "broken.mp4", "new.mp4", "new.mp4", "gone.mp4", "../x.mp4"]
    said = ["red", "blue", "red", "blue", "white", "red", "red"]
    media = [{"root": str(folder), "video": {"path": name}} for name in clips]
    logged: dict[str, float] = {}

    def score() -> list[float | None]:
        judge = open_judge({"model": str(folder / "run" / "final"), "use_cpu": True})
        prompt = [{"role": "user", "content": QUESTION}]
        done = [[{"role": "assistant", "content": answer(colour)}] for colour in said]
        asked = [prompt] * len(done)
        found = asyncio.run(
            reasoning(asked, done, judge=judge, media=[*media], log_metric=logged.__setitem__)
        )
        assert isinstance(judge, LocalJudge)
        assert judge.counts["bad_clip"] == 3
        assert judge.counts["too_long"] == judge.counts["no_clip"] == 0
        judge.close()
        return found

    assert score() == [1, 0.2, None, 1, 0.2, None, None]
    assert logged["judge_failed"] == pytest.approx(3 / 7)
    assert encoded.clips == {"new.mp4": 1}
    assert score()[3:5] == [1, 0.2]
    assert encoded.clips == {"new.mp4": 1}


def test_an_item_without_a_clip_has_no_grade(trained: tuple[Path, Counter[str]]) -> None:
    folder, _ = trained
    judge = judge_of(folder)
    sound = clip_media({"root": str(folder), "audio": {"path": "test/0.mp4"}})
    items = [JudgeItem("How?", answer("red"), "", clip) for clip in (None, sound)]
    assert judge.grade(items) == [None, None]
    assert judge.counts["no_clip"] == 2


def test_grades_do_not_depend_on_the_batch_or_the_store(
    trained: tuple[Path, Counter[str]], tmp_path: Path
) -> None:
    folder, _ = trained
    items = [item_of(row) for row in load_graded(config_of(folder, folder / "run").test_data)][:8]
    stored = judge_of(folder, batch_size=8).grade(items)
    alone = judge_of(folder, batch_size=1, store={"enabled": False}).grade(items)
    for one, other in zip(stored, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_its_encoders_are_named_and_checked(
    trained: tuple[Path, Counter[str]], tmp_path: Path
) -> None:
    folder, _ = trained
    final = tmp_path / "final"
    shutil.copytree(folder / "run" / "final", final)
    settings = json.loads((final / "scorer.json").read_text())
    assert settings["facts"] is False
    assert set(settings["clip"]["fingerprints"]) == {"video"}
    settings["clip"]["seed"] = 7  # other weights, as if the folder of an encoder had been replaced
    (final / "scorer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"video encoder .* gives other features than those"):
        open_judge({"model": str(final), "use_cpu": True})
    with pytest.raises(ConfigError, match=r"encoders\.audio: .* has no such encoder"):
        judge_of(folder, encoders={"audio": "somewhere"})
    boxes = {"frames": 2, "face": {"detector": "boxes"}}
    face = {"encoder_config": VIT, "preprocessor": IMAGES}
    with pytest.raises(ConfigError, match="no face boxes"):
        build_scorer(config_of(folder, tmp_path, face=face, sampling=boxes).model, ["text"])


def test_check_names_what_it_reads_and_rows_without_it(
    trained: tuple[Path, Counter[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    check_reward_model(config_of(folder, tmp_path / "none"))
    assert "tokens of a clip: 2 of video; facts as text: False" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    lines = (folder / "test.jsonl").read_text().splitlines()
    row = {**json.loads(lines[1]), "audios": ["test/0.mp4"]}
    del row["videos"]
    row["prompt"] = [{"role": "user", "content": "<audio>How?"}]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], json.dumps(row)]))
    config = config_of(folder, tmp_path / "none")
    test_data = config.test_data.model_copy(update={"manifests": [str(tmp_path / "rows.jsonl")]})
    with pytest.raises(DataError, match="has no video for the branches") as raised:
        check_reward_model(config.model_copy(update={"test_data": test_data}))
    assert raised.value.line == 2


def test_the_documented_recipe_is_valid_and_so_is_its_judge(tmp_path: Path) -> None:
    text = Path("docs/concepts/judges.md").read_text(encoding="utf-8")
    example, rest = text.split('title="clip_reward_model.yaml"\n')[1].split("```", 1)
    (tmp_path / "clip.yaml").write_text(example)
    variables = {"run": "runs/x", "seed": "0"}
    config = load_config(RewardModelConfig, tmp_path / "clip.yaml", variables=variables)
    assert guess(config.model_dump()) == "reward-model"
    clip = config.model.clip
    assert clip is not None
    assert set(clip.branches) == {"video", "audio"}
    # The features are those of the recipe's own SFT, which the store then holds already.
    sft = load_config(
        SftConfig, Path("train_configs/quickstart/attribute.yaml"), variables=variables
    )
    for name, branch in clip.branches.items():
        other = getattr(sft.model, name)
        same = ("encoder", "layer", "spatial_tokens", "stride", "dtype")
        assert [getattr(branch, key) for key in same] == [getattr(other, key) for key in same]
        sampled = [sampling_part(name, one) for one in (clip.sampling, sft.model.sampling) if one]
        assert sampled[0] == sampled[1]
    assert config.store == sft.store
    (entry,) = yaml.safe_load(rest.split("```yaml\n")[1].split("```")[0])
    judge = parse(LocalJudgeConfig, entry["params"]["judge"])
    assert judge.store.path == "runs/quickstart/store"


def test_features_of_sft_are_read_again_and_an_encoder_may_move(
    trained: tuple[Path, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The composed model and the reward model name the same features; so does a moved encoder."""
    folder, _ = trained
    encoder = tmp_path / "vit"
    sizes: dict[str, Any] = {key: value for key, value in VIT.items() if key != "model_type"}
    ViTModel(ViTConfig(**sizes)).save_pretrained(encoder)
    (encoder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    video = {"encoder": str(encoder), "tokens": 2}
    config = config_of(folder, tmp_path / "run", video=video)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})})
    scratch = {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "vocab_size": 400}}
    composed = parse(ModelConfig, {"text": scratch, "video": video, "sampling": {"frames": 2}})
    rows = load_graded(config.data), load_graded(config.test_data)
    inputs = StageInputs(
        output_dir=str(tmp_path / "sft"),
        model=composed,
        parts=[ClipRows(config.data, rows[0]), ClipRows(config.data, rows[1])],
        texts=["How?"],
        decode=config.decode,
        store=config.store,
    )
    assert run_encode(inputs).new == 16
    encoded = Encoded(monkeypatch)
    final = run_reward_model(config)
    assert not encoded.clips
    moved = tmp_path / "moved"
    encoder.rename(moved)
    items = [item_of(row) for row in load_graded(config.test_data)][:2]
    with pytest.raises(ConfigError, match="vit"):
        LocalJudge(LocalJudgeConfig(model=str(final), use_cpu=True))
    there: dict[Modality, str] = {"video": str(moved)}
    judge = LocalJudge(LocalJudgeConfig(model=str(final), use_cpu=True, encoders=there))
    assert None not in judge.grade(items)
    assert not encoded.clips
