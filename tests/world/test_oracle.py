"""The world needs both channels: one alone falls far behind, words and scene say nearly nothing."""

from __future__ import annotations

import pytest

from mmemo.config import load_config, parse
from mmemo.content import find
from mmemo.world.config import WorldConfig
from mmemo.world.oracle import solve

QUICKSTART = "train_configs/quickstart/world.yaml"


def config_of(name: str) -> WorldConfig:
    """The default world, or that of a config file."""
    if name == "default":
        return WorldConfig(output_dir="unused")
    return load_config(WorldConfig, find(name), variables={"seed": "0"})


@pytest.fixture(scope="module")
def default() -> dict[str, float]:
    return solve(config_of("default"))


@pytest.fixture(scope="module", params=["default", QUICKSTART])
def scores(request: pytest.FixtureRequest, default: dict[str, float]) -> dict[str, float]:
    return default if request.param == "default" else solve(config_of(request.param))


def test_two_channels_solve_what_one_cannot(scores: dict[str, float]) -> None:
    assert scores["both"] > 0.9
    assert scores["face"] < scores["both"] - 0.2
    assert scores["voice"] < scores["both"] - 0.2
    for subset in ("video_aligned", "audio_aligned", "consistent"):
        assert scores[f"both/{subset}"] > 0.85


def test_single_channels_lose_where_the_other_decides(scores: dict[str, float]) -> None:
    assert scores["face/audio_aligned"] < 0.2
    assert scores["voice/video_aligned"] < 0.2


def test_words_and_scene_are_near_chance(scores: dict[str, float]) -> None:
    assert scores["majority"] < 0.25
    assert scores["text"] < 0.35
    assert scores["scene"] < 0.30


def test_scene_misleads_only_when_asked_to() -> None:
    tied = parse(WorldConfig, {"output_dir": "x", "bias": {"scene_correlation": 0.9}})
    assert solve(tied)["scene"] < 0.30  # learned in training, worthless in test


def test_difficulty_is_a_dial(default: dict[str, float]) -> None:
    hard = parse(
        WorldConfig,
        {
            "output_dir": "x",
            "difficulty": {"ambiguity": 1.0, "cue_spread": 0.45, "strength_gap": 0.02},
        },
    )
    assert solve(hard)["both"] < default["both"] - 0.08
    assert solve(WorldConfig(output_dir="x"), blur=0.15)["both"] < default["both"] - 0.05
