from __future__ import annotations

import struct
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from mmemo.media.display import Display, deinterlace, oriented, pixel_aspect

# Two rows of three pixels, each of another value: rows 012 and 345.
STORED = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 3, axis=2)


def turned(matrix: tuple[float, float, float, float]) -> Display:
    a, b, c, d = (round(value * 65536) for value in matrix)
    data = struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return oriented(data, 1.0)


@pytest.mark.parametrize(
    ("matrix", "rows", "rotation", "mirrored"),
    [
        ((1, 0, 0, 1), "012 345", 0, False),
        ((0, 1, -1, 0), "30 41 52", 90, False),
        ((-1, 0, 0, -1), "543 210", 180, False),
        ((0, -1, 1, 0), "25 14 03", 270, False),
        ((-1, 0, 0, 1), "210 543", 0, True),
        ((1, 0, 0, -1), "345 012", 180, True),
        ((0, 1, 1, 0), "03 14 25", 270, True),
        ((0, -1, -1, 0), "52 41 30", 90, True),
        ((0.998, 0.05, -0.05, 0.998), "012 345", 0, False),  # nearly upright
        ((0, 0, 0, 0), "012 345", 0, False),  # no matrix for display
        ((2, 0, 0, 1), "012 345", 0, False),
    ],
)
def test_the_matrix_moves_pixels(
    matrix: tuple[float, float, float, float], rows: str, rotation: int, mirrored: bool
) -> None:
    display = turned(matrix)
    shown = display.orient(STORED)[:, :, 0]
    assert [[int(value) for value in row] for row in rows.split()] == shown.tolist()
    assert (display.rotation, display.mirrored) == (rotation, mirrored)
    again = STORED[:, ::-1] if mirrored else STORED
    np.testing.assert_array_equal(np.rot90(again, -rotation // 90)[:, :, 0], shown)


def test_the_short_side_grows_and_turns_with_the_picture() -> None:
    assert Display(64 / 45).size(720, 576) == (1024, 576)
    assert Display(0.5).size(100, 60) == (100, 120)
    assert Display(2.0, transposed=True).size(100, 60) == (60, 200)
    wide = Display(2.0, transposed=True)
    assert wide.stretch(wide.orient(STORED)).shape == (6, 2, 3)
    square = Display()
    assert square.stretch(STORED) is STORED


@pytest.mark.parametrize(
    ("stored", "aspect"),
    [
        (None, 1),
        (Fraction(0), 1),
        (Fraction(4, 3), 4 / 3),
        (Fraction(1000), 1),
        (Fraction(1, 99), 1),
    ],
)
def test_an_impossible_aspect_is_none(stored: Any, aspect: float) -> None:
    assert pixel_aspect(SimpleNamespace(sample_aspect_ratio=stored)) == pytest.approx(aspect)


def test_lines_that_do_not_move_are_taken_from_the_neighbours() -> None:
    """A still picture of fine lines is unchanged; alone, its other field can only be guessed."""
    still = np.zeros((48, 64, 3), np.uint8)
    still[::3] = 255
    frames = [av.VideoFrame.from_ndarray(still, format="rgb24") for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, Fraction(1, 25)
    whole = deinterlace(*frames).to_ndarray(format="rgb24")
    assert np.abs(whole.astype(int) - still).mean() < 2
    lone = deinterlace(None, frames[1], None)
    assert (lone.width, lone.height) == (64, 48)
