"""The features that action units move: brows, eyes, nose, cheeks and mouth.

``units`` holds the intensity of every action unit now, 0..1 (Ekman & Friesen's FACS).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmemo.world.pen import Floats, Pen, band, curve, mixed, shade
from mmemo.world.people import Speaker

Units = Mapping[str, float]

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
    """Distance of an eye from the middle of the face."""
    return person.eye_gap * 0.82


def draw_features(
    pen: Pen, person: Speaker, units: Units, speech: float, closed: float, gaze: float
) -> None:
    """Everything below the hairline but the brows. ``closed``: how shut a blink has the lids."""
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
    """AU1 and AU2 raise the inner and outer brow, AU4 lowers both and draws them together."""
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
    """Crow's feet of raised cheeks, and the folds from nose to mouth."""
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
    """White, iris and pupil, then skin over what the lids hide, then the lids' lines."""
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
    """The area between a lid's edge and a level line beyond the eye."""
    points = np.empty((len(x) + 2, 2))
    points[:-2, 0], points[:-2, 1] = x, edge
    points[-2], points[-1] = (x[-1], far), (x[0], far)
    return points


def _mouth(pen: Pen, person: Speaker, units: Units, speech: float) -> None:
    """Lips between two corners; AU12, 15 and 20 move the corners, 23 thins, 25 and 26 open."""
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
