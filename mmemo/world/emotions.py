"""How each emotion looks and sounds: prototypes of action units and prosody, and their wording.

Faces follow the action unit combinations of EMFACS (Friesen & Ekman 1983) for full expressions.
Voices follow the signs of the effects that Banse & Scherer (1996) and Juslin & Laukka (2003) report
for mean F0, F0 range, intensity, speech rate, final contour and voice quality; the sizes are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

EMOTIONS: tuple[str, ...] = ("happy", "sad", "angry", "fear", "surprise", "neutral")
FELT: tuple[str, ...] = EMOTIONS[:5]
"""The emotions that a channel can express. ``neutral`` is the absence of expression."""

ACTION_UNITS: Mapping[str, str] = {
    "AU1": "inner brows raised",
    "AU2": "outer brows raised",
    "AU4": "brows lowered",
    "AU5": "upper lids raised",
    "AU6": "cheeks raised",
    "AU7": "lids tightened",
    "AU9": "nose wrinkled",
    "AU12": "lip corners up",
    "AU15": "lip corners down",
    "AU20": "lips stretched",
    "AU23": "lips pressed",
    "AU25": "lips parted",
    "AU26": "jaw dropped",
}

FACES: Mapping[str, Mapping[str, float]] = {
    "happy": {"AU6": 0.9, "AU12": 1.0, "AU25": 0.5},
    "sad": {"AU1": 1.0, "AU4": 0.6, "AU15": 1.0},
    "angry": {"AU4": 1.0, "AU5": 0.5, "AU7": 0.9, "AU9": 0.4, "AU23": 1.0},
    "fear": {"AU1": 0.9, "AU2": 0.5, "AU4": 0.7, "AU5": 0.9, "AU20": 1.0, "AU25": 0.5},
    "surprise": {"AU1": 0.9, "AU2": 1.0, "AU5": 0.8, "AU25": 0.6, "AU26": 1.0},
    "neutral": {},
}
"""Emotion -> action unit -> intensity at full strength."""

CORE: Mapping[str, tuple[str, ...]] = {
    "happy": ("AU12",),
    "sad": ("AU1", "AU15"),
    "angry": ("AU4", "AU23"),
    "fear": ("AU1", "AU20"),
    "surprise": ("AU2", "AU26"),
    "neutral": (),
}
"""Emotion -> action units of which at least one is always shown."""

PROSODY: tuple[str, ...] = ("pitch", "pitch_range", "loudness", "rate", "slope", "breathiness")

VOICES: Mapping[str, tuple[float, ...]] = {
    "happy": (0.6, 0.8, 0.4, 0.3, 0.7, -0.2),
    "sad": (-0.7, -0.7, -0.8, -0.9, -0.4, 0.5),
    "angry": (0.3, 0.3, 1.0, 0.5, -0.9, -1.0),
    "fear": (1.0, -0.5, -0.2, 0.9, 0.2, 0.8),
    "surprise": (0.8, 1.0, 0.2, -0.4, 1.0, 0.2),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
"""Emotion -> deviation from the speaker's resting value in each of PROSODY, -1..1, at full
strength."""

FACE_CONFUSED: Mapping[str, str] = {
    "happy": "surprise",
    "sad": "fear",
    "angry": "sad",
    "fear": "surprise",
    "surprise": "fear",
}
VOICE_CONFUSED: Mapping[str, str] = {
    "happy": "angry",
    "sad": "fear",
    "angry": "happy",
    "fear": "surprise",
    "surprise": "happy",
}
"""The emotion that an ambiguous face or voice leans towards."""

WEATHERS: tuple[str, ...] = ("sun", "clouds", "rain", "snow", "night")
LIGHTS: tuple[str, ...] = ("warm", "cool", "dim", "bright")
MUSICS: tuple[str, ...] = ("none", "cheerful", "gloomy", "tense")

SCENES: Mapping[str, tuple[str, str, bool, str]] = {
    "happy": ("sun", "warm", True, "cheerful"),
    "sad": ("rain", "cool", False, "gloomy"),
    "angry": ("clouds", "warm", True, "tense"),
    "fear": ("night", "dim", False, "tense"),
    "surprise": ("snow", "bright", True, "cheerful"),
    "neutral": ("clouds", "cool", False, "none"),
}
"""Weather, light, cap and music of each label where scene and label are tied."""


def strength_word(strength: float) -> str:
    """The word for an expression strength in 0..1."""
    return "weak" if strength < 0.5 else "moderate" if strength < 0.75 else "strong"


def level_word(departure: float) -> str:
    """The word for a departure in -1..1 from the speaker's rest."""
    return "low" if departure < -0.2 else "high" if departure > 0.2 else "middle"
