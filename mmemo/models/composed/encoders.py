"""The frozen encoder of a branch: made or loaded, run on one clip, and identified.

Any image, video or audio encoder of transformers that ``AutoModel`` builds will do:

- :mod:`~mmemo.models.composed.preprocessors` builds the encoder's own image processor or feature
  extractor;
- :mod:`~mmemo.models.composed.image_encoders` turns frames into features, and says what a video
  encoder needs;
- :mod:`~mmemo.models.composed.audio_encoders` turns sound into features, and says how long a sound
  each encoder can take.

An encoder that transformers does not ship is registered with ``AutoConfig`` and ``AutoModel``, as
:mod:`~mmemo.models.composed.face_expression` does.

Shapes: T feature steps, D the encoder's width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.hub import cached_file

from mmemo.config import dump, parse
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError, MediaError
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import Features
from mmemo.models.composed.audio_encoders import encode_sound
from mmemo.models.composed.configuration import BranchBaseConfig, SavedBranchConfig
from mmemo.models.composed.image_encoders import check_frames, encode_frames, video_window
from mmemo.models.composed.preprocessors import (
    load_feature_extractor,
    load_image_processor,
    reason,
    resolved_settings,
)
from mmemo.models.config import BranchConfig

ENCODE_VERSION = 3
"""Part of every fingerprint. Raise it when an encoder's features become other numbers than before.

3: AST hears a whole sound, in steps of time averaged over frequency; it heard the first 10 s, and
its patches and class tokens were taken for steps. Settings that
a preprocessor's file leaves out are its class's own, where they were the most usual ones.
"""

_UNUSED = (
    *("pooler", "masked_spec_embed", "mask_token", "head.", "classifier", "decoder", "predictor"),
)
"""Weights that a checkpoint may lack: features never pass through them."""


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """A frozen encoder and the branch settings completed with what it gives."""

    model: PreTrainedModel
    spec: SavedBranchConfig


def load_encoder(
    modality: Modality, branch: BranchConfig, sampling: SamplingConfig, dtype: torch.dtype
) -> LoadedEncoder:
    """Load or make the encoder of a branch, frozen, and encode a test clip to measure it.

    Raises:
        ConfigError: it cannot be loaded, lacks weights, or does not fit the branch's settings.
    """
    if branch.encoder is None:
        values = dict(branch.encoder_config or {})
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model: Any = build_encoder(config)
        preprocessor = dict(branch.preprocessor or {})
    else:
        model = _pretrained(modality, branch.encoder)
        preprocessor = dict(branch.preprocessor or _preprocessor(modality, branch.encoder))
    for key in ("processor_class", "_name_or_path", "_processor_class"):
        preprocessor.pop(key, None)
    model = model.to(dtype).eval().requires_grad_(False)
    settings = {key: getattr(branch, key) for key in BranchBaseConfig.model_fields}
    # The size is required by the config but known only once the test clip is encoded.
    spec = parse(SavedBranchConfig, {**settings, "preprocessor": preprocessor, "feature_size": 1})
    if modality != "audio":
        check_frames(model, sampling.frames, modality)
    try:
        x = encode(model, spec, modality, _test_clip(sampling, model))["x"]
    except _MISUSE as error:
        raise ConfigError(
            f"{modality}.encoder: '{model.config.model_type}' cannot encode a test clip "
            f"({reason(error)}); use another encoder, or a preprocessor that fits it"
        ) from error
    measured = {"feature_size": x.shape[-1], "feature_layers": x.shape[0] if x.ndim == 3 else 0}
    return LoadedEncoder(model, parse(SavedBranchConfig, {**dump(spec), **measured}))


_MISUSE = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError)


def build_encoder(config: Any) -> PreTrainedModel:
    """The encoder that a config describes, with random weights; of an encoder-decoder its encoder.

    Raises:
        ConfigError: transformers has no model for the config, or a package is missing.
    """
    if config.model_type == "whisper":
        return WhisperEncoder(config)
    kind = _model_class(config)
    try:
        model = kind.from_config(config) if kind is AutoModel else kind(config)
    except ImportError as error:
        raise ConfigError(f"encoder '{config.model_type}' {_lacks_packages(error)}") from error
    return model.get_encoder() if config.is_encoder_decoder else model


def _model_class(config: PreTrainedConfig) -> Any:
    """AutoModel, or the class named like the config where AutoModel knows only the whole model, as
    for CLAP's audio half.

    Raises:
        ConfigError: there is neither.
    """
    if type(config) in MODEL_MAPPING:
        return AutoModel
    name = type(config).__name__.removesuffix("Config") + "Model"
    found = getattr(transformers, name, None)
    if found is None:
        raise ConfigError(
            f"encoder '{config.model_type}' has no model class in transformers; use an encoder "
            "that AutoModel loads"
        )
    return found


def _lacks_packages(error: ImportError) -> str:
    """Why an encoder cannot be made, and what to do. timm itself needs torchvision."""
    packages = "timm torchvision" if "timm" in str(error) else "the packages that it names"
    return (
        f"needs packages that cannot be imported ({reason(error)}); pip install {packages}, or use "
        "an encoder that transformers implements itself"
    )


def encode(
    encoder: PreTrainedModel, spec: SavedBranchConfig, modality: Modality, clip: DecodedClip
) -> Features:
    """Features of one clip: ``x`` (T, D), or (layers, T, D) for a learned mix, on the CPU.

    The bits do not depend on what else is encoded. T is F k k for images (frame by frame, row by
    row), the same for each step of time of a video encoder, and the encoder's steps divided by
    ``stride`` for audio. ``face`` features also hold ``found`` (1,) float32, the share of frames
    with a face.

    Raises:
        MediaError: the clip has no such stream.
    """
    dtype = getattr(torch, spec.dtype)
    # A surrounding autocast would change the features without changing their fingerprint.
    with torch.inference_mode(), torch.autocast(encoder.device.type, enabled=False):
        x = _encode(encoder, spec, modality, clip)
        if not bool(torch.isfinite(x).all()):
            raise MediaError(clip.name, "decode", f"the {modality} encoder gave non-finite values")
    features: Features = {"x": x.to("cpu", dtype).contiguous().clone()}
    if modality == "face" and clip.faces is not None:
        features["found"] = torch.tensor([float(np.mean(clip.faces.found))])
    return features


def _encode(
    encoder: PreTrainedModel, spec: SavedBranchConfig, modality: Modality, clip: DecodedClip
) -> Tensor:
    if modality == "audio":
        if clip.waveform is None or len(clip.waveform) == 0:
            raise MediaError(clip.name, "no_audio", "there is no waveform to encode")
        return encode_sound(encoder, spec, clip.waveform, clip.sample_rate)
    frames = clip.faces.crops if modality == "face" and clip.faces else clip.frames
    if frames is None or len(frames) == 0 or (modality == "face" and clip.faces is None):
        kind = "no_video" if modality == "video" else "no_frames"
        raise MediaError(clip.name, kind, f"there are no {modality} frames to encode")
    return encode_frames(encoder, spec, frames)


def fingerprint(encoder: PreTrainedModel, spec: SavedBranchConfig, modality: Modality) -> str:
    """SHA-256 of all that makes this encoder's features what they are, apart from the clip."""
    load = load_feature_extractor if modality == "audio" else load_image_processor
    # Settings that act on stored features later, such as tokens and pooling, are left out, so that
    # changing them does not encode every clip again.
    identity = {
        "version": ENCODE_VERSION,
        "config": stable_config(encoder),
        "preprocessor": spec.preprocessor,
        # A file leaves out what is its class's default, and a default may change with transformers.
        "processor": resolved_settings(load(spec.preprocessor, encoder.config.model_type)),
        "layer": spec.layer,
        "spatial_tokens": spec.spatial_tokens,
        "stride": spec.stride,
        "dtype": spec.dtype,
        "weights": hash_weights(encoder),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def stable_config(encoder: PreTrainedModel) -> dict[str, Any]:
    """An encoder's config without what saving and loading change."""
    config = encoder.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(volatile, None)
    return config


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's tensors, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        # The tensor is viewed as bytes, because NumPy has no bfloat16.
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pretrained(modality: Modality, name: str) -> PreTrainedModel:
    """An encoder from a hub id or folder, whole: a missing weight is an error, not noise."""
    try:
        whole = AutoConfig.from_pretrained(name)
        config = _encoder_config(modality, whole)
        kind: Any = _model_class(config)
        if config.model_type == "whisper" and "WhisperEncoder" in (config.architectures or []):
            kind = WhisperEncoder
        # Only AutoModel finds its part in the checkpoint of a whole model.
        half = config is not whole and kind is not AutoModel
        model, info = (AutoModel if half else kind).from_pretrained(
            name, config=whole if half else config, dtype=torch.float32, output_loading_info=True
        )
        if half:
            model = getattr(model, "audio_model" if modality == "audio" else "vision_model")
    except ImportError as error:
        raise ConfigError(f"{modality}.encoder: '{name}' {_lacks_packages(error)}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{modality}.encoder: '{name}' cannot be loaded ({reason(error)}); check the name or "
            "the folder"
        ) from error
    missing = [key for key in info["missing_keys"] if not any(part in key for part in _UNUSED)]
    if missing:
        raise ConfigError(
            f"{modality}.encoder: '{name}' lacks the weights of {sorted(missing)[0]} "
            f"({len(missing)} in all); it is not a whole checkpoint of its kind"
        )
    is_whole = config.is_encoder_decoder and kind is not WhisperEncoder
    return model.get_encoder() if is_whole else model


def _encoder_config(modality: Modality, config: PreTrainedConfig) -> PreTrainedConfig:
    """The sub config of the encoder wanted, for models such as CLIP that hold two."""
    name = "audio_config" if modality == "audio" else "vision_config"
    found = getattr(config, name, None)
    return found if isinstance(found, PreTrainedConfig) else config


def _preprocessor(modality: Modality, name: str) -> dict[str, Any]:
    """The encoder's own preprocessor config."""
    try:
        if modality == "audio":
            return FeatureExtractionMixin.get_feature_extractor_dict(name)[0]
        try:
            return ImageProcessingMixin.get_image_processor_dict(name)[0]
        except OSError:
            # Video encoders may come with a video processor alone.
            file = cached_file(name, "video_preprocessor_config.json")
            return json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{modality}.encoder: '{name}' has no preprocessor_config.json; give "
            f"{modality}.preprocessor"
        ) from error


def _test_clip(sampling: SamplingConfig, encoder: PreTrainedModel) -> DecodedClip:
    """A second of noise and grey frames: one, or for a video encoder as many as are sampled."""
    noise = np.random.default_rng(0).standard_normal(sampling.sample_rate).astype(np.float32)
    count = 1 if video_window(encoder) is None else sampling.frames
    side = sampling.face.size
    return DecodedClip(
        name="test clip",
        digest="",
        duration=1.0,
        frames=np.full((count, 64, 64, 3), 127, dtype=np.uint8),
        times=np.zeros(count),
        waveform=0.1 * noise,
        sample_rate=sampling.sample_rate,
        faces=FaceTrack(
            crops=np.full((count, side, side, 3), 127, dtype=np.uint8),
            found=np.ones(count, dtype=np.bool_),
            scores=np.ones(count, dtype=np.float32),
            detector="none",
        ),
    )
