"""Measuring a voice from its waveform alone: F0 by normalised autocorrelation, level, brightness.

S samples, T windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WINDOW, _STEP = 0.045, 0.01  # seconds
_LOWEST, _HIGHEST = 60.0, 600.0  # Hz
_VOICED = 0.6  # correlation from which a window counts as voiced


def pitch_track(sound: Floats, rate: int) -> tuple[Floats, Floats]:
    """(T,) times in seconds and (T,) F0 in Hz, NaN where there is no voice."""
    size, step = round(_WINDOW * rate), round(_STEP * rate)
    starts = np.arange(0, len(sound) - size, step)
    windows = sound[starts[:, None] + np.arange(size)]
    windows = (windows - windows.mean(axis=1, keepdims=True)) * np.hanning(size)
    spectrum = np.abs(np.fft.rfft(windows, 2 * size)) ** 2
    shape = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
    raw = np.fft.irfft(spectrum)[:, :size]
    correlation = raw / np.maximum(raw[:, :1], 1e-12) / np.maximum(shape / shape[0], 0.1)
    first, last = round(rate / _HIGHEST), round(rate / _LOWEST)
    area = correlation[:, first:last]
    # The first lag that is nearly as good as the best one: no octave errors downwards.
    best = area.max(axis=1, keepdims=True)
    peaks = np.zeros_like(area, dtype=bool)
    peaks[:, 1:-1] = (area[:, 1:-1] >= area[:, :-2]) & (area[:, 1:-1] >= area[:, 2:])
    lag = first + (peaks & (area > 0.9 * best)).argmax(axis=1)
    loud = raw[:, 0] > 0.02 * raw[:, 0].max()
    track = np.where((best[:, 0] > _VOICED) & loud, rate / lag, np.nan)
    middle = np.nanmedian(track) if np.isfinite(track).any() else 0.0
    stray = np.abs(np.log2(np.where(np.isnan(track), middle, track) / max(middle, 1.0))) > 1.2
    return (starts + size / 2) / rate, np.where(stray | _jumps(track), np.nan, track)


def _jumps(track: Floats) -> NDArray[np.bool_]:
    """Windows that are far from the median of their neighbours: bursts taken for voice."""
    wide = np.stack([np.roll(track, shift) for shift in range(-4, 5)])
    known = np.isfinite(wide).sum(axis=0)
    wide[0, known == 0] = 0.0
    around = np.nanmedian(wide, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.abs(np.log2(track / around)) > 0.2) | (known < 4)


def voice_summary(sound: Floats, rate: int) -> dict[str, float]:
    """Median F0 in Hz, its spread in semitones, rise over the line in semitones, level in dB."""
    times, track = pitch_track(sound, rate)
    voiced = ~np.isnan(track)
    if voiced.sum() < 5:
        return {"pitch": float("nan"), "spread": 0.0, "slope": 0.0, "level": -120.0}
    steps = 12 * np.log2(track[voiced])
    position = np.linspace(-0.5, 0.5, int(voiced.sum()))
    slope = float(np.polyfit(position, steps, 1)[0])
    power = np.sort(sound**2)[len(sound) // 4 :].mean()
    return {
        "pitch": float(np.median(track[voiced])),
        "spread": float((steps - slope * position).std()),
        "slope": slope,
        "level": float(10 * np.log10(power + 1e-12)),
        "seconds": float(times[voiced][-1] - times[voiced][0]),
    }
