"""Exported adapters and merged weights load in a fresh process and answer the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo import checkpoint
from mmemo.errors import CheckpointError, ConfigError
from mmemo.export import ExportConfig, export_run, run_export
from mmemo.models.adapters import save_model
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.models.parts import shake, tiny

ASK = """
import json, sys, torch
from mmemo.data.sample import Turn
from mmemo.models.adapters import unwrap
from mmemo.models.build import ModelConfig, load_model
loaded = load_model(ModelConfig(path=sys.argv[1]))
loaded.model.eval()
row = loaded.processor.render([Turn("user", "which emotion is in the face?")], generation=True,
                              modalities=())
with torch.no_grad():
    logits = unwrap(loaded.model)(input_ids=torch.tensor([row.input_ids]),
                                  modality_ids=torch.tensor([row.modality_ids])).logits
print(json.dumps(logits[0, -1].tolist()))
"""


def answers(folder: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def trained(folder: Path, **changes: Any) -> Loaded:
    """A run folder whose model has moved away from its initialisation."""
    loaded = tiny(folder / "base", **changes)
    shake(loaded.model, 0.05)

    def write(staged: Path) -> None:
        save_model(loaded.model, loaded.processor, staged, base=loaded.base)

    checkpoint.save(folder / "final", write)
    return loaded


def test_adapter_and_merged_answer_as_the_run_does(tmp_path: Path) -> None:
    trained(tmp_path / "run", lora={"r": 4, "lora_alpha": 8})
    export_run(tmp_path / "run", adapter=tmp_path / "a/b/adapter", merged=tmp_path / "merged")
    ours = torch.tensor(answers(tmp_path / "run/final"))
    base = torch.tensor(answers(tmp_path / "run/base"))
    assert not torch.allclose(ours, base, atol=1e-3)
    torch.testing.assert_close(torch.tensor(answers(tmp_path / "a/b/adapter")), ours)
    merged = torch.tensor(answers(tmp_path / "merged"))
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "merged/README.md").read_text()
    assert "| audio | whisper" in card
    assert "frames:" in card


def test_a_whole_model_has_no_adapter_to_export(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="use --merged"):
        export_run(tmp_path / "run", adapter=tmp_path / "adapter")
    run_export(ExportConfig(output_dir=str(tmp_path / "e"), source=str(tmp_path / "run")))
    load_model(ModelConfig(path=str(tmp_path / "e/merged")))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter DIR"):
        export_run(tmp_path)
    with pytest.raises(ConfigError, match="mmemo sft"):
        export_run(tmp_path, merged=tmp_path / "m")
    trained(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds other files"):
        export_run(tmp_path / "run", merged=tmp_path / "mine")
    weights = tmp_path / "run/final/model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_run(tmp_path / "run", merged=tmp_path / "m")
