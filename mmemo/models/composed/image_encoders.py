"""Frames to features, with any image or video encoder of transformers.

Image encoders see each frame by itself. Video encoders (VideoMAE, ViViT, TimeSformer, V-JEPA 2)
see a window of frames at once; see :func:`video_window`. What an encoder's output means is read
from its config and its shape, not from a list of models: feature maps of convolutional encoders
become tokens, and class and register tokens are whatever stands before the patches.

Shapes: F frames, n frames of a window, W windows, H x W pixels, P tokens, D the encoder's width,
t x h x w the grid of patches, k side of the pooled grid.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from mmemo.errors import ConfigError
from mmemo.models.composed.configuration import BranchBaseConfig, SavedBranchConfig
from mmemo.models.composed.hidden_states import select_states, stack_states
from mmemo.models.composed.preprocessors import load_image_processor, preprocess_frames


@dataclass(frozen=True, slots=True)
class VideoWindow:
    """How many frames a video encoder sees at once.

    Attributes:
        frames: of a full window.
        fixed: whether the encoder has positions for exactly ``frames`` frames. If not, it takes
            fewer, in multiples of ``tubelet``.
        tubelet: frames that are merged into one step of the grid.
    """

    frames: int
    fixed: bool
    tubelet: int


def video_window(encoder: PreTrainedModel) -> VideoWindow | None:
    """The window of a video encoder; None for an image encoder.

    ``num_frames`` in a config is the length of a table of positions (VideoMAE, ViViT, TimeSformer).
    V-JEPA 2's ``frames_per_clip`` is only what it was trained on: its rotary positions serve any
    number of frames.
    """
    config: Any = encoder.config
    tubelet: Any = getattr(config, "tubelet_size", 1)
    tubelet = int(tubelet if isinstance(tubelet, int) else tubelet[0])
    fixed: int | None = getattr(config, "num_frames", None)
    if fixed is not None:
        return VideoWindow(fixed, True, tubelet)
    nominal: int | None = getattr(config, "frames_per_clip", None)
    if nominal is not None:
        return VideoWindow(nominal, False, tubelet)
    return None


def split_windows(count: int, window: VideoWindow) -> list[NDArray[np.int64]]:
    """Indices of the frames in each window of a video of ``count`` frames.

    There are as few windows as hold all frames, over equal consecutive shares of the video. A share
    shorter than its window is stretched over it: frames at even distances are repeated.
    """
    total = -(-count // window.frames)
    found: list[NDArray[np.int64]] = []
    for index in range(total):
        start, end = index * count // total, (index + 1) * count // total
        size = window.frames if window.fixed else -(-(end - start) // window.tubelet)
        size *= 1 if window.fixed else window.tubelet
        # The centres of `size` equal parts of the share; every frame once where they are equal.
        centres = (np.arange(size) + 0.5) * (end - start) / size
        found.append(start + np.floor(centres).astype(np.int64))
    return found


def check_frames(encoder: PreTrainedModel, frames: int, where: str) -> None:
    """Refuse a sampling that would show a video encoder frames twice.

    Raises:
        ConfigError: ``frames`` per clip do not divide into whole windows.
    """
    window = video_window(encoder)
    if window is None:
        return
    unit = window.frames if window.fixed else window.tubelet
    if frames % unit:
        least = max(frames // unit, 1) * unit
        raise ConfigError(
            f"{where}.encoder: '{encoder.config.model_type}' takes {unit} frames at a time, but "
            f"sampling.frames is {frames}; set sampling.frames to {least} or another multiple of "
            f"{unit}"
        )


def encode_frames(
    encoder: PreTrainedModel, spec: SavedBranchConfig, frames: NDArray[np.uint8]
) -> Tensor:
    """(F, H, W, 3) uint8 -> ([layers,] T, D): T is F k k, or t k k for each window of a video.

    Raises:
        ConfigError: the encoder's output does not fit ``spec``.
    """
    processor = load_image_processor(spec.preprocessor, encoder.config.model_type)
    tensors = preprocess_frames(processor, frames)
    inputs = {name: _moved(tensor, encoder) for name, tensor in tensors.items()}
    window = video_window(encoder)
    if window is None:
        shape = tensors.get("spatial_shapes")
        # All frames of a clip have one size, so the first grid is that of all.
        grid = None if shape is None else (1, int(shape[0, 0]), int(shape[0, 1]))
        states = _forward(encoder, spec, inputs, grid)
        return stack_states(states, spec)
    pixels = inputs["pixel_values"]
    windows: list[list[Tensor]] = []
    for index in split_windows(len(frames), window):
        part = pixels[torch.from_numpy(index).to(pixels.device)][None]  # (1, n, 3, H, W)
        windows.append(_forward(encoder, spec, {"pixel_values": part}, None))
    return stack_states([torch.cat(parts) for parts in zip(*windows, strict=True)], spec)


def _moved(tensor: Tensor, encoder: PreTrainedModel) -> Tensor:
    # Pixel masks and spatial shapes are integers and must stay so.
    kind = encoder.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(encoder.device, kind)


def _forward(
    encoder: PreTrainedModel,
    spec: SavedBranchConfig,
    inputs: dict[str, Tensor],
    grid: tuple[int, int, int] | None,
) -> list[Tensor]:
    """The chosen hidden states, each pooled to (B t, k k, D). ``grid``: of a processor that cuts
    and pads the patches itself."""
    pixels = inputs["pixel_values"]
    known = inspect.signature(encoder.forward).parameters
    given: dict[str, Any] = {name: x for name, x in inputs.items() if name in known}
    # V-JEPA 2 and others call their pixels by another name.
    if "pixel_values" not in known:
        given[encoder.main_input_name] = pixels
    if _interpolates(encoder, pixels):
        given["interpolate_pos_encoding"] = True
    # V-JEPA 2 predicts masked patches and timm pools its map, unless they are told not to.
    given |= {name: value for name, value in _ONLY_ENCODE.items() if name in known}
    outputs = encoder(**given, output_hidden_states=spec.layer != -1, return_dict=True)
    states = select_states(outputs, spec)
    if grid is not None:  # the processor padded the patches, behind
        states = [state[:, : grid[1] * grid[2]] for state in states]
    elif pixels.ndim >= 4:
        grid = _patch_grid(encoder.config, pixels)
    if pixels.ndim >= 4:
        states = [channels_first(state, pixels.shape[-2:]) for state in states]
    return [_pool_grid(state, spec, encoder.config, grid) for state in states]


_ONLY_ENCODE = {"skip_predictor": True, "do_pooling": False}


def _interpolates(encoder: PreTrainedModel, pixels: Tensor) -> bool:
    """Whether the encoder must be told to interpolate its position embeddings.

    Raises:
        ConfigError: the encoder cannot, and would misplace patches without a word.
    """
    size: Any = getattr(encoder.config, "image_size", None)
    crop: Any = getattr(encoder.config, "crop_size", None)
    if pixels.ndim < 4:
        return False
    have = tuple(pixels.shape[-2:])
    if isinstance(crop, int) and size is None and have != (crop, crop):
        raise ConfigError(
            f"'{encoder.config.model_type}' has positions for {crop} x {crop} pixels, but its "
            f"image processor makes {have[0]} x {have[1]}; set crop_size in the preprocessor"
        )
    if "interpolate_pos_encoding" not in inspect.signature(encoder.forward).parameters:
        return False
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    return bool(pair) and pair != have


def _patch_grid(config: PreTrainedConfig, pixels: Tensor) -> tuple[int, int, int] | None:
    """(t, h, w) of the patches that the config cuts pixels into; None if it does not say."""
    patch: Any = getattr(config, "patch_size", None)
    tubelet: Any = getattr(config, "tubelet_size", None)
    if not isinstance(tubelet, int) and tubelet is not None:
        tubelet, patch = tubelet[0], tubelet[1:]
    if patch is None:
        return None
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    return frames // (tubelet or 1), pixels.shape[-2] // height, pixels.shape[-1] // width


def channels_first(state: Tensor, pixels: torch.Size) -> Tensor:
    """A map as (B, D, h, w). SAM 2 and others return (B, h, w, D): whichever of the two has the
    aspect of the pixels."""
    if state.ndim != 4:
        return state
    _, one, two, three = state.shape
    aspect = pixels[0] / pixels[1]
    first, last = abs(two / three - aspect), abs(one / two - aspect)
    return state if first <= last else state.permute(0, 3, 1, 2)


def _pool_grid(
    state: Tensor,
    spec: BranchBaseConfig,
    config: PreTrainedConfig,
    grid: tuple[int, int, int] | None,
) -> Tensor:
    """Tokens (B, P, D), a map (B, D, h, w) or a vector (B, D) of each image -> (B t, k k, D)."""
    if state.ndim == 2:
        prefix, maps = None, state[..., None, None]
    elif state.ndim == 4:
        prefix, maps = None, state
    else:
        prefix, maps = _split_tokens(state, config, grid)
    side = spec.spatial_tokens
    if side == 0:
        return class_token(prefix, config)
    # A finer grid would only repeat the same patches.
    if side > min(maps.shape[-2:]):
        raise ConfigError(
            f"spatial_tokens {side} is more than the encoder's grid {tuple(maps.shape[-2:])}"
        )
    pooled = F.adaptive_avg_pool2d(maps.float(), side).to(maps.dtype)
    return pooled.flatten(2).transpose(1, 2)


def class_token(prefix: Tensor | None, config: PreTrainedConfig) -> Tensor:
    """(B, 1, D). Class tokens come before registers, and there may be registers alone."""
    before = 0 if prefix is None else prefix.shape[1]
    registers: int = getattr(config, "num_register_tokens", 0) or 0
    if prefix is None or before in (0, registers):
        raise ConfigError("spatial_tokens 0 needs an encoder with a class token; use 1 or more")
    return prefix[:, :1]


def _split_tokens(
    state: Tensor, config: PreTrainedConfig, grid: tuple[int, int, int] | None
) -> tuple[Tensor, Tensor]:
    """Class and register tokens (B, R, D), and the patches as maps (B t, D, h, w)."""
    count = state.shape[1]
    steps, height, width = grid or (1, 0, 0)
    if not 0 < steps * height * width <= count:
        # No usable patch size (hierarchical encoders): the largest square that fits is the grid.
        steps, height = 1, int(count**0.5)
        width = height
    extra = count - steps * height * width
    patches = state[:, extra:]
    if config.model_type == "timesformer" and steps > 1:
        # The one encoder whose tokens run over time first, then over the image.
        patches = patches.unflatten(1, (height * width, steps)).transpose(1, 2).flatten(1, 2)
    patches = patches.unflatten(1, (steps, height, width)).flatten(0, 1)
    return state[:, :extra], patches.permute(0, 3, 1, 2)
