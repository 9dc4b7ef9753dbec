"""Frozen encoders: one decoded clip in, features out, the same bits whatever the batch.

Shapes: F frames, S audio samples, T feature steps, P patches of a frame, h x w their grid, D the
encoder's width, k side of the pooled grid, M mel bins.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
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
from mmemo.errors import ConfigError, MediaError
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.media.config import SamplingConfig
from mmemo.media.image import ImageSpec, to_pixels
from mmemo.models.backbone import Features
from mmemo.models.composed.configuration import BranchBaseConfig, SavedBranchConfig
from mmemo.models.config import BranchConfig

ENCODE_VERSION = 2
"""Part of every fingerprint. Raise it when this file computes something else than before."""

MIN_AUDIO_SECONDS = 0.1
"""Shorter waveforms are padded with silence to this: encoders need a window to look through."""


def build_encoder(config: Any) -> PreTrainedModel:
    """The encoder that a config describes, with random weights. Whisper without its decoder."""
    if config.model_type == "whisper":
        return WhisperEncoder(config)
    return AutoModel.from_config(config)


def encode(
    tower: PreTrainedModel, spec: SavedBranchConfig, modality: Modality, clip: DecodedClip
) -> Features:
    """Features of one clip: ``x`` (T, D), or (layers, T, D) for a learned mix, on the CPU.

    T is F k k for images (frame by frame, row by row), and the encoder's steps divided by
    ``stride`` for audio. ``face`` features also hold ``found`` (1,) float32, the share of frames
    with a face.

    Raises:
        MediaError: the clip has no such stream.
    """
    dtype = getattr(torch, spec.dtype)
    # A surrounding autocast would change the features without changing their fingerprint.
    with torch.inference_mode(), torch.autocast(tower.device.type, enabled=False):
        if modality == "audio":
            x = _encode_audio(tower, spec, clip)
        else:
            frames = clip.faces.crops if modality == "face" and clip.faces else clip.frames
            if frames is None or len(frames) == 0 or (modality == "face" and clip.faces is None):
                kind = "no_video" if modality == "video" else "no_frames"
                raise MediaError(clip.name, kind, f"there are no {modality} frames to encode")
            x = _encode_frames(tower, spec, frames)
        if not bool(torch.isfinite(x).all()):
            raise MediaError(clip.name, "decode", f"the {modality} encoder gave non-finite values")
    found: Features = {"x": x.to("cpu", dtype).contiguous().clone()}
    if modality == "face" and clip.faces is not None:
        found["found"] = torch.tensor([float(np.mean(clip.faces.found))])
    return found


def _encode_frames(
    tower: PreTrainedModel, spec: SavedBranchConfig, frames: NDArray[np.uint8]
) -> Tensor:
    """(F, H, W, 3) uint8 -> ([layers,] F k k, D)."""
    pixels = to_pixels(frames, ImageSpec.from_hf(spec.preprocessor))
    inputs = torch.from_numpy(pixels).to(tower.device, tower.dtype)
    kwargs: dict[str, Any] = {}
    if _resizes(tower, inputs):
        kwargs["interpolate_pos_encoding"] = True
    keep = spec.layer != -1
    outputs = tower(inputs, output_hidden_states=keep, return_dict=True, **kwargs)
    chosen = _choose(outputs, spec)
    pooled = [_pool_grid(state, spec, tower.config, inputs.shape[-2:]) for state in chosen]
    return _stack(pooled, spec)


def _resizes(tower: PreTrainedModel, pixels: Tensor) -> bool:
    """Whether the tower must be told to interpolate its position embeddings."""
    if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        return False
    size: Any = getattr(tower.config, "image_size", None)
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    return bool(pair) and pair != tuple(pixels.shape[-2:])


def _choose(outputs: Any, spec: BranchBaseConfig) -> list[Tensor]:
    """The hidden states that ``layer`` names."""
    if spec.layer == -1:
        return [outputs.last_hidden_state]
    states = outputs.hidden_states
    wanted = list(range(len(states))) if spec.layer == "mix" else spec.layer
    wanted = [wanted] if isinstance(wanted, int) else wanted
    beyond = [index for index in wanted if not -len(states) <= index < len(states)]
    if beyond or not wanted:
        raise ConfigError(
            f"layer {spec.layer}: the encoder has hidden states 0 to {len(states) - 1}"
        )
    # The last hidden state of many encoders lacks their final norm; -1 means what comes out.
    return [outputs.last_hidden_state if index == -1 else states[index] for index in wanted]


def _stack(states: list[Tensor], spec: BranchBaseConfig) -> Tensor:
    """Flatten each state to (T, D); stack them when the connector is to mix them."""
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    if isinstance(spec.layer, int):
        return flat[0]
    if any(state.shape != flat[0].shape for state in flat):
        raise ConfigError(
            "a learned layer mix needs hidden states of one size; name one layer instead"
        )
    return torch.stack(flat)


def _pool_grid(
    state: Tensor, spec: BranchBaseConfig, config: PreTrainedConfig, pixels: torch.Size
) -> Tensor:
    """Tokens (F, P, D) or a map (F, D, h, w) of each frame -> (F, k k, D)."""
    if state.ndim == 4:
        prefix, grid = None, state
    else:
        prefix, grid = _split_tokens(state, config, pixels)
    side = spec.spatial_tokens
    if side == 0:
        if prefix is None or prefix.shape[1] == 0:
            raise ConfigError("spatial_tokens 0 needs an encoder with a class token; use 1 or more")
        return prefix[:, :1]
    if side > min(grid.shape[-2:]):
        raise ConfigError(
            f"spatial_tokens {side} is more than the encoder's grid {tuple(grid.shape[-2:])}"
        )
    pooled = F.adaptive_avg_pool2d(grid.float(), side).to(grid.dtype)
    return pooled.flatten(2).transpose(1, 2)


def _split_tokens(
    state: Tensor, config: PreTrainedConfig, pixels: torch.Size
) -> tuple[Tensor, Tensor]:
    """Class and register tokens (F, R, D), and the patches as a map (F, D, h, w)."""
    count = state.shape[1]
    patch: Any = getattr(config, "patch_size", None)
    if patch is not None:
        sizes = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        height, width = pixels[0] // sizes[0], pixels[1] // sizes[1]
    else:
        height = width = 0
    if not 0 < height * width <= count:
        # No usable patch size (hierarchical encoders): the largest square that fits is the grid.
        height = width = int(count**0.5)
    extra = count - height * width
    patches = state[:, extra:].transpose(1, 2).unflatten(2, (height, width))
    return state[:, :extra], patches


def _encode_audio(tower: PreTrainedModel, spec: SavedBranchConfig, clip: DecodedClip) -> Tensor:
    """(S,) samples -> ([layers,] T, D)."""
    if clip.waveform is None or len(clip.waveform) == 0:
        raise MediaError(clip.name, "no_audio", "there is no waveform to encode")
    extractor = feature_extractor(spec.preprocessor)
    rate = int(getattr(extractor, "sampling_rate", clip.sample_rate))
    if rate != clip.sample_rate:
        raise ConfigError(
            f"the audio encoder wants {rate} Hz but clips are decoded at {clip.sample_rate} Hz; "
            f"set sampling.sample_rate to {rate}"
        )
    waveform = np.asarray(clip.waveform, dtype=np.float32)
    shortest = int(MIN_AUDIO_SECONDS * rate)
    if len(waveform) < shortest:
        waveform = np.pad(waveform, (0, shortest - len(waveform)))
    window = int(getattr(extractor, "n_samples", 0)) or len(waveform)
    parts = [waveform[start : start + window] for start in range(0, len(waveform), window)]
    # A last part too short for a window of its own would be padding, not sound.
    if len(parts) > 1 and len(parts[-1]) < shortest:
        parts.pop()
    states = [_audio_states(tower, spec, extractor, part, rate) for part in parts]
    joined = [torch.cat(pieces, 1) for pieces in zip(*states, strict=True)]
    return _stack([_average_steps(state, spec.stride) for state in joined], spec)


def _audio_states(
    tower: PreTrainedModel,
    spec: SavedBranchConfig,
    extractor: Any,
    waveform: NDArray[np.float32],
    rate: int,
) -> list[Tensor]:
    """Chosen hidden states (1, T, D) of one stretch of sound that the encoder can take."""
    values = extractor(waveform, sampling_rate=rate, padding="do_not_pad", return_tensors="np")
    name = extractor.model_input_names[0]
    inputs = torch.from_numpy(np.asarray(values[name], dtype=np.float32))
    inputs = inputs.to(tower.device, tower.dtype)
    if isinstance(tower, WhisperEncoder):
        return _choose(whisper_states(tower, inputs), spec)
    outputs = tower(inputs, output_hidden_states=spec.layer != -1, return_dict=True)
    return _choose(outputs, spec)


class _States:
    """What :func:`_choose` reads of an HF model's output."""

    def __init__(self, hidden_states: list[Tensor]) -> None:
        self.hidden_states = hidden_states
        self.last_hidden_state = hidden_states[-1]


def whisper_states(encoder: WhisperEncoder, mel: Tensor) -> _States:
    """Hidden states of a Whisper encoder for mel frames of any length up to its maximum.

    ``mel`` (1, M, frames). HF's forward insists on 3000 frames, 30 s, and a 5 s clip then costs
    nine times what it must. Whisper has absolute positions and no mask, so this takes the first
    positions and equals HF at 3000 frames. Fewer frames are not HF's prefix of the padded
    result: there, the padding is attended to.
    """
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    states = [x]
    for layer in encoder.layers:
        out = layer(x, None)
        x = out[0] if isinstance(out, tuple) else out
        states.append(x)
    states[-1] = encoder.layer_norm(x)
    return _States(states)


def _average_steps(state: Tensor, stride: int) -> Tensor:
    """(1, T, D) -> (1, ceil(T / stride), D); the last average may be over fewer steps."""
    if stride == 1:
        return state
    pooled = F.avg_pool1d(
        state.float().transpose(1, 2), stride, ceil_mode=True, count_include_pad=False
    )
    return pooled.transpose(1, 2).to(state.dtype)


def feature_extractor(values: Mapping[str, Any]) -> Any:
    """An audio encoder's own HF feature extractor, from its preprocessor config."""
    name = str(values.get("feature_extractor_type", ""))
    kind = getattr(transformers, name, None) if name else None
    if not (inspect.isclass(kind) and issubclass(kind, FeatureExtractionMixin)):
        raise ConfigError(
            f"audio preprocessor '{name or 'without feature_extractor_type'}' is not one of "
            "transformers' feature extractors; give the encoder's preprocessor_config.json"
        )
    return kind.from_dict(dict(values))


def fingerprint(tower: PreTrainedModel, spec: SavedBranchConfig) -> str:
    """SHA-256 of all that makes this encoder's features what they are, apart from the clip."""
    identity = {
        "version": ENCODE_VERSION,
        "config": stable_config(tower),
        "preprocessor": spec.preprocessor,
        "layer": spec.layer,
        "spatial_tokens": spec.spatial_tokens,
        "stride": spec.stride,
        "dtype": spec.dtype,
        "weights": hash_weights(tower),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def stable_config(tower: PreTrainedModel) -> dict[str, Any]:
    """A tower's config without what saving and loading change."""
    config = tower.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(volatile, None)
    return config


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's tensors, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Loading a branch's frozen encoder and measuring what it gives.

_UNUSED = ("pooler", "masked_spec_embed", "mask_token", "head.", "classifier", "decoder")
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
    spec = parse(SavedBranchConfig, {**settings, "preprocessor": preprocessor, "feature_size": 1})
    x = encode(model, spec, modality, _test_clip(sampling))["x"]
    measured = {"feature_size": x.shape[-1], "feature_layers": x.shape[0] if x.ndim == 3 else 0}
    return LoadedEncoder(model, parse(SavedBranchConfig, {**dump(spec), **measured}))


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
