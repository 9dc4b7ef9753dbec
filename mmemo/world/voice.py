"""The voice: speech synthesis, its audible attributes, and measures of pitch and level.

Source-filter synthesis (Fant 1960) in the short-time spectrum: frames of a glottal pulse train with
jitter and breath are multiplied by the transfer function of the spoken line's formants, and
overlap-added. Affect shifts mean F0, F0 range, level, rate, final contour and breathiness from the
speaker's resting values. :func:`pitch_track` and :func:`voice_summary` measure a waveform alone,
with F0 by normalised autocorrelation.

S samples, T analysis frames, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmemo.world.people import syllables
from mmemo.world.plan import ClipPlan

Floats = NDArray[np.float64]

LEVEL = 10 ** (-26 / 20)
"""RMS of resting speech, at a full scale of 1."""
LEAD = 0.12
"""Silence before the first syllable, in seconds."""
_WINDOW, _HOP = 512, 256  # Hann windows at half overlap add up to one
_VOWELS: Mapping[str, tuple[float, float, float]] = {
    "a": (730.0, 1250.0, 2500.0),
    "e": (520.0, 1850.0, 2500.0),
    "i": (290.0, 2250.0, 2950.0),
    "o": (480.0, 880.0, 2450.0),
    "u": (320.0, 820.0, 2300.0),
}
_OPEN: Mapping[str, float] = {"a": 1.0, "e": 0.65, "i": 0.35, "o": 0.75, "u": 0.3}
# Consonant class -> (voiced level, noise level, F1, F2 of its target).
_CONSONANTS: Mapping[str, tuple[float, float, float, float]] = {
    "stop": (0.0, 0.5, 300.0, 1700.0),
    "voiced": (0.3, 0.15, 250.0, 1500.0),
    "noise": (0.1, 0.6, 320.0, 1800.0),
    "nasal": (0.45, 0.0, 270.0, 1100.0),
    "glide": (0.6, 0.0, 330.0, 1300.0),
    "none": (0.8, 0.0, 450.0, 1500.0),
}
_F0_WINDOW, _F0_STEP = 0.045, 0.01  # seconds
_F0_LOWEST, _F0_HIGHEST = 60.0, 600.0  # Hz
_VOICED = 0.6  # minimum correlation of a voiced window


@dataclass(frozen=True, slots=True)
class Delivery:
    """The voice of a clip, in physical units.

    ``pitch``: mean F0 in Hz. ``spread``: standard deviation of F0 in semitones. ``slope``: rise
    over the line in semitones. ``level``: dB above rest. ``rate``: syllables per second.
    ``breath``: breathiness, 0..1.
    """

    pitch: float
    spread: float
    slope: float
    level: float
    rate: float
    breath: float


def delivery(plan: ClipPlan) -> Delivery:
    """The speaker's resting values, shifted by the clip's prosody."""
    move, person = plan.prosody, plan.speaker
    return Delivery(
        pitch=person.pitch * 2 ** (0.5 * move["pitch"]),
        spread=1.6 * 2 ** (1.2 * move["pitch_range"]),
        slope=8.0 * move["slope"],
        level=person.loudness + 9.0 * move["loudness"],
        rate=person.rate * 2 ** (0.5 * move["rate"]),
        breath=float(np.clip(person.breath + 0.4 * move["breathiness"], 0.0, 1.0)),
    )


def attributes(plan: ClipPlan) -> dict[str, float]:
    """Audible attributes, 0..1: on one scale for all speakers, and (``_rel``) relative to the
    speaker's resting values."""
    voice = delivery(plan)
    absolute = {
        "pitch": np.log2(voice.pitch / 70) / np.log2(450 / 70),
        "pitch_range": np.log2(voice.spread / 0.65) / np.log2(4.0 / 0.65),
        "loudness": (voice.level + 13.5) / 27,
        "rate": (voice.rate - 2.2) / 5.0,
        "slope": (voice.slope + 9) / 18,
        "breathiness": voice.breath,
    }
    relative = {f"{name}_rel": (value + 1.1) / 2.2 for name, value in plan.prosody.items()}
    music = {"music": float(plan.scene.music != "none")}
    values = {**absolute, **relative, **music}
    return {name: round(float(np.clip(value, 0, 1)), 3) for name, value in values.items()}


def mouth_opening(plan: ClipPlan, times: Floats) -> Floats:
    """How far speech opens the mouth at each time, 0..1."""
    length = 1 / delivery(plan).rate
    sounds = syllables(plan.line)
    position = (times - LEAD) / length
    index = np.floor(position).astype(int)
    inside = (index >= 0) & (index < len(sounds))
    wide = np.array([_OPEN[vowel] for _, vowel in sounds])[np.clip(index, 0, len(sounds) - 1)]
    phase = np.clip(position - index, 0, 1)
    return np.where(inside, wide * np.sin(np.pi * phase) ** 0.8, 0.0)


def pitch_contour(plan: ClipPlan, times: Floats) -> Floats:
    """F0 in Hz at each time; its mean over the line is the delivery's pitch."""
    voice = delivery(plan)
    sounds = syllables(plan.line)
    rng = np.random.default_rng([plan.seed, 1])
    accents = rng.normal(size=len(sounds) + 2)
    accents -= accents.mean()
    accents /= max(float(accents.std()), 1e-3)
    centres = LEAD + (np.arange(-1, len(sounds) + 1) + 0.5) / voice.rate
    end = LEAD + len(sounds) / voice.rate
    progress = np.clip((times - LEAD) / (end - LEAD), 0, 1)
    # Most of the rise or fall happens in the last third of the line.
    ramp = 0.4 * (progress - 0.5) + 0.6 * (np.clip((progress - 0.55) / 0.45, 0, 1) - 0.225)
    steps = voice.spread * np.interp(times, centres, accents) + voice.slope * ramp
    flutter = np.interp(times, np.arange(0, times[-1] + 0.02, 0.01), _flutter(rng, times[-1]))
    return voice.pitch * 2 ** ((steps + 0.12 * flutter) / 12)


def _flutter(rng: np.random.Generator, last: float) -> Floats:
    return rng.normal(size=len(np.arange(0, last + 0.02, 0.01)))


def speak(plan: ClipPlan, seconds: float, rate: int) -> Floats:
    """Synthesise the voice alone: (S,) at ``rate`` Hz, at a full scale of 1."""
    voice = delivery(plan)
    count = round(seconds * rate)
    rng = np.random.default_rng([plan.seed, 2])
    padded = -(-count // _HOP) * _HOP + 2 * _WINDOW
    coarse = np.arange(0, padded, 80) / rate
    f0 = np.interp(np.arange(padded) / rate, coarse, pitch_contour(plan, coarse))
    phase = np.cumsum(f0) / rate
    source = _pulse()[(phase * 4096).astype(np.int64) & 4095]
    hiss = rng.standard_normal(padded, np.float32)
    starts = np.arange(0, padded - _WINDOW, _HOP)
    window = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)
    index = starts[:, None] + np.arange(_WINDOW)
    tracks = _tracks(plan, starts / rate, seconds).astype(np.float32)
    bins = np.asarray(np.fft.rfftfreq(2 * _WINDOW, 1 / rate), np.float32)
    filters = _formants(bins, tracks[:, 2:5] * plan.speaker.formants, voice.breath)
    voiced = np.fft.rfft(source[index] * window, 2 * _WINDOW)
    noisy = np.fft.rfft(hiss[index] * window, 2 * _WINDOW)
    aspiration = 0.02 + 0.5 * voice.breath**2
    friction = 0.35 / (1 + ((bins - 4200) / 1500) ** 2)
    spectrum = (voiced + 0.12 * aspiration * noisy) * filters * tracks[:, :1]
    spectrum += noisy * friction * tracks[:, 1:2]
    frames = np.asarray(np.fft.irfft(spectrum), np.float64)
    out = np.zeros(padded + 2 * _WINDOW)
    for part in range(2 * _WINDOW // _HOP):  # overlap-add, a whole diagonal at a time
        piece = frames[:, part * _HOP : (part + 1) * _HOP].ravel()
        out[part * _HOP : part * _HOP + len(piece)] += piece
    out = out[_WINDOW // 2 : _WINDOW // 2 + count]
    active = np.interp(np.arange(count), starts, tracks[:, 0]) > 0.05
    power = float(np.sqrt(np.mean(out[active] ** 2))) if active.any() else 1.0
    return out * (LEVEL * 10 ** (voice.level / 20) / max(power, 1e-9))


@lru_cache(maxsize=1)
def _pulse() -> NDArray[np.float32]:
    """One period of a Rosenberg pulse's derivative: opening until 0.4, closing until 0.58."""
    phase = (np.arange(4096) + 0.5) / 4096
    opening = np.where(phase < 0.4, np.sin(np.pi * phase / 0.4) * (np.pi / 0.8), 0.0)
    inside = (phase >= 0.4) & (phase < 0.58)
    flow = opening - np.where(inside, np.sin(np.pi * (phase - 0.4) / 0.36) * (np.pi / 0.36), 0.0)
    return (flow - flow.mean()).astype(np.float32)


def _tracks(plan: ClipPlan, times: Floats, seconds: float) -> Floats:
    """(T, 5): voiced level, friction level, F1, F2, F3 at each time, smoothed over 25 ms."""
    sounds = syllables(plan.line)
    length = 1 / delivery(plan).rate
    grid = np.arange(0.0, seconds + 0.2, 0.005)
    values = np.zeros((len(grid), 5))
    values[:, 2:] = (450.0, 1500.0, 2500.0)
    position = (grid - LEAD) / length
    for number, (consonant, vowel) in enumerate(sounds):
        onset = (position >= number) & (position < number + 0.28)
        nucleus = (position >= number + 0.28) & (position < number + 1)
        level, noise, first, second = _CONSONANTS[consonant]
        values[onset] = (level, noise, first, second, 2500.0)
        values[nucleus, 0] = 1.0 - 0.35 * (position[nucleus] - number - 0.28)
        values[nucleus, 1] = 0.0
        values[nucleus, 2:] = _VOWELS[vowel]
    kernel = np.hanning(7)[1:-1] / np.hanning(7).sum()
    smooth = np.stack([np.convolve(values[:, k], kernel, "same") for k in range(5)], axis=1)
    smooth[:3, 2:], smooth[-3:, 2:] = values[:3, 2:], values[-3:, 2:]
    tracks = [np.asarray(np.interp(times, grid, smooth[:, k]), np.float64) for k in range(5)]
    return np.stack(tracks, axis=1)


def _formants(
    bins: NDArray[np.float32], centres: NDArray[np.float32], breath: float
) -> NDArray[np.complex64]:
    """(T, K) transfer function: a cascade of four resonances and the source's spectral tilt, which
    is darker for breathy voices."""
    widths = np.array([70.0, 95.0, 140.0, 220.0], np.float32) * (1 + 0.8 * breath)
    fourth = np.full((len(centres), 1), 3600.0, np.float32)
    product = np.ones((len(centres), len(bins)), np.complex64)
    factor = np.empty_like(product)
    for centre, width in zip(np.hstack([centres, fourth]).T[:, :, None], widths, strict=True):
        factor.real = 1 - (bins / centre) ** 2
        factor.imag = bins * (width / centre**2)
        product *= factor
    corner = 500 + 3500 * (1 - breath) ** 2
    tilt = (bins / 1000 + 0.15) / np.sqrt(1 + (bins / corner) ** 2)
    return (tilt / product).astype(np.complex64)


def pitch_track(sound: Floats, rate: int) -> tuple[Floats, Floats]:
    """(T,) times in seconds and (T,) F0 in Hz, NaN in unvoiced windows."""
    size, step = round(_F0_WINDOW * rate), round(_F0_STEP * rate)
    starts = np.arange(0, len(sound) - size, step)
    windows = sound[starts[:, None] + np.arange(size)]
    windows = (windows - windows.mean(axis=1, keepdims=True)) * np.hanning(size)
    spectrum = np.abs(np.fft.rfft(windows, 2 * size)) ** 2
    shape = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
    raw = np.fft.irfft(spectrum)[:, :size]
    correlation = raw / np.maximum(raw[:, :1], 1e-12) / np.maximum(shape / shape[0], 0.1)
    first, last = round(rate / _F0_HIGHEST), round(rate / _F0_LOWEST)
    area = correlation[:, first:last]
    # The first lag that is nearly as good as the best one, which avoids octave errors downwards.
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
    """Windows far from the median of their neighbours, which are bursts mistaken for voice."""
    wide = np.stack([np.roll(track, shift) for shift in range(-4, 5)])
    known = np.isfinite(wide).sum(axis=0)
    wide[0, known == 0] = 0.0
    around = np.nanmedian(wide, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.abs(np.log2(track / around)) > 0.2) | (known < 4)


def voice_summary(sound: Floats, rate: int) -> dict[str, float]:
    """Measures of a waveform: median F0 in Hz (``pitch``), its ``spread`` and its rise over the
    line (``slope``) in semitones, ``level`` in dB, and ``seconds`` of voice."""
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
