"""Speech with controlled prosody: espeak-ng through ctypes. S samples."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SYNCHRONOUS = 2  # audio goes to the callback, in this thread
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Prosody:
    """``rate`` in words a minute; the others 0 to 100 as espeak has them (volume to 200)."""

    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50
    volume: int = 100


class Speaker:
    """The espeak-ng library of a folder; one per process."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self._pieces: list[NDArray[np.int16]] = []
        # espeak keeps the pointer: the object has to live as long as the library is used.
        self._callback = _CALLBACK(self._receive)
        self.rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(folder).encode(), 0))
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data of {folder}")
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: object, count: int, _events: object) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, prosody: Prosody) -> NDArray[np.float32]:
        """(S,) float32 mono at ``self.rate`` Hz."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice '{voice}'")
        settings = {
            _RATE: prosody.rate,
            _VOLUME: prosody.volume,
            _PITCH: prosody.pitch,
            _RANGE: prosody.pitch_range,
        }
        for name, value in settings.items():
            self._library.espeak_SetParameter(name, value, 0)
        self._pieces.clear()
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._pieces).astype(np.float32) / 32768
