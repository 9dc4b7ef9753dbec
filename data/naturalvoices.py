"""NaturalVoices: 5,049 hours of podcasts, each utterance described by classifiers.

Emotion classes, arousal, dominance and valence, speakers, gender and noise are estimates of models,
and not what listeners heard: good for training, and no truth to test with. Licences differ by
podcast (``audio_license.csv``). Get https://github.com/3loi/NaturalVoices; the pickles beside the
JSON file are never read. Layout of the folder::

    all_data.json           {podcast: {utterance: {start, end, text, speakers, num_speakers,
                             Neutral, Angry, Sad, Happy, Arousal, Dominance, Valence, gender, SNR}}}
    audio/PODCAST.wav       found by name in any folder; whole podcasts, of which a row is a span

The four classes are a softmax: they are the row's ``votes``, and its label is the likeliest, if it
has ``certain`` or more. Arousal, dominance and valence are ``attributes`` of the voice. Their scale
is assumed to be 0 to 1; ``scale=1-7`` converts another. Utterances of several speakers, with an SNR
under ``snr``, or without probabilities of the classes are left out. Attributes may be missing, as
the release's notebook for them skips what was classified before; such rows stay.

    mmemo manifest data/naturalvoices.py --root NV --output nv.jsonl --option certain=0.7
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmemo.answers.label_sets import emotion_set
from mmemo.data.adapter import Excluded
from mmemo.data.releases.folders import SOUNDS, ClipIndex, labelled_row
from mmemo.data.releases.tables import read_object
from mmemo.errors import ConfigError

LABELS = "naturalvoices"
COLUMNS = ("votes",)
CLASSES = emotion_set(LABELS).names
ATTRIBUTES = ("Arousal", "Dominance", "Valence")
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."


def rows(
    root: Path, *, certain: str = "0", snr: str = "", scale: str = "0-1"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per utterance. ``certain``: the least probability of the likeliest class. ``snr``:
    the least signal-to-noise ratio, in dB. ``scale``: ends of the attributes' scale."""
    least, quiet = _option("certain", certain), _option("snr", snr or "-inf")
    ends = re.fullmatch(r"(-?\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", scale)
    if ends is None or float(ends[1]) >= float(ends[2]):
        raise ConfigError(f"scale is '{scale}'; write its ends, such as 1-7")
    low, high = float(ends[1]), float(ends[2])
    clips = ClipIndex(root, ["."], SOUNDS)
    for podcast, utterances in read_object(root / "all_data.json").items():
        path = clips.find(podcast, f"audio/{podcast}.wav")
        for name, line in utterances.items() if isinstance(utterances, dict) else ():
            row = f"naturalvoices-{podcast}-{name}"
            reason, detail = _unusable(line, least, quiet)
            if reason:
                yield Excluded(row, reason, detail)
                continue
            votes = {one: _number(line.get(one)) or 0.0 for one in CLASSES}
            label = max(CLASSES, key=lambda one: votes[one])
            yield {
                **labelled_row(
                    row,
                    QUESTION.format(", ".join(CLASSES)),
                    label,
                    {"audio": path},
                    transcript=str(line.get("text") or ""),
                    group=_group(podcast, line),
                ),
                "start": float(line["start"]),
                "end": float(line["end"]),
                "votes": votes,
                **_attributes(line, low, high),
            }


def _unusable(line: Any, least: float, quiet: float) -> tuple[str, str]:
    """Why an utterance cannot be used, with the details; "" if it can."""
    if not isinstance(line, dict):
        return "no record", str(line)[:80]
    values: Mapping[str, Any] = line
    start, end = _number(values.get("start")), _number(values.get("end"))
    shares = [_number(values.get(one)) for one in CLASSES]
    known = [one for one in shares if one is not None]
    many, noise = _number(values.get("num_speakers")), _number(values.get("SNR"))
    checks = (
        (start is None or end is None or not 0 <= start < end, "no span", f"{start} to {end}"),
        (len(known) < len(CLASSES), "not classified", ""),
        (any(not 0 <= one <= 1 for one in known), "no probabilities", str(known)),
        (abs(sum(known) - 1) > 0.02, "no probabilities", str(known)),
        (many is not None and many != 1, "several speakers", f"{many}"),
        (noise is not None and noise < quiet, "noisy", f"{noise} dB"),
        (max(known, default=0.0) < least, "uncertain", f"{max(known, default=0.0):.3f}"),
    )
    return next(((why, detail) for bad, why, detail in checks if bad), ("", ""))


def _attributes(line: Mapping[str, Any], low: float, high: float) -> dict[str, Any]:
    found = {one.lower(): _number(line.get(one)) for one in ATTRIBUTES}
    scaled = {one: (x - low) / (high - low) for one, x in found.items() if x is not None}
    inside = {one: round(x, 6) for one, x in scaled.items() if 0 <= x <= 1}
    return {"attributes": {"audio": inside}} if inside else {}


def _group(podcast: str, line: Mapping[str, Any]) -> dict[str, str]:
    speakers = line.get("speakers")
    speaker = speakers[0] if isinstance(speakers, list) and speakers else speakers
    gender = str(line.get("gender") or "").strip().lower()
    return {
        # Diarisation numbers the people of each podcast anew.
        "speaker": f"{podcast}-{speaker}" if speaker else podcast,
        "podcast": podcast,
        "gender": {"m": "male", "f": "female"}.get(gender, gender),
    }


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _option(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{name} is '{value}'; give a number") from error
