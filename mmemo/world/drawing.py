"""Anti-aliased drawing in head coordinates, and the pose of the head in a frame.

Head coordinates are in units of the head's height, with x to the image's right, y down, and the
origin between the eyes. N points; frames are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
Shape = tuple[Floats, Colour, float]  # points, colour, depth

_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
_ROLL = 11.0  # degrees at roll 1
_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
RING: Floats = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
"""(48, 2) points of the unit circle."""
_COARSE: Floats = np.ascontiguousarray(RING[::2])


@dataclass(frozen=True, slots=True)
class Pose:
    """Pose of the head in one frame: position of the origin in pixels, ``scale`` (the head's height
    in pixels), and ``yaw`` and ``roll`` from -1 to 1, image-right positive."""

    x: float
    y: float
    scale: float
    yaw: float
    roll: float

    def frame(self, depth: float) -> tuple[Floats, Floats]:
        """Matrix and offset of the affine map to pixels, for points at a depth between the skull's
        rim (0) and the nose (1)."""
        angle = np.deg2rad(self.roll * _ROLL)
        cos, sin = self.scale * np.cos(angle), self.scale * np.sin(angle)
        narrow, shift = 1 - 0.07 * abs(self.yaw), 0.075 * self.yaw * depth
        matrix = np.array([[cos * narrow, sin * narrow], [-sin, cos]])
        return matrix, np.array([self.x + shift * cos, self.y + shift * sin])

    def pixels(self, points: Floats, depth: float = 1.0) -> Floats:
        """(N, 2) head coordinates to (N, 2) pixels."""
        matrix, offset = self.frame(depth)
        return points @ matrix + offset


class Pen:
    """Draws shapes in head coordinates into one frame, in place."""

    def __init__(self, frame: Image, pose: Pose) -> None:
        self.frame, self.pose = frame, pose
        self._maps: dict[float, tuple[Floats, Floats]] = {}

    def shapes(self, shapes: Sequence[Shape]) -> None:
        """Draw filled polygons, in order."""
        for points, colour, depth in shapes:
            self.fill(points, colour, depth)

    def fill(self, points: Floats, colour: Colour, depth: float = 1.0) -> None:
        """Draw a filled polygon."""
        cv2.fillPoly(self.frame, [self._fixed(points, depth)], colour, cv2.LINE_AA, _SHIFT)

    def stroke(self, points: Floats, colour: Colour, width: float, depth: float = 1.0) -> None:
        """Draw an open line, ``width`` head heights thick but at least one pixel."""
        thick = max(1, round(width * self.pose.scale))
        fixed = self._fixed(points, depth)
        cv2.polylines(self.frame, [fixed], False, colour, thick, cv2.LINE_AA, _SHIFT)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour, depth: float) -> None:
        """Draw a filled ellipse with radii ``rx`` and ``ry``."""
        self.fill(_COARSE * (rx, ry) + (x, y), colour, depth)

    def _fixed(self, points: Floats, depth: float) -> NDArray[np.int32]:
        if depth not in self._maps:
            matrix, offset = self.pose.frame(depth)
            self._maps[depth] = matrix * (1 << _SHIFT), offset * (1 << _SHIFT) + 0.5
        matrix, offset = self._maps[depth]
        return (points @ matrix + offset).astype(np.int32)


def curve(x: Floats | float, y: Floats) -> Floats:
    """(N, 2) points from their coordinates."""
    points = np.empty((len(y), 2))
    points[:, 0], points[:, 1] = x, y
    return points


def band(x: Floats, upper: Floats, lower: Floats) -> Floats:
    """(2N, 2) outline of the area between two curves over the same x."""
    count = len(x)
    points = np.empty((2 * count, 2))
    points[:count, 0], points[:count, 1] = x, upper
    points[count:, 0], points[count:, 1] = x[::-1], lower[::-1]
    return points


@lru_cache(maxsize=4096)
def shade(colour: Colour, factor: float) -> Colour:
    """The colour, lighter (factor above 1) or darker."""
    red, green, blue = (max(0, min(255, round(part * factor))) for part in colour)
    return red, green, blue


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """``one`` mixed with a ``share`` of ``other``."""
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
