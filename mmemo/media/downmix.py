"""Mix the channels of a sound down to one, and judge what came out.

The weights are those of ITU-R BS.775-3, table 2 (one output channel), divided by their sum so that
no mix can exceed full scale: a centre channel 1, left and right 1/sqrt(2), all others behind,
beside and above 1/2. The channel for low-frequency effects does not count, as in the standard.
Channels of which nothing is known count alike.

Shapes: C channels, n samples.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

CANCELLED = "opposite phase"
"""The channels cancel each other in the mix, so the loudest of them was taken instead."""
SILENT = "silent"
"""No sample exceeds -60 dB of full scale."""
CLIPPED = "clipped"
"""In one channel, at least 0.1% of the samples are part of a flat top at full scale."""

_FRONT, _SURROUND = 0.5**0.5, 0.5
_WEIGHTS = {
    "FC": 1.0,
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "BIL", "BIR"), _FRONT),
    **dict.fromkeys(("BL", "BR", "BC", "SL", "SR", "WL", "WR", "SDL", "SDR"), _SURROUND),
    **dict.fromkeys(("TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR", "TSL", "TSR"), _SURROUND),
    **dict.fromkeys(("BFC", "BFL", "BFR", "SSL", "SSR", "TTL", "TTR"), _SURROUND),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
    "AMBI0": 1.0,  # of an ambisonic sound, the first channel hears all directions alike
    **{f"AMBI{number}": 0.0 for number in range(1, 64)},
}
# As FFmpeg guesses them where a file has only a number of channels. Other numbers say too little.
_GUESSED = {
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
_PLANES = 8
_QUIET = 1e-3  # -60 dB
_CANCELS = 0.1  # of the power that unrelated channels would have in the mix: -10 dB
_FLAT = 3  # samples in a row at full scale: a flat top, not the tip of a wave
_CLIPPED_SHARE = 1e-3


@functools.lru_cache(maxsize=256)
def channel_weights(names: tuple[str, ...]) -> tuple[float, ...]:
    """The weight of each channel in the mix; they sum to 1.

    Args:
        names: FFmpeg's names of the channels, such as ``("FL", "FR", "FC", "LFE", "SL", "SR")``.
    """
    if not set(names) & _WEIGHTS.keys():
        names = _GUESSED.get(len(names), names)
    weights = [_WEIGHTS.get(name) for name in names]
    # A mean where a channel is unknown, or where nothing but effects for the subwoofer is there.
    known = [1.0 if weight is None or None in weights else weight for weight in weights]
    known = known if sum(known) > 0 else [1.0] * len(known)
    return tuple(weight / sum(known) for weight in known)


@functools.lru_cache(maxsize=256)
def _powers(names: tuple[str, ...]) -> NDArray[np.float64]:
    """(C,) the squared weights."""
    return np.square(channel_weights(names))


class Downmix:
    """Mixes the frames of one sound, and keeps count of what they hold.

    Args:
        pick: take only this channel, where the mix of all has been found to cancel itself.
    """

    def __init__(self, pick: int | None = None) -> None:
        self._pick = pick
        self._power: dict[int, float] = defaultdict(
            float
        )  # of each channel, summed over its samples
        self._flat: Counter[int] = Counter()  # samples of each channel in flat tops
        self._packer: tuple[tuple[str, str, int], av.AudioResampler] | None = None
        self._samples = self._loud = self._cancelled = 0
        self._names: dict[str, tuple[str, ...]] = {}  # of a layout; PyAV makes them anew each time

    def mono(self, frame: Any, *, count: bool = True) -> NDArray[np.float32]:
        """A frame of PyAV as (n,). Without ``count`` it is left out of what is judged."""
        layout = frame.layout
        names = self._names.get(layout.name)
        if names is None:
            names = self._names[layout.name] = tuple(channel.name for channel in layout.channels)
        # PyAV counts one plane too many from eight on, and crashes on reading it.
        if frame.format.is_planar and len(names) >= _PLANES:
            frame = self._packed(frame)
        samples = frame.to_ndarray()
        # A packed format interleaves its channels: (1, n * C) -> (C, n).
        if len(names) > 1 and not frame.format.is_planar:
            samples = samples.reshape(-1, len(names)).T
        full = 1.0 - 2.0**-15
        if samples.dtype.kind in "iu":
            bits = 8 * samples.dtype.itemsize - 1
            # Unsigned PCM is silent at half its range. Float64 holds a 32-bit sample exactly.
            offset = 1 << bits if samples.dtype.kind == "u" else 0
            samples = (samples.astype(np.float64) - offset) / (1 << bits)
            full = 1.0 - 2.0 ** -min(bits, 15)
        weights = channel_weights(names)
        exact = samples
        if len(names) == 1:
            mix = samples[0]
        else:
            exact = samples.astype(np.float64, copy=False)
            alike = len(set(weights)) == 1
            mix = exact.sum(axis=0) / len(names) if alike else np.asarray(weights) @ exact
        if count:
            self._samples += samples.shape[1]
            self._count_flat(samples, full)
            if len(names) > 1:
                self._count_power(exact, mix, _powers(names))
        if self._pick is not None:
            mix = samples[min(self._pick, len(names) - 1)]
        return mix.astype(np.float32)

    def _packed(self, frame: Any) -> Any:
        """The same samples with the channels interleaved."""
        kind = frame.format.packed.name, frame.layout.name, frame.sample_rate
        if self._packer is None or self._packer[0] != kind:
            resampler = av.AudioResampler(kind[0], frame.layout, frame.sample_rate)
            self._packer = kind, resampler
        # Nothing is resampled, so one frame gives one frame of the same length.
        (found,) = self._packer[1].resample(frame)
        return found

    def _count_power(
        self, samples: NDArray[np.float64], mix: NDArray[Any], powers: NDArray[np.float64]
    ) -> None:
        each = [float(row @ row) for row in samples]
        for channel, (found, weight) in enumerate(zip(each, powers, strict=True)):
            self._power[channel] += found if weight else 0.0
        expected = float(powers @ each)
        if expected > _QUIET**2 * samples.shape[1]:
            self._loud += samples.shape[1]
            if float(mix @ mix) < _CANCELS * expected:
                self._cancelled += samples.shape[1]

    def _count_flat(self, samples: NDArray[Any], full: float) -> None:
        if max(samples.max(initial=0.0), -samples.min(initial=0.0)) < full:
            return
        for channel, row in enumerate(np.abs(samples) >= full):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
            lengths = edges[1::2] - edges[::2]
            self._flat[channel] += int(lengths[lengths >= _FLAT].sum())

    @property
    def loudest(self) -> int | None:
        """The channel to take instead of the mix, or None where the mix is good."""
        if 2 * self._cancelled <= self._loud or not self._loud:
            return None
        return max(self._power, key=lambda channel: (self._power[channel], -channel))

    @property
    def clipped(self) -> bool:
        """Whether one channel has enough flat tops to be called clipped."""
        most = max(self._flat.values(), default=0)
        return most > 0 and most >= _CLIPPED_SHARE * self._samples


def is_silent(wave: NDArray[np.float32]) -> bool:
    """Whether no sample of (n,) exceeds -60 dB of full scale."""
    return not bool(np.any(np.abs(wave) > _QUIET))
