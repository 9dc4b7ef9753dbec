"""A clip's frames: a face whose action units rise, hold and fall, that turns, blinks and speaks.

From back to front, a head consists of parts that no action unit moves (shoulders, hair, ears, the
face's rim, cap) and of features that action units move (brows, eyes, nose, cheeks, mouth). In all
functions, ``units`` holds the current intensity of every action unit, 0..1 (Ekman & Friesen's
FACS).

F frames of H x W pixels, uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from mmemo.world import scene
from mmemo.world.config import WorldConfig
from mmemo.world.drawing import RING, Floats, Image, Pen, Pose, Shape, band, curve, mixed, shade
from mmemo.world.people import Speaker
from mmemo.world.plan import ClipPlan
from mmemo.world.voice import mouth_opening

Units = Mapping[str, float]

_LOW = np.maximum(RING[:, 1], 0)
_ARCH = np.linspace(-1, 1, 17)


@lru_cache(maxsize=1024)
def _rim(width: float, jaw: float) -> Floats:
    x = RING[:, 0] * width / 2 * (1 - (1 - jaw) * 1.3 * _LOW**1.6)
    return curve(x, np.where(RING[:, 1] > 0, RING[:, 1] * 0.475, RING[:, 1] * 0.44))


def outline(person: Speaker, drop: float = 0.0) -> Floats:
    """(48, 2) outline of the face: an ellipse, narrower at the jaw, which ``drop`` lowers."""
    rim = _rim(person.width, person.jaw)
    return rim + _LOW[:, None] * (0.0, drop) if drop else rim


def draw_behind(pen: Pen, person: Speaker) -> None:
    """Draw everything behind the face: hair, neck, body and ears."""
    pen.shapes(_behind(person))


def draw_skull(pen: Pen, person: Speaker, drop: float) -> None:
    """Draw the bare face and the beard; ``drop`` lowers the jaw."""
    rim = outline(person, drop)
    pen.fill(rim, shade(person.skin, 0.80), 0.3)
    pen.fill(rim * (0.972, 0.984), person.skin, 0.3)
    if person.beard:
        low = rim[2:23] * (0.985, 0.992)  # right to left along the jaw
        upper = curve(low[:, 0] * 0.80, 0.17 + 0.16 * np.abs(low[:, 0]))
        beard = mixed(person.skin, person.hair, 0.6)
        pen.fill(np.concatenate([low, upper[::-1]]), beard, 0.4)


def draw_before(pen: Pen, person: Speaker) -> None:
    """Draw the hair over the forehead."""
    pen.shapes(_fringe(person))


def draw_cap(pen: Pen, person: Speaker) -> None:
    """Draw a cap with a brim, high enough to leave the brows visible."""
    pen.shapes(_cap(person))


@lru_cache(maxsize=1024)
def _behind(person: Speaker) -> tuple[Shape, ...]:
    half, dark = person.width / 2, shade(person.hair, 0.85)
    shapes: list[Shape] = []
    if person.style == "long":
        x = np.array([-1, -1.12, -1.16, -1.1, 1.1, 1.16, 1.12, 1.0]) * (half + 0.05)
        y = np.array([-0.25, 0.05, 0.4, 0.66, 0.66, 0.4, 0.05, -0.25])
        shapes.append((curve(x, y), dark, 0.0))
    elif person.style == "bob":
        shapes.append((RING * (half + 0.10, 0.44) + (0, 0.02), dark, 0.0))
    elif person.style == "bun":
        shapes.append((RING * (0.15, 0.13) + (0, -0.56), dark, 0.0))
    neck = np.array([[-0.15, 0.25], [0.15, 0.25], [0.17, 0.66], [-0.17, 0.66]])
    shapes.append((neck, shade(person.skin, 0.84), 0.0))
    rise = np.array([1.1, 0.80, 0.70, 0.64, 0.60, 0.645, 0.66, 0.645, 0.60, 0.64, 0.70, 0.80, 1.1])
    side = np.array([-0.8, -0.72, -0.6, -0.38, -0.19, -0.1, 0.0, 0.1, 0.19, 0.38, 0.6, 0.72, 0.8])
    body = np.concatenate([curve(side, rise), [[0.95, 1.4], [-0.95, 1.4]]])
    shapes.append((body, person.shirt, 0.0))
    shapes.append((RING * (half + 0.055, 0.385) + (0, -0.14), person.hair, 0.0))
    if person.style == "curly":
        for angle in np.linspace(np.pi * 0.92, np.pi * 2.08, 10):
            centre = (np.cos(angle) * (half + 0.05), np.sin(angle) * 0.40 - 0.10)
            shapes.append((RING * 0.11 + centre, person.hair, 0.0))
    for end in (-1, 1):
        ear = RING * (0.055, 0.085) + (end * person.width * 0.49, 0.05)
        shapes.append((ear, shade(person.skin, 0.92), 0.1))
    return tuple(shapes)


@lru_cache(maxsize=1024)
def _fringe(person: Speaker) -> tuple[Shape, ...]:
    line = {"short": -0.29, "long": -0.29, "bun": -0.33, "curly": -0.29, "bob": -0.255}
    sweep = 0.05 * _ARCH if person.style in ("short", "bun") else -0.03 * _ARCH
    x = _ARCH * (person.width / 2 + 0.012)
    rim = line[person.style] + 0.20 * np.abs(_ARCH) ** 3 + sweep
    crown = -0.13 - 0.37 * np.sqrt(1 - _ARCH**2)
    return ((band(x, crown, rim), person.hair, 0.35),)


@lru_cache(maxsize=1024)
def _cap(person: Speaker) -> tuple[Shape, ...]:
    half, colour = person.width / 2 + 0.06, shade(person.shirt, 0.8)
    x, arch = _ARCH * half, np.sqrt(1 - _ARCH**2)
    crown = band(x, -0.285 - 0.27 * arch, np.full(17, -0.27))
    brim = band(x * 1.02, -0.295 - 0.05 * arch, np.full(17, -0.255) - 0.02 * arch)
    return (crown, colour, 0.2), (brim, shade(colour, 0.72), 0.45)


_BOW = np.linspace(-1, 1, 9)
_ROUND = 1 - _BOW**2
_FULL = 1 - np.abs(_BOW) ** 1.8
_CUPID = 1 - 0.35 * np.exp(-((_BOW / 0.22) ** 2))
_EVEN = np.linspace(0, 1, 7)
_SHORT = np.linspace(-1, 1, 5)
_SIDES = (-1, 1)
_WHITE, _LASH, _PUPIL = (252, 252, 250), (38, 28, 30), (20, 16, 20)
_MOUTH = 0.285


def eye_x(person: Speaker) -> float:
    """Distance of an eye from the face's vertical axis."""
    return person.eye_gap * 0.82


def draw_features(
    pen: Pen, person: Speaker, units: Units, speech: float, closed: float, gaze: float
) -> None:
    """Draw all features except the brows.

    Args:
        pen: draws into the frame.
        person: the speaker.
        units: action unit intensities.
        speech: how far speech opens the mouth, 0..1.
        closed: how far a blink closes the lids, 0..1.
        gaze: horizontal direction of the eyes, -1..1.
    """
    blush = mixed(person.skin, (226, 106, 96), 0.18 + 0.16 * units["AU6"])
    for side in _SIDES:
        x, y = side * person.width * 0.30, 0.14 - 0.035 * units["AU6"]
        pen.disc(x, y, 0.075, 0.05, blush, 0.6)
    _nose(pen, person, units)
    for side in _SIDES:
        _eye(pen, person, side, units, closed, gaze)
        _folds(pen, person, side, units)
    _mouth(pen, person, units, speech)


def draw_brows(pen: Pen, person: Speaker, units: Units) -> None:
    """Draw the brows: AU1 and AU2 raise their inner and outer ends; AU4 lowers them and draws them
    together."""
    inner, outer, frown = units["AU1"], units["AU2"], units["AU4"]
    base = -person.eye_size - 0.038
    lift = 0.012 * units["AU5"]
    near = eye_x(person) - person.eye_size * 1.02 - 0.030 * frown
    far = eye_x(person) + person.eye_size * 1.12
    y_in = base + 0.010 - 0.095 * inner + 0.080 * frown * (1 - 0.5 * inner) - lift
    y_out = base + 0.016 - 0.085 * outer + 0.050 * inner * (1 - outer) - 0.020 * frown - lift
    y_mid = base - 0.020 - 0.040 * inner - 0.060 * outer + 0.038 * frown - lift
    y_mid += 0.034 * inner * (1 - outer)  # without AU2 the brow is straight and oblique
    peak = 2 * y_mid - 0.5 * (y_in + y_out)
    y = (1 - _EVEN) ** 2 * y_in + 2 * _EVEN * (1 - _EVEN) * peak + _EVEN**2 * y_out
    x = near + (far - near) * _EVEN
    half = person.brow * (0.74 - 0.46 * _EVEN**2)
    colour = shade(mixed(person.hair, (40, 28, 26), 0.55), 0.9)
    for side in _SIDES:
        pen.fill(band(side * x, y - half, y + half), colour, 0.8)
    line = shade(person.skin, 0.74)
    if frown > 0.3:
        for side in _SIDES:
            pen.stroke(
                np.array([[0.02, y_in - 0.025], [0.013, y_in + 0.03]]) * (side, 1), line, 0.012, 0.8
            )
    if max(inner, outer) > 0.35:
        pen.stroke(curve(_SHORT * 0.12, base - 0.135 + 0.012 * _SHORT**2), line, 0.010, 0.6)


def _nose(pen: Pen, person: Speaker, units: Units) -> None:
    wrinkle = units["AU9"]
    tip = person.nose - 0.012 - 0.028 * wrinkle
    wide = 0.040 * (1 + 0.5 * wrinkle)
    dark = shade(person.skin, 0.74)
    pen.stroke(np.array([[0.014, 0.01], [0.030, tip - 0.03]]), shade(person.skin, 0.88), 0.014)
    pen.stroke(curve(_SHORT * wide, tip - 0.016 * _SHORT**2), dark, 0.018)
    if wrinkle > 0.1:
        colour = mixed(person.skin, dark, min(1.0, 0.4 + wrinkle))
        for y in (-0.03, 0.005, 0.04):
            pen.stroke(
                curve(_SHORT * (0.03 + 0.02 * wrinkle), y + 0.016 * _SHORT**2), colour, 0.012
            )


def _folds(pen: Pen, person: Speaker, side: int, units: Units) -> None:
    """Draw the crow's feet of raised cheeks, and the folds from nose to mouth."""
    raised, smile, line = units["AU6"], units["AU12"], shade(person.skin, 0.74)
    if raised > 0.25:
        corner = side * (eye_x(person) + person.eye_size + 0.018)
        for slope in (-0.03, 0.015):
            tip = [corner + side * 0.05 * raised, slope]
            pen.stroke(np.array([[corner, 0.0], tip]), line, 0.012, 0.6)
    fold = max(smile, 0.8 * units["AU9"])
    if fold > 0.2:
        bend = np.array([[0.085, 0.12], [0.13, 0.17], [0.145, 0.17 + 0.07 * fold]])
        pen.stroke((bend + np.array([0.03 * smile, 0.0])) * (side, 1), line, 0.014, 0.8)


def _eye(pen: Pen, person: Speaker, side: int, units: Units, closed: float, gaze: float) -> None:
    """Draw white, iris and pupil, then skin where the lids cover them, then the lids' edges."""
    x, half = side * eye_x(person), person.eye_size
    tight, wide, skin = units["AU7"], units["AU5"], person.skin
    low = half * 0.46 * (1 + 0.2 * wide - 0.75 * tight - 0.65 * units["AU6"])
    high = half * 0.56 * (1 + 0.85 * wide - 0.5 * tight - 0.15 * units["AU6"])
    high = high * (1 - closed) - 0.8 * low * closed
    across = x + _BOW * half
    upper, lower = -high * _ROUND, low * _ROUND
    pen.fill(band(across, upper, lower), _WHITE, 0.8)
    radius, centre = half * 0.50, x + 0.014 * gaze
    pen.disc(centre, -0.004, radius, radius, person.iris, 0.8)
    pen.disc(centre, -0.004, radius * 0.55, radius * 0.55, _PUPIL, 0.8)
    pen.disc(
        centre - radius * 0.35, -0.004 - radius * 0.4, radius * 0.27, radius * 0.27, _WHITE, 0.8
    )
    pen.fill(_cover(across, upper, -half * 1.12), skin, 0.8)
    pen.fill(_cover(across, lower, half * 0.80), skin, 0.8)
    pen.stroke(curve(across, lower), shade(skin, 0.68), 0.010, 0.8)
    pen.stroke(curve(across, upper), _LASH, 0.024, 0.8)
    if tight > 0.25:
        pen.stroke(curve(across, lower + 0.024)[2:-2], shade(skin, 0.76), 0.012, 0.8)


def _cover(x: Floats, edge: Floats, far: float) -> Floats:
    """Outline of the area between a lid's edge and a horizontal line beyond the eye."""
    points = np.empty((len(x) + 2, 2))
    points[:-2, 0], points[:-2, 1] = x, edge
    points[-2], points[-1] = (x[-1], far), (x[0], far)
    return points


def _mouth(pen: Pen, person: Speaker, units: Units, speech: float) -> None:
    """Draw the lips between two corners. AU12, AU15 and AU20 move the corners, AU23 thins the lips,
    AU25 and AU26 open them."""
    smile, frown, stretch = units["AU12"], units["AU15"], units["AU20"]
    press, jaw = units["AU23"], units["AU26"]
    half = person.mouth / 2
    half *= 1 + 0.40 * smile + 0.45 * stretch - 0.22 * press - 0.25 * jaw - 0.06 * frown
    middle = _MOUTH + 0.014 * smile - 0.030 * frown + 0.02 * jaw
    corner = _MOUTH - 0.075 * smile + 0.068 * frown + 0.016 * stretch
    gap = 0.032 * units["AU25"] + 0.125 * jaw + 0.038 * speech * (1 - 0.6 * press)
    thin = 1 - 0.65 * press
    x, line = _BOW * half, corner + (middle - corner) * _ROUND
    upper, lower = line - 0.2 * gap * _FULL, line + 0.8 * gap * _FULL
    lip = mixed(person.skin, (178, 62, 70), 0.55)
    bow, full = 0.024 * thin * _FULL * _CUPID, 0.034 * thin * _FULL
    pen.fill(band(x, upper - bow, lower + full), lip, 0.95)
    if gap > 0.010:
        pen.fill(band(x * 0.93, upper, lower), (88, 24, 34), 0.95)
        tooth = min(0.026, 0.6 * gap) * min(1.0, smile + stretch + 0.4 * jaw)
        if tooth > 0.005:
            pen.fill(band(x * 0.84, upper, upper + tooth * _FULL), (250, 248, 242), 0.95)
        if jaw > 0.4:
            tongue = (204, 92, 98)
            pen.disc(0.0, middle + 0.62 * gap, half * 0.45, 0.16 * gap, tongue, 0.95)
    else:
        pen.stroke(curve(x, line), shade(lip, 0.55), 0.014, 0.95)
    if frown > 0.25 or press > 0.3:
        chin = curve(_SHORT * 0.06, 0.385 + 0.018 * _SHORT**2)
        pen.stroke(chin, shade(person.skin, 0.80), 0.012, 0.8)


_RISE, _FALL = 0.30, 0.25  # seconds of onset and offset
_BLINK = 0.09  # half the length of a blink, in seconds


def frame_times(config: WorldConfig) -> Floats:
    """(F,) times of the frames in seconds."""
    form = config.media
    return np.arange(round(form.fps * form.seconds)) / form.fps


def envelope(plan: ClipPlan, times: Floats) -> Floats:
    """Intensity of the expression at each time, 0..1: onset, apex and offset."""
    rise = np.clip((times - plan.onset) / _RISE, 0, 1)
    fall = np.clip((plan.offset - times) / _FALL, 0, 1)
    level = np.minimum(rise, fall)
    return level * level * (3 - 2 * level)


def pose_at(plan: ClipPlan, time: float, size: int) -> Pose:
    """The head's pose at a time, with a little sway."""
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
    """Boxes around the face with the eyes' positions (image-left first), in pixels rounded to
    0.1."""
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
    """(F, size, size, 3) frames, including the room's light and the camera's blur and noise."""
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
