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


def test_encoders_are_trained_saved_and_not_trained_again(world: Path) -> None:
    out = run_encoders(config(world, *SHORT))
    weights = {name: out / name / "model.safetensors" for name in ("face", "video", "audio")}
    before = {name: path.read_bytes() for name, path in weights.items()}
    for name in ("face", "video"):
        model = AutoModel.from_pretrained(out / name)
        assert model(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape[:2] == (1, 128)
    run_encoders(config(world, *SHORT))
    assert {name: path.read_bytes() for name, path in weights.items()} == before


def test_an_encoder_whose_config_changed_is_trained_again(world: Path) -> None:
    out = f"--output_dir={world}/changed"
    folder = run_encoders(config(world, *SHORT, out))
    weights = {name: folder / name / "model.safetensors" for name in ("face", "video", "audio")}
    before = {name: path.read_bytes() for name, path in weights.items()}
    run_encoders(config(world, *SHORT, out, "--encoders.face.max_steps=4"))
    after = {name: path.read_bytes() for name, path in weights.items()}
    assert {name for name in before if before[name] != after[name]} == {"face"}


def test_the_same_seed_gives_the_same_bytes(world: Path) -> None:
    outs = [
        run_encoders(config(world, *SHORT, f"--output_dir={world}/{name}")) for name in ("a", "b")
    ]
    first, second = ((out / "audio/model.safetensors").read_bytes() for out in outs)
    assert first == second


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
    out = run_encoders(config(tmp_path, *SHORT, "--decode.max_bad_share=0.5"))
    noted = {e["path"]: e["reason"] for e in RunRecord(out).events("bad_clip")}
    assert noted == {bad[0]: "not_media", bad[1]: "missing"}


def test_a_sound_that_the_extractor_would_cut_is_named() -> None:
    """Its attributes are those of the whole sound."""
    encoder = EncoderTrainConfig(architecture={"model_type": "whisper"}, preprocessor=MEL)
    assert prepare(clip(0, 30.0), "audio", encoder).shape == (16, 3000)
    with pytest.raises(DataError, match="has 31 s of sound and the encoder takes 30 s"):
        prepare(clip(0, 31.0), "audio", encoder)
