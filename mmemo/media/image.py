"""Frames to the patches of Qwen2-VL's vision encoders: resize, normalise, cut.

transformers has Qwen2-VL's video processor for torchvision only. These are its steps with PIL and
NumPy, equal to the last bit to its image processor's PIL form. Encoders of a composed model bring
their own image processor (:mod:`mmemo.models.composed.preprocessors`). No torch is imported here,
so that decoding workers start fast.

Shapes: F frames, H x W pixels before and h x w after, C = 3 colours, N patches of p x p pixels and
tp frames, T x gh x gw the grid of patches.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resize(frames: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(F, H, W, 3) to (F, h, w, 3) with PIL's antialiased bicubic filter.

    Raises:
        ValueError: the frames are not (F, H, W, 3) uint8.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        out[index] = np.asarray(image)
    return out


def normalise(
    frames: NDArray[np.uint8],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> NDArray[np.float32]:
    """Rescale (F, h, w, 3) uint8 to 0..1 and normalise each colour: (F, 3, h, w) float32.

    A byte has 256 values, so each colour is one table lookup: the same numbers as computing them
    per pixel (rescaled in double precision, then normalised in single, as transformers does).
    """
    column = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    centre, spread = np.array(mean, np.float32), np.array(std, np.float32)
    table = (column - centre[:, None]) / spread[:, None]
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
        # Rounding to the nearest multiple could exceed max_pixels, or fall short of min_pixels.
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
