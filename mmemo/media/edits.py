"""Small edits of decoded sounds and pictures that should not change what a model hears and sees.

The sound's edits and strengths are those of audEERING's tests of speech emotion models
(ser-tests; Wagner et al., Dawn of the Transformer Era, arXiv 2203.07378): an additive tone of 5 to
7 kHz, appended zeros, a cropped start or end, clipping, gain, and a first-order high-pass filter.
The picture's edits are of the usual kinds; their strengths are chosen here.

Everything is deterministic: the tone's frequency is drawn by the file's digest.

Shapes: F frames, H x W pixels, S audio samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmemo.data.sample import Modality
from mmemo.errors import MediaError

Frames = NDArray[np.uint8]
Wave = NDArray[np.float32]

TONE_HZ = (5000.0, 7000.0)
"""The range that the frequency of the tone is drawn from."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit: what it changes, of which kind it is, and how strong."""

    stream: Literal["sound", "picture"]
    kind: str
    amount: float
    title: str


def _edits() -> dict[str, Edit]:
    found: dict[str, Edit] = {}

    def add(stream: Literal["sound", "picture"], kind: str, amounts: str, title: str) -> None:
        for text in amounts.split():
            found[f"{kind}_{text}"] = Edit(stream, kind, float(text), title.format(text))

    add("sound", "tone", "40 45 50", "Tone of 5–7 kHz at an SNR of {} dB")
    add("sound", "zeros", "100 500 1000", "{} zeros appended")
    add("sound", "crop_start", "100 500 1000", "First {} samples cropped")
    add("sound", "crop_end", "100 500 1000", "Last {} samples cropped")
    add("sound", "clip", "0.1 0.2 0.3", "{} % of the samples clipped")
    add("sound", "gain", "-2 -1 1 2", "Gain of {} dB")
    add("sound", "highpass", "50 100 150", "High-pass at {} Hz")
    add("picture", "brightness", "0.9 1.1", "Brightness times {}")
    add("picture", "jpeg", "90 70 50", "JPEG of quality {}")
    add("picture", "blur", "1 2", "Gaussian blur of {} px")
    add("picture", "resize", "0.75 0.5", "Resized to {} and back")
    return found


EDITS: Mapping[str, Edit] = _edits()
"""Every edit by its name. Counts of samples are at the model's sample rate."""


def concerns(edit: str, modality: Modality) -> bool:
    """Whether an edit changes a stream."""
    return (EDITS[edit].stream == "sound") == (modality == "audio")


def edit_sound(wave: Wave, rate: int, edit: str, digest: str, name: str) -> Wave:
    """The sound (S,) float32 in [-1, 1] at ``rate`` Hz with an edit of sounds; as it is with an
    edit of pictures.

    Args:
        digest: that of the file, which draws what is random.
        name: the file's name in errors.

    Raises:
        MediaError: the sound is too short to be cropped, or ``rate`` too low for the tone.
    """
    one = EDITS[edit]
    if one.stream != "sound":
        return wave
    if one.kind == "tone":
        found = wave + _tone(wave, rate, one.amount, digest, name)
    elif one.kind == "zeros":
        found = np.concatenate([wave, np.zeros(int(one.amount), dtype=np.float32)])
    elif one.kind in ("crop_start", "crop_end"):
        count = int(one.amount)
        if count >= len(wave):
            detail = f"has {len(wave)} samples, too few to crop {count}"
            raise MediaError(name, "no_audio", detail)
        found = wave[count:] if one.kind == "crop_start" else wave[:-count]
    elif one.kind == "clip":
        # So many samples of the largest magnitude are cut to that of the next smaller one.
        count = round(len(wave) * one.amount / 100)
        level = np.sort(np.abs(wave))[len(wave) - 1 - count]
        found = np.clip(wave, -level, level)
    elif one.kind == "gain":
        found = wave * 10 ** (one.amount / 20)
    else:
        found = _highpass(wave, rate, one.amount)
    return np.ascontiguousarray(np.clip(found, -1, 1), dtype=np.float32)


def edit_frames(frames: Frames, edit: str) -> Frames:
    """The frames (F, H, W, 3) uint8 RGB with an edit of pictures, in the same size; as they are
    with an edit of sounds."""
    one = EDITS[edit]
    if one.stream != "picture":
        return frames
    cv2: Any = _cv2()
    height, width = frames.shape[1:3]
    if one.kind == "brightness":
        return np.clip(np.rint(frames.astype(np.float32) * one.amount), 0, 255).astype(np.uint8)

    def jpeg(frame: Frames) -> Any:
        # OpenCV's order of colours is BGR.
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(one.amount)]
        coded = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), quality)[1]
        return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]

    def blur(frame: Frames) -> Any:
        return cv2.GaussianBlur(frame, (0, 0), one.amount)

    def resize(frame: Frames) -> Any:
        small = (max(1, round(width * one.amount)), max(1, round(height * one.amount)))
        less = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(less, (width, height), interpolation=cv2.INTER_LINEAR)

    change = {"jpeg": jpeg, "blur": blur, "resize": resize}[one.kind]
    return np.stack([np.asarray(change(frame), dtype=np.uint8) for frame in frames])


def _tone(wave: Wave, rate: int, snr_db: float, digest: str, name: str) -> NDArray[np.float64]:
    """A sine whose power is that of the sound, less ``snr_db``."""
    if rate < 2 * TONE_HZ[1]:
        detail = f"at {rate} Hz there is no tone of up to {TONE_HZ[1]:g} Hz; leave the tone out"
        raise MediaError(name, "no_audio", detail)
    seed = int.from_bytes(hashlib.sha256(f"tone/{digest}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(*TONE_HZ), rng.uniform(0, 2 * np.pi)
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    # The power of a sine is half of its squared amplitude.
    amplitude = np.sqrt(2 * power * 10 ** (-snr_db / 10))
    return amplitude * np.sin(2 * np.pi * frequency / rate * np.arange(len(wave)) + phase)


def _highpass(wave: Wave, rate: int, cut_off: float) -> NDArray[np.float64]:
    """A Butterworth filter of the first order: -3 dB at the cut-off, 6 dB per octave below."""
    import scipy.signal

    signal: Any = scipy.signal
    forward, backward = signal.butter(1, cut_off, "highpass", fs=rate)
    return np.asarray(signal.lfilter(forward, backward, wave.astype(np.float64)))


def _cv2() -> Any:
    import cv2

    return cv2
