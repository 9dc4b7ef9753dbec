"""Worse versions of decoded pictures and sounds. F frames, H x W pixels, S audio samples.

Sources: noise of diffusion steps on pictures, Leng et al. (VCD), arXiv 2311.16922, section 3.2,
which MoD-DPO (arXiv 2603.03192) finds the best corruption; random crops, Wang et al. (mDPO),
arXiv 2406.11839, section 3.2. White noise at a given SNR is the usual corruption of speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo.errors import MediaError

Frame = NDArray[np.uint8]
Wave = NDArray[np.float32]

_STEPS = 1000  # of the diffusion
_SEGMENT_S = 0.1  # seconds of sound that stay together when it is shuffled
_ASPECT = (3 / 4, 4 / 3)  # of a crop, as in torchvision's RandomResizedCrop


@dataclass(frozen=True, slots=True)
class Perturbation:
    """How a stream is made worse. Each kind reads its own fields."""

    kind: str
    """``noise``, ``blurred``, ``cropped``, ``shuffled_frames``, ``frozen_frame``, ``reversed``,
    ``blank_face`` (a black picture) or ``muted``."""
    seed: int
    snr_db: float = 0.0
    """Signal-to-noise power ratio of ``noise`` in a sound, in dB."""
    noise_step: int = 500
    """Diffusion step of ``noise`` in a picture, of 1000."""
    blur: float = 0.05
    """Standard deviation of ``blurred``, as a share of the picture's longer side."""
    crop_scale: tuple[float, float] = (0.01, 0.2)
    """Share of the area that ``cropped`` keeps: a uniform draw between these."""


def perturb_frames(frames: Sequence[Frame], change: Perturbation, name: str) -> list[Frame]:
    """The frames of one clip in order, each (H, W, 3) uint8 RGB, made worse in the same size.

    Raises:
        MediaError: the kind would change nothing, as shuffling a single frame does.
    """
    rng = np.random.default_rng(change.seed)
    found = _changed_frames(frames, change, rng, name)
    if all(np.array_equal(one, other) for one, other in zip(frames, found, strict=True)):
        raise MediaError(name, "no_frames", f"'{change.kind}' changes nothing in its picture")
    return found


def _changed_frames(
    frames: Sequence[Frame], change: Perturbation, rng: np.random.Generator, name: str
) -> list[Frame]:
    if change.kind == "noise":
        kept = noise_level(change.noise_step)
        return [_diffused(frame, kept, rng) for frame in frames]
    if change.kind == "blurred":
        return [_blurred(frame, change.blur) for frame in frames]
    if change.kind == "cropped":
        box = crop_box(frames[0].shape[0], frames[0].shape[1], change.crop_scale, rng)
        return [_cropped(frame, box) for frame in frames]
    if change.kind == "blank_face":
        return [np.zeros_like(frame) for frame in frames]
    if len(frames) < 2:
        raise MediaError(name, "no_frames", f"'{change.kind}' changes nothing in one frame")
    if change.kind == "frozen_frame":
        return [frames[int(rng.integers(len(frames)))]] * len(frames)
    return [frames[at] for at in _order(change.kind, len(frames), rng)]


def perturb_sound(wave: Wave, rate: int, change: Perturbation, name: str) -> Wave:
    """(S,) float32 in [-1, 1] at ``rate`` Hz, made worse in the same length.

    Raises:
        MediaError: the kind would change nothing, as noise relative to silence does.
    """
    rng = np.random.default_rng(change.seed)
    if change.kind == "muted":
        found = np.zeros_like(wave)
    elif change.kind == "noise":
        power = float(np.mean(np.square(wave, dtype=np.float64)))
        spread = (power * 10 ** (-change.snr_db / 10)) ** 0.5
        noise = rng.standard_normal(len(wave)) * spread
        found = np.clip(wave + noise, -1, 1).astype(np.float32)
    elif change.kind == "reversed":
        found = wave[::-1].copy()
    else:
        size = max(1, round(_SEGMENT_S * rate))
        parts = [wave[at : at + size] for at in range(0, len(wave), size)]
        if len(parts) < 2:
            raise MediaError(
                name, "no_audio", f"'{change.kind}' changes nothing in so short a sound"
            )
        found = np.concatenate([parts[at] for at in _order(change.kind, len(parts), rng)])
    if np.array_equal(found, wave):
        raise MediaError(name, "no_audio", f"'{change.kind}' changes nothing in its sound")
    return found


def noise_level(step: int) -> float:
    """The share of the signal's power that is left after ``step`` of 1000 diffusion steps, with
    VCD's sigmoid schedule of the noise's variance."""
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, _STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    return float(np.prod(1 - betas[:step]))


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, in pixels."""
    area = height * width * rng.uniform(*scale)
    aspect = float(np.exp(rng.uniform(*np.log(_ASPECT))))
    wide = min(width, max(1, round((area * aspect) ** 0.5)))
    high = min(height, max(1, round((area / aspect) ** 0.5)))
    top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
    return int(top), int(left), high, wide


def _order(kind: str, count: int, rng: np.random.Generator) -> list[int]:
    """The part at each position, never in the original order."""
    original = np.arange(count)
    if kind == "reversed":
        return original[::-1].tolist()
    order = original
    while np.array_equal(order, original):
        order = rng.permutation(count)
    return order.tolist()


def _diffused(frame: Frame, kept: float, rng: np.random.Generator) -> Frame:
    """Noise on pixels scaled to [-1, 1], of which the signal keeps the share ``kept``."""
    noise = rng.standard_normal(frame.shape, dtype=np.float32)
    x = kept**0.5 * (frame.astype(np.float32) / 127.5 - 1) + (1 - kept) ** 0.5 * noise
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def _blurred(frame: Frame, blur: float) -> Frame:
    cv2: Any = _cv2()
    sigma = blur * max(frame.shape[:2])
    return np.asarray(cv2.GaussianBlur(frame, (0, 0), sigma), dtype=np.uint8)


def _cropped(frame: Frame, box: tuple[int, int, int, int]) -> Frame:
    cv2: Any = _cv2()
    top, left, high, wide = box
    part = np.ascontiguousarray(frame[top : top + high, left : left + wide])
    size = (frame.shape[1], frame.shape[0])
    return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _cv2() -> Any:
    import cv2

    return cv2
