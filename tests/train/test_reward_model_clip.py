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
from numpy.typing import NDArray

from mmemo.config import parse
from mmemo.errors import ConfigError, DataError
from mmemo.media.clip import DecodedClip
from mmemo.rewards.judge.calibration import refusal
from mmemo.rewards.judge.clip_features import ClipEncoders
from mmemo.rewards.judge.open import open_judge
from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig
from mmemo.rewards.judge.rubric import DIMENSIONS, JudgeItem, clip_media
from mmemo.train.reward_model import (
    RewardModelConfig,
    build_scorer,
    check_reward_model,
    item_of,
    load_graded,
    run_reward_model,
)
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


def painted(colour: str) -> Callable[[int, tuple[int, int]], NDArray[np.uint8]]:
    def draw(_: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        return np.full((size[1], size[0], 3), COLOURS[colour], dtype=np.uint8)

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
        write_clip(folder / clip, seconds=0.5, size=(32, 32), audio=False, draw=painted(colour))
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
        "train": {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
        "run": {"use_cpu": True, "save_steps": 60, "logging_steps": 20, "threads": 1},
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
    print(swapped, found["constant"], encoded)
    assert swapped["own"] > 4
    assert swapped["other"] < 2
    assert swapped["drop"]["low"] > 1
    assert found["constant"]["reward"] < 0.5
    assert refusal(found) is None
    assert found["unscored"] == 0
    # Each clip was encoded once, although it has four answers and is read in each epoch.
    assert set(encoded.values()) == {1}
    assert len(encoded) == 16
