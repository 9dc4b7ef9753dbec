"""Tiny checkpoints of real architectures, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from mmemo.config import parse
from mmemo.media.config import SamplingConfig
from mmemo.models.composed.encoders import LoadedEncoder, build_encoder, load_encoder
from mmemo.models.config import BranchConfig

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save_encoder(
    folder: Path,
    config: dict[str, Any],
    preprocessor: dict[str, Any],
    file: str = "preprocessor_config.json",
) -> Path:
    """A folder with random weights of ``config`` and the preprocessor's file."""
    torch.manual_seed(1)
    made = AutoConfig.for_model(**config)
    try:
        model: Any = AutoModel.from_config(made)
    except ValueError:  # such as CLAP's audio half by itself
        model = build_encoder(made)
    model.save_pretrained(folder)
    (folder / file).write_text(json.dumps(preprocessor))
    return folder


def load_folder(modality: str, folder: Path, frames: int = 4, **values: Any) -> LoadedEncoder:
    """The folder as a branch's encoder."""
    rate = values.pop("sample_rate", 16000)
    branch = parse(BranchConfig, {"encoder": str(folder), **values})
    sampling = SamplingConfig(frames=frames, sample_rate=rate)
    return load_encoder(modality, branch, sampling, torch.float32)  # type: ignore[arg-type]
