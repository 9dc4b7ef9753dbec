"""The parts of a head that no action unit moves: shoulders, hair, ears, cap, the face's rim."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmemo.world.pen import RING, Floats, Pen, Shape, band, curve, mixed, shade
from mmemo.world.people import Speaker

_LOW = np.maximum(RING[:, 1], 0)
_ARCH = np.linspace(-1, 1, 17)


@lru_cache(maxsize=1024)
def _rim(width: float, jaw: float) -> Floats:
    x = RING[:, 0] * width / 2 * (1 - (1 - jaw) * 1.3 * _LOW**1.6)
    return curve(x, np.where(RING[:, 1] > 0, RING[:, 1] * 0.475, RING[:, 1] * 0.44))


def outline(person: Speaker, drop: float = 0.0) -> Floats:
    """(48, 2) the face's rim: an ellipse, narrower at the jaw, which ``drop`` moves down."""
    rim = _rim(person.width, person.jaw)
    return rim + _LOW[:, None] * (0.0, drop) if drop else rim


def draw_behind(pen: Pen, person: Speaker) -> None:
    """Everything that lies behind the face."""
    pen.shapes(_behind(person))


def draw_skull(pen: Pen, person: Speaker, drop: float) -> None:
    """The face itself, without features; ``drop`` lowers the jaw."""
    rim = outline(person, drop)
    pen.fill(rim, shade(person.skin, 0.80), 0.3)
    pen.fill(rim * (0.972, 0.984), person.skin, 0.3)
    if person.beard:
        low = rim[2:23] * (0.985, 0.992)  # right to left along the jaw
        upper = curve(low[:, 0] * 0.80, 0.17 + 0.16 * np.abs(low[:, 0]))
        beard = mixed(person.skin, person.hair, 0.6)
        pen.fill(np.concatenate([low, upper[::-1]]), beard, 0.4)


def draw_before(pen: Pen, person: Speaker) -> None:
    """The hair over the forehead."""
    pen.shapes(_fringe(person))


def draw_cap(pen: Pen, person: Speaker) -> None:
    """A cap with a brim, high enough to leave the brows free."""
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
