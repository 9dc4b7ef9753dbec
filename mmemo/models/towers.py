"""Loading a branch's frozen encoder and measuring what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmemo.config import dump, parse
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.media.config import SamplingConfig
from mmemo.models import encoders
from mmemo.models.config import BranchConfig
from mmemo.models.configuration import BranchSettings, BranchSpec

_UNUSED = ("pooler", "masked_spec_embed", "mask_token", "head.", "classifier", "decoder")
"""Weights that a checkpoint may lack: features never pass through them."""


@dataclass(frozen=True, slots=True)
class Tower:
    """A frozen encoder and the branch settings completed with what it gives."""

    model: PreTrainedModel
    spec: BranchSpec


def load_tower(
    modality: Modality, branch: BranchConfig, sampling: SamplingConfig, dtype: torch.dtype
) -> Tower:
    """Load or make the encoder of a branch, frozen, and encode a test clip to measure it.

    Raises:
        ConfigError: it cannot be loaded, lacks weights, or does not fit the branch's settings.
    """
    if branch.encoder is None:
        values = dict(branch.encoder_config or {})
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model: Any = encoders.build_tower(config)
        preprocessor = dict(branch.preprocessor or {})
    else:
        model = _pretrained(modality, branch.encoder)
        preprocessor = dict(branch.preprocessor or _preprocessor(modality, branch.encoder))
    for key in ("processor_class", "_name_or_path", "_processor_class"):
        preprocessor.pop(key, None)
    model = model.to(dtype).eval().requires_grad_(False)
    settings = {key: getattr(branch, key) for key in BranchSettings.model_fields}
    spec = parse(BranchSpec, {**settings, "preprocessor": preprocessor, "feature_size": 1})
    x = encoders.encode(model, spec, modality, _test_clip(sampling))["x"]
    measured = {"feature_size": x.shape[-1], "feature_layers": x.shape[0] if x.ndim == 3 else 0}
    return Tower(model, parse(BranchSpec, {**dump(spec), **measured}))


def _pretrained(modality: Modality, name: str) -> PreTrainedModel:
    """An encoder from a hub id or folder, whole: a missing weight is an error, not noise."""
    try:
        config = _encoder_config(modality, AutoConfig.from_pretrained(name))
        kind: Any = AutoModel
        if config.model_type == "whisper" and "WhisperEncoder" in (config.architectures or []):
            kind = WhisperEncoder
        model, info = kind.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{modality}.encoder: '{name}' cannot be loaded "
            f"({str(error).strip().splitlines()[0]}); check the name or the folder"
        ) from error
    missing = [key for key in info["missing_keys"] if not any(part in key for part in _UNUSED)]
    if missing:
        raise ConfigError(
            f"{modality}.encoder: '{name}' lacks the weights of {sorted(missing)[0]} "
            f"({len(missing)} in all); it is not a whole checkpoint of its kind"
        )
    return model.get_encoder() if type(model).__name__ == "WhisperModel" else model


def _encoder_config(modality: Modality, config: PreTrainedConfig) -> PreTrainedConfig:
    """The sub config of the encoder wanted, for models such as CLIP that hold two."""
    name = "audio_config" if modality == "audio" else "vision_config"
    found = getattr(config, name, None)
    return found if isinstance(found, PreTrainedConfig) else config


def _preprocessor(modality: Modality, name: str) -> dict[str, Any]:
    """The encoder's own preprocessor config."""
    read: Callable[[str], tuple[dict[str, Any], Any]] = (
        FeatureExtractionMixin.get_feature_extractor_dict
        if modality == "audio"
        else ImageProcessingMixin.get_image_processor_dict
    )
    try:
        return read(name)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{modality}.encoder: '{name}' has no preprocessor_config.json; give "
            f"{modality}.preprocessor"
        ) from error


def _test_clip(sampling: SamplingConfig) -> DecodedClip:
    """A second of noise and grey frames."""
    noise = np.random.default_rng(0).standard_normal(sampling.sample_rate).astype(np.float32)
    frames = np.full((1, 64, 64, 3), 127, dtype=np.uint8)
    side = sampling.face.size
    return DecodedClip(
        name="test clip",
        digest="",
        duration=1.0,
        frames=frames,
        times=np.zeros(1),
        waveform=0.1 * noise,
        sample_rate=sampling.sample_rate,
        faces=FaceTrack(
            crops=np.full((1, side, side, 3), 127, dtype=np.uint8),
            found=np.ones(1, dtype=np.bool_),
            scores=np.ones(1, dtype=np.float32),
            detector="none",
        ),
    )
