"""A clip's frames: a face whose action units rise, hold and fall, that turns, blinks and speaks.

F frames of H x W pixels, uint8 RGB.
"""

from __future__ import annotations

import numpy as np

from mmemo.world import scene
from mmemo.world.config import WorldConfig
from mmemo.world.features import draw_brows, draw_features, eye_x
from mmemo.world.head import draw_before, draw_behind, draw_cap, draw_skull, outline
from mmemo.world.pen import Floats, Image, Pen, Pose
from mmemo.world.plan import ClipPlan
from mmemo.world.voice import mouth_opening

_RISE, _FALL = 0.30, 0.25  # seconds of onset and offset
_BLINK = 0.09  # half the length of a blink, in seconds


def frame_times(config: WorldConfig) -> Floats:
    """(F,) seconds of the frames."""
    form = config.media
    return np.arange(round(form.fps * form.seconds)) / form.fps


def envelope(plan: ClipPlan, times: Floats) -> Floats:
    """Onset, apex and offset of the expression at each time, 0..1."""
    rise = np.clip((times - plan.onset) / _RISE, 0, 1)
    fall = np.clip((plan.offset - times) / _FALL, 0, 1)
    level = np.minimum(rise, fall)
    return level * level * (3 - 2 * level)


def pose_at(plan: ClipPlan, time: float, size: int) -> Pose:
    """Head pose with a little sway."""
    phase = plan.seed % 628 / 100
    sway = 0.05 * np.sin(2.1 * time + phase)
    return Pose(
        x=size * (0.5 + 0.012 * np.sin(1.7 * time + phase)),
        y=size * (0.455 + 0.008 * np.sin(3.1 * time + 2 * phase)),
        scale=size * 0.64,
        yaw=float(plan.yaw + sway),
        roll=float(plan.roll + 0.6 * sway),
    )


def face_boxes(plan: ClipPlan, config: WorldConfig) -> list[dict[str, object]]:
    """Boxes around the face, image-left eye first, in pixels rounded to 0.1."""
    form = config.media
    step = max(1, round(form.fps / form.boxes_per_second))
    gap = eye_x(plan.speaker)
    found: list[dict[str, object]] = []
    for time in frame_times(config)[::step].tolist():
        pose = pose_at(plan, time, form.size)
        rim = np.clip(pose.pixels(outline(plan.speaker), 0.3), 0, form.size)
        left, right = pose.pixels(np.array([[-gap, 0.0], [gap, 0.0]]), 0.8).round(1).tolist()
        box = np.concatenate([rim.min(axis=0), rim.max(axis=0)]).round(1).tolist()
        found.append({"time": round(time, 3), "box": box, "left_eye": left, "right_eye": right})
    return found


def draw_clip(plan: ClipPlan, config: WorldConfig, size: int | None = None) -> Image:
    """(F, size, size, 3) all frames, with the room's light and the camera's noise and blur."""
    size = size or config.media.size
    times = frame_times(config)
    level, speech = envelope(plan, times), mouth_opening(plan, times)
    blinks = np.asarray(plan.blinks).reshape(-1, 1)
    closed = np.clip(1.25 - np.abs(times - blinks) / _BLINK, 0, 1).max(axis=0, initial=0.0)
    frames = np.repeat(scene.background(plan, size)[None], len(times), axis=0)
    for index, time in enumerate(times.tolist()):
        scene.weather(frames[index], plan, time)
        units = {name: value * float(level[index]) for name, value in plan.aus.items()}
        pen = Pen(frames[index], pose_at(plan, time, size))
        _head(pen, plan, units, float(speech[index]), float(closed[index]))
    knobs = config.difficulty
    lit = scene.light(frames, plan)
    return scene.spoil(lit, knobs.video_noise, knobs.video_blur, plan.seed)


def _head(pen: Pen, plan: ClipPlan, units: dict[str, float], speech: float, closed: float) -> None:
    person = plan.speaker
    draw_behind(pen, person)
    draw_skull(pen, person, 0.075 * units["AU26"] + 0.02 * speech)
    draw_features(pen, person, units, speech, closed, plan.yaw)
    draw_before(pen, person)
    draw_brows(pen, person, units)
    if plan.scene.cap:
        draw_cap(pen, person)
