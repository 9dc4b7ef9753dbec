"""What surrounds the person: a wall, a window with weather, room light, music and noise.

The surroundings say nothing about the emotion, unless ``bias.scene_correlation`` ties the two in
the training clips. Frames are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from mmemo.world.plan import ClipPlan
from mmemo.world.voice import LEVEL

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]

_SKIES: Mapping[str, tuple[int, int, int]] = {
    "sun": (126, 200, 246),
    "clouds": (176, 190, 206),
    "rain": (122, 140, 162),
    "snow": (196, 212, 230),
    "night": (28, 34, 72),
}
_WALLS: tuple[tuple[int, int, int], ...] = (
    (226, 216, 200),
    (206, 218, 222),
    (214, 222, 204),
    (224, 208, 212),
)
_LIGHT: Mapping[str, tuple[float, float, float]] = {
    "warm": (1.06, 0.98, 0.84),
    "cool": (0.91, 0.97, 1.06),
    "dim": (0.66, 0.64, 0.70),
    "bright": (1.08, 1.08, 1.06),
}
_CHORDS: Mapping[str, tuple[float, ...]] = {
    "cheerful": (523.25, 659.26, 783.99, 1046.5),
    "gloomy": (110.0, 130.81, 164.81, 110.0),
    "tense": (146.83, 155.56, 146.83, 207.65),
}


def background(plan: ClipPlan, size: int) -> Image:
    """The static background: wall, window frame and sky."""
    wall = _WALLS[plan.seed % len(_WALLS)]
    frame = np.empty((size, size, 3), np.uint8)
    shade = np.linspace(1.03, 0.90, size)[:, None, None]
    frame[:] = np.clip(np.asarray(wall) * shade, 0, 255)
    x0, y0, x1, y1 = _window(plan, size)
    cv2.rectangle(frame, (x0 - 2, y0 - 2), (x1 + 2, y1 + 2), (246, 242, 234), -1)
    pane = frame[y0:y1, x0:x1]
    pane[:] = _SKIES[plan.scene.weather]
    _sky(pane, plan.scene.weather)
    cv2.line(frame, ((x0 + x1) // 2, y0), ((x0 + x1) // 2, y1), (246, 242, 234), 1)
    return frame


def weather(frame: Image, plan: ClipPlan, time: float) -> None:
    """Draw falling rain or snow into the window, in place."""
    if plan.scene.weather not in ("rain", "snow"):
        return
    size = frame.shape[0]
    x0, y0, x1, y1 = _window(plan, size)
    pane = frame[y0:y1, x0:x1]
    height, width = pane.shape[:2]
    rng = np.random.default_rng([plan.seed, 3])
    drops = rng.uniform(size=(9, 2))
    speed = 1.9 if plan.scene.weather == "rain" else 0.4
    xs = drops[:, 0] * width * 16
    ys = (drops[:, 1] + speed * time) % 1.0 * height * 16
    for x, y in zip(xs.astype(int), ys.astype(int), strict=True):
        if plan.scene.weather == "rain":
            end = (int(x) - 10, int(y) + 80)
            cv2.line(pane, (int(x), int(y)), end, (206, 222, 240), 1, cv2.LINE_AA, 4)
        else:
            cv2.circle(pane, (int(x), int(y)), 20, (255, 255, 255), -1, cv2.LINE_AA, 4)


def light(frames: Image, plan: ClipPlan) -> Image:
    """Apply the room's light to all frames (F, H, W, 3)."""
    table = np.arange(256)[None, :, None] * np.asarray(_LIGHT[plan.scene.light])
    table = np.clip(table, 0, 255).astype(np.uint8)
    flat = frames.reshape(1, -1, 3)
    return np.asarray(cv2.LUT(flat, table), np.uint8).reshape(frames.shape)


def spoil(frames: Image, noise: float, blur: float, seed: int) -> Image:
    """Apply camera blur and noise to all frames (F, H, W, 3)."""
    if blur > 0:
        for index, frame in enumerate(frames):
            frames[index] = cv2.GaussianBlur(frame, (0, 0), blur)
    if noise > 0:
        brighter, darker = _grain(size := frames.shape[1], noise)
        starts = np.random.default_rng([seed, 4]).integers(0, size, size=(len(frames), 2))
        for frame, (dy, dx) in zip(frames, starts.tolist(), strict=True):
            cv2.add(frame, brighter[dy : dy + size, dx : dx + size], dst=frame)
            cv2.subtract(frame, darker[dy : dy + size, dx : dx + size], dst=frame)
    return frames


@lru_cache(maxsize=4)
def _grain(size: int, noise: float) -> tuple[Image, Image]:
    """The positive and the negative part of a sheet of grey noise, of which frames take random
    crops. Drawing one sheet is much faster than drawing noise for every frame."""
    sheet = np.random.default_rng(4).normal(scale=noise, size=(2 * size, 2 * size, 1))
    sheet = np.repeat(np.round(sheet), 3, axis=2)
    return np.clip(sheet, 0, 255).astype(np.uint8), np.clip(-sheet, 0, 255).astype(np.uint8)


def music(plan: ClipPlan, count: int, rate: int) -> Floats:
    """(S,) background music of unit RMS, or silence."""
    if plan.scene.music == "none":
        return np.zeros(count)
    return np.roll(_tune(plan.scene.music, count, rate), plan.seed % count)


def mix(voice: Floats, plan: ClipPlan, rate: int, snr: float, music_snr: float) -> Floats:
    """The voice mixed with room noise and music, whose levels are relative to speech at rest; (S,)
    in [-1, 1]."""
    rng = np.random.default_rng([plan.seed, 5])
    hiss = rng.normal(size=len(voice) + 1)
    hiss = 0.6 * hiss[1:] + 0.4 * hiss[:-1]
    sound = voice + hiss * (LEVEL * 10 ** (-snr / 20) / 0.72)
    sound += music(plan, len(voice), rate) * LEVEL * 10 ** (-music_snr / 20)
    return np.tanh(sound) if np.abs(sound).max() > 0.9 else sound


@lru_cache(maxsize=8)
def _tune(kind: str, count: int, rate: int) -> Floats:
    times = np.arange(count) / rate
    notes = _CHORDS[kind]
    length = count / len(notes) / (2 if kind == "cheerful" else 1)
    index = (np.arange(count) / length).astype(int)
    since = (np.arange(count) % length) / rate
    pitch = np.asarray(notes)[index % len(notes)]
    fade = np.exp(-since * (7 if kind == "cheerful" else 1.5)) * np.minimum(1, since / 0.01)
    tone = sum(np.sin(2 * np.pi * k * pitch * times) / k**1.5 for k in (1, 2, 3))
    if kind == "tense":
        fade = fade * (0.6 + 0.4 * np.sin(2 * np.pi * 9 * times))
    sound = np.asarray(tone) * fade
    return sound / np.sqrt(np.mean(sound**2))


def _window(plan: ClipPlan, size: int) -> tuple[int, int, int, int]:
    left = plan.seed // 7 % 2 == 0
    width, height, margin = round(size * 0.24), round(size * 0.30), round(size * 0.05)
    x0 = margin if left else size - margin - width
    return x0, margin, x0 + width, margin + height


def _sky(pane: Image, kind: str) -> None:
    height, width = pane.shape[:2]
    unit = height / 34

    def disc(x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
        centre = (round(x * width * 16), round(y * height * 16))
        cv2.circle(pane, centre, round(radius * unit * 16), colour, -1, cv2.LINE_AA, 4)

    if kind == "sun":
        disc(0.7, 0.3, 5.5, (255, 222, 92))
        disc(0.3, 1.1, 11, (120, 186, 96))
    elif kind == "night":
        disc(0.68, 0.3, 5, (244, 240, 214))
        disc(0.58, 0.26, 4.4, _SKIES["night"])
        for x, y in ((0.2, 0.2), (0.35, 0.55), (0.85, 0.7), (0.15, 0.8)):
            disc(x, y, 0.9, (244, 240, 214))
    elif kind in ("clouds", "rain"):
        grey = (236, 240, 246) if kind == "clouds" else (92, 104, 122)
        for x, y, radius in ((0.3, 0.3, 4.5), (0.5, 0.25, 5.5), (0.7, 0.33, 4.5)):
            disc(x, y, radius, grey)
    else:
        disc(0.4, 1.15, 13, (250, 252, 255))
