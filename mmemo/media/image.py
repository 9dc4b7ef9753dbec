"""Frames to the pixels that a vision tower wants: resize, crop, normalise, patchify.

Equal, to the last bit where they use PIL, to transformers' own processors; ours because the engine
does without torchvision. Shapes: F frames, H x W pixels before and h x w after, C = 3 colours,
N patches of p x p pixels and tp frames, T x gh x gw the grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmemo.errors import ConfigError

BICUBIC = int(Image.Resampling.BICUBIC)

_KNOWN = frozenset({"Bit", "CLIP", "ViT", "Siglip", "DeiT", "Beit", "Blip", "VideoMAE"})
"""Processor families that do only the steps below, in this order. Checked in the tests."""

_REFUSED = ("do_pad", "do_flip_channel_order", "do_reduce_labels", "crop_pct", "do_splitting")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a tower's image processor does to a frame, in this order. None leaves a step out.

    Attributes:
        size: (h, w) to resize to, whatever the aspect.
        shortest: resize so that the shorter side is this, keeping the aspect; excludes ``size``.
        crop: (h, w) cut from the middle, zeros where the frame is smaller.
        resample: PIL's number of the filter.
        scale: factor from 0..255 to the processor's range.
        mean: per colour, RGB. std: likewise.
    """

    size: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    resample: int = BICUBIC
    scale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ImageSpec:
        """From a ``preprocessor_config.json`` or an image processor's ``to_dict()``.

        Raises:
            ConfigError: the processor does something that is not one of the steps above, or a
                value is missing.
        """
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
            kind = kind.removesuffix(ending)
        if kind and kind not in _KNOWN:
            raise ConfigError(
                f"image processor '{kind}' is not supported for a branch; use an encoder whose "
                f"processor is one of {', '.join(sorted(_KNOWN))}"
            )
        for key in _REFUSED:
            if values.get(key):
                raise ConfigError(f"image processor setting '{key}' is not supported; turn it off")
        cropped = bool(values.get("do_center_crop", "crop_size" in values))
        size, shortest = None, None
        if values.get("do_resize", True):
            size, shortest = _resize_rule(_need(values, "size"), cropped)
        normalise = bool(values.get("do_normalize", True))
        return cls(
            size=size,
            shortest=shortest,
            crop=_pair(_need(values, "crop_size"), "crop_size") if cropped else None,
            resample=int(values.get("resample", BICUBIC)),
            scale=float(values.get("rescale_factor", 1 / 255))
            if values.get("do_rescale", True)
            else None,
            mean=_three(_need(values, "image_mean"), "image_mean") if normalise else None,
            std=_three(_need(values, "image_std"), "image_std") if normalise else None,
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a frame of (height, width) after all steps."""
        return self.crop or self.resized(height, width)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a frame of (height, width) after the resize alone."""
        if self.size is not None:
            return self.size
        if self.shortest is None:
            return height, width
        long = int(self.shortest * max(height, width) / min(height, width))
        return (long, self.shortest) if width <= height else (self.shortest, long)


def to_pixels(frames: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """(F, H, W, 3) uint8 RGB frames to (F, 3, h, w) float32 pixels.

    Raises:
        ValueError: the frames are not (F, H, W, 3) uint8.
    """
    _check(frames)
    height, width = frames.shape[1:3]
    sized = resize(frames, spec.resized(height, width), spec.resample)
    if spec.crop is not None:
        sized = centre_crop(sized, spec.crop)
    return normalise(sized, spec)


def resize(
    frames: NDArray[np.uint8], size: tuple[int, int], resample: int = BICUBIC
) -> NDArray[np.uint8]:
    """(F, H, W, 3) to (F, h, w, 3) with PIL's antialiased filters."""
    _check(frames)
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    filter_ = Image.Resampling(resample)
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        out[index] = np.asarray(Image.fromarray(frame).resize((width, height), filter_))
    return out


def centre_crop(frames: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle (h, w) of (F, H, W, 3); zeros where the frame is smaller."""
    height, width = size
    (top, above), (left, before) = (
        _middle(frames.shape[1], height),
        _middle(frames.shape[2], width),
    )
    cut = frames[:, top : top + height - above, left : left + width - before]
    if cut.shape[1:3] == size:
        return cut
    out = np.zeros((len(frames), height, width, 3), np.uint8)
    out[:, above : above + cut.shape[1], before : before + cut.shape[2]] = cut
    return out


def _middle(have: int, want: int) -> tuple[int, int]:
    """First pixel to take, and zeros to put before it."""
    if have >= want:
        return (have - want) // 2, 0
    return 0, (want - have + 1) // 2  # transformers rounds the padding before the image up


def normalise(frames: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Rescale and normalise (F, h, w, 3) uint8 to (F, 3, h, w) float32.

    A byte has 256 values, so each colour is one table lookup: the same numbers as computing them
    per pixel (rescaled in double precision, then normalised in single, as transformers does).
    """
    values = np.arange(256, dtype=np.float64)
    column = (values if spec.scale is None else values * spec.scale).astype(np.float32)
    table = np.stack([column] * 3)
    if spec.mean is not None and spec.std is not None:
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        table = (table - mean[:, None]) / std[:, None]
    out = np.empty((len(frames), 3, *frames.shape[1:3]), np.float32)
    for colour in range(3):
        out[:, colour] = table[colour][frames[..., colour]]
    return out


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
) -> tuple[int, int]:
    """Qwen2-VL's (h, w): multiples of ``factor``, near the aspect, between the two areas.

    Raises:
        ValueError: one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a frame of {height} x {width} is too long and thin; crop it first")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def patchify_qwen(
    pixels: NDArray[np.float32], patch_size: int, temporal_patch_size: int, merge_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Qwen2-VL's patches: the merge_size x merge_size patches of one token follow each other.

    Args:
        pixels: (F, C, h, w); the last frame is repeated up to a multiple of
            ``temporal_patch_size``.

    Returns:
        (N, C * tp * p * p) patches and their grid (T, gh, gw).

    Raises:
        ValueError: h or w is not a multiple of ``patch_size * merge_size``.
    """
    frames, colours, height, width = pixels.shape
    unit = patch_size * merge_size
    if frames == 0 or height % unit or width % unit:
        raise ValueError(
            f"{frames} frames of {height} x {width} do not divide into patches of {unit} pixels"
        )
    missing = -frames % temporal_patch_size
    if missing:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    times = len(pixels) // temporal_patch_size
    blocks = pixels.reshape(
        *(times, temporal_patch_size, colours),
        *(height // unit, merge_size, patch_size),
        *(width // unit, merge_size, patch_size),
    )
    # (T, tp, C, y, my, py, x, mx, px) -> (T, y, x, my, mx, C, tp, py, px)
    ordered = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    rows, columns = height // patch_size, width // patch_size
    flat = ordered.reshape(
        times * rows * columns, colours * temporal_patch_size * patch_size * patch_size
    )
    return np.ascontiguousarray(flat), np.array([times, rows, columns], np.int64)


def _check(frames: NDArray[np.uint8]) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")


def _need(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise ConfigError(f"the image processor's config has no '{key}'; add it")
    return values[key]


def _resize_rule(size: Any, cropped: bool) -> tuple[tuple[int, int] | None, int | None]:
    if isinstance(size, Mapping):
        keys = {key for key, value in size.items() if value is not None}
        if keys == {"shortest_edge"}:
            return None, int(size["shortest_edge"])
        return _pair(size, "size"), None
    # Old configs give one number: the shorter side where a crop follows, else both sides.
    return (None, int(size)) if cropped else ((int(size), int(size)), None)


def _pair(size: Any, key: str) -> tuple[int, int]:
    if isinstance(size, Mapping):
        keys = {name for name, value in size.items() if value is not None}
        if keys != {"height", "width"}:
            raise ConfigError(f"'{key}' must hold height and width, not {sorted(map(str, keys))}")
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _three(values: Sequence[float] | float, key: str) -> tuple[float, float, float]:
    listed = [values] * 3 if isinstance(values, int | float) else list(values)
    if len(listed) != 3:
        raise ConfigError(f"'{key}' must hold three numbers, one per colour")
    return float(listed[0]), float(listed[1]), float(listed[2])
