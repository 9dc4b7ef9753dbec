"""Towers learn attributes from real clips and become ordinary encoder folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from mmemo.config import apply_overrides, load_config, parse, read_yaml
from mmemo.errors import ConfigError, DataError
from mmemo.run_log import RunRecord
from mmemo.train.encoders import EncodersConfig, EncoderTrainConfig, run_encoders
from mmemo.train.encoders import _prepare as prepare  # pyright: ignore[reportPrivateUsage]
from mmemo.world.config import WorldConfig
from mmemo.world.render import run_world
from tests.models.parts import MEL, clip

QUICKSTART = Path("train_configs/quickstart/encoders.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    size = {"train_clips": 8, "val_clips": 6, "test_clips": 6, "train_speakers": 4}
    size |= {"val_speakers": 2, "test_speakers": 2}
    config = parse(WorldConfig, {"output_dir": str(root / "world"), "size": size})
    run_world(config)
    return root


def config(root: Path, *overrides: str) -> EncodersConfig:
    return load_config(EncodersConfig, QUICKSTART, overrides, {"run": str(root), "seed": "0"})


SHORT = [f"--encoders.{name}.max_steps=3" for name in ("face", "video", "audio")]


def config_of_audio(root: Path, *overrides: str) -> EncodersConfig:
    """The audio encoder alone, which is the cheapest to train."""
    values = read_yaml(QUICKSTART, {"run": str(root), "seed": "0"})
    values["encoders"] = {"audio": values["encoders"]["audio"]}
    return parse(EncodersConfig, apply_overrides(values, [SHORT[-1], *overrides]))


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    return run_encoders(config(world, *SHORT))


def weights_of(folder: Path) -> dict[str, bytes]:
    names = ("face", "video", "audio")
    return {name: (folder / name / "model.safetensors").read_bytes() for name in names}


def test_encoders_are_trained_saved_and_not_trained_again(world: Path, trained: Path) -> None:
    before = weights_of(trained)
    for name in ("face", "video"):
        model = AutoModel.from_pretrained(trained / name)
        assert model(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape[:2] == (1, 128)
    assert run_encoders(config(world, *SHORT)) == trained
    assert weights_of(trained) == before


def test_an_encoder_whose_config_changed_is_trained_again(world: Path, trained: Path) -> None:
    folder = shutil.copytree(trained, world / "changed")
    before = weights_of(folder)
    changed = [f"--output_dir={folder}", "--encoders.audio.max_steps=4"]
    assert run_encoders(config(world, *SHORT, *changed)) == folder
    after = weights_of(folder)
    assert {name for name in before if before[name] != after[name]} == {"audio"}


def test_the_same_seed_gives_the_same_bytes(world: Path, trained: Path) -> None:
    """Also where the encoder is trained alone."""
    again = run_encoders(config_of_audio(world, f"--output_dir={world}/again"))
    assert (again / "audio/model.safetensors").read_bytes() == weights_of(trained)["audio"]


def test_missing_attributes_and_unknown_types_are_named(world: Path) -> None:
    values = read_yaml(QUICKSTART, {"run": str(world), "seed": "0"})
    values["encoders"] = {"audio": values["encoders"]["audio"]}
    values["output_dir"] = str(world / "c")
    wrong = apply_overrides(values, ["--encoders.audio.architecture.model_type=whispr"])
    with pytest.raises(ConfigError, match="whispr"):
        run_encoders(parse(EncodersConfig, wrong))
    bare = world / "bare.jsonl"
    rows = (world / "world/manifests/train_emotion.jsonl").read_text().splitlines()[:2]
    bare.write_text("\n".join(row.replace('"attributes"', '"attributos"') for row in rows))
    values = apply_overrides(values, [f"--data.manifests=[{bare}]", "--data.columns=[attributos]"])
    with pytest.raises(DataError, match="no row has attributes"):
        run_encoders(parse(EncodersConfig, values))


def test_a_bad_clip_is_left_out_and_noted(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "world", tmp_path / "world")
    lines = (tmp_path / "world/manifests/train_emotion.jsonl").read_text().splitlines()
    bad = [json.loads(line)["videos"][0] for line in lines[:2]]
    (tmp_path / "world" / bad[0]).write_bytes(b"<html>not found</html>")
    (tmp_path / "world" / bad[1]).unlink()
    out = run_encoders(config_of_audio(tmp_path, "--decode.max_bad_share=0.5"))
    noted = {e["path"]: e["reason"] for e in RunRecord(out).events("bad_clip")}
    assert noted == {bad[0]: "not_media", bad[1]: "missing"}


def test_a_sound_that_the_extractor_would_cut_is_named() -> None:
    """Its attributes are those of the whole sound."""
    encoder = EncoderTrainConfig(architecture={"model_type": "whisper"}, preprocessor=MEL)
    assert prepare(clip(0, 30.0), "audio", encoder).shape == (16, 3000)
    with pytest.raises(DataError, match="has 31 s of sound and the encoder takes 30 s"):
        prepare(clip(0, 31.0), "audio", encoder)
