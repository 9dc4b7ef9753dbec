"""Each native backbone is one row: its class loads, names its encoders and saves as released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.models import saved
from mmemo.models.adapters import lora
from mmemo.models.backbones import BACKBONES, ENCODER_NAMES
from mmemo.models.build import load_model
from mmemo.models.config import ModelConfig
from mmemo.models.qwen.vl import NativeVL
from tests.models.native_files import FED, save_omni, save_vl


@pytest.mark.parametrize(("kind", "save"), [("omni", save_omni), ("vl", save_vl)])
def test_a_native_model_saves_as_the_released_class(kind: str, save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / kind)
    loaded = load_model(parse(ModelConfig, {"path": str(folder), "native": FED}))
    model: Any = loaded.model
    assert type(model) in BACKBONES.values()
    for name in type(model).encoder_names:
        assert name in ENCODER_NAMES
        assert not any(p.requires_grad for p in getattr(model.model, name).parameters())
    lora.save_model(model, loaded.processor, tmp_path / "again")
    before, after = (
        json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "again")
    )
    assert after["architectures"] == before["architectures"]


def test_a_new_backbone_is_one_class_and_one_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Mine(NativeVL):
        """A user's own."""

    monkeypatch.setattr(saved, "BACKBONES", {**BACKBONES, "qwen2_5_vl": Mine})
    folder = save_vl(tmp_path / "vl")
    loaded = load_model(parse(ModelConfig, {"path": str(folder), "native": FED}))
    assert isinstance(loaded.model, Mine)
    assert Mine.released_class().__name__ == "Qwen2_5_VLForConditionalGeneration"
