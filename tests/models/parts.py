"""Tiny models and clips that the model tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmemo.config import parse
from mmemo.data.sample import Turn
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.models.backbone import Features
from mmemo.models.build import Loaded, ModelConfig, load_model

IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MEL = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 16,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
}
TEXTS = [
    "Which emotion does the person show?",
    "<think>The brows are low and the voice is loud.</think><answer>angry</answer>",
    "<think>The lip corners rise.</think><answer>happy</answer>",
    "How loud is the voice? quiet calm neutral sad surprised",
]


def values(**changes: Any) -> dict[str, Any]:
    """Plain values of a tiny model with every branch and attention pre-fusion."""
    found: dict[str, Any] = {
        "text": {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 400}},
        "video": {"encoder_config": VIT, "preprocessor": IMAGES, "tokens": 2},
        "audio": {
            "encoder_config": WHISPER,
            "preprocessor": MEL,
            "tokens": 3,
            "stride": 5,
            "layer": "mix",
        },
        "face": {
            "encoder_config": VIT,
            "preprocessor": IMAGES,
            "tokens": 1,
            "pooling": "attention",
        },
        "fusion": {"kind": "attention"},
        "sampling": {"frames": 4, "face": {"detector": "none", "size": 32}},
    }
    found.update(changes)
    return {key: value for key, value in found.items() if value is not None}


def tiny(base_dir: Path | None = None, **changes: Any) -> Loaded:
    """A tiny model with random weights."""
    return load_model(parse(ModelConfig, values(**changes)), TEXTS, base_dir)


def clip(seed: int, seconds: float = 1.0, frames: int = 4) -> DecodedClip:
    """A clip of noise with every stream."""
    rng = np.random.default_rng(seed)

    def pixels(side: int) -> Any:
        return rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)

    return DecodedClip(
        name=f"{seed}.mp4",
        digest=f"{seed:064d}",
        duration=seconds,
        frames=pixels(48),
        times=np.arange(frames) / 4.0,
        waveform=(0.1 * rng.standard_normal(int(16000 * seconds))).astype(np.float32),
        faces=FaceTrack(
            crops=pixels(32),
            found=np.array([True] * (frames - 1) + [False]),
            scores=np.ones(frames, dtype=np.float32),
            detector="none",
        ),
    )


def features(loaded: Loaded, one: DecodedClip) -> dict[str, Features]:
    """Every modality of one clip, encoded."""
    model: Any = loaded.model
    return {name: model.encode(name, [one])[0] for name in loaded.processor.modalities}


def turns(question: str, answer: str | None = None) -> list[Turn]:
    found = [Turn("user", question)]
    return found if answer is None else [*found, Turn("assistant", answer)]


def shake(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Give every trainable weight a value, so that nothing is zero by its initialisation."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
