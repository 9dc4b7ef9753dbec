"""Prosody: measured pitch, loudness and rate of the voice, as questions and as cues of the emotion.

Reads another manifest of the same folder and measures the sound of each of its clips with librosa
(``pip install mmemo[prosody]``): the median pitch and its range (probabilistic YIN), the loudness
of the frames with a voice, and the syllable nuclei per second (de Jong and Wempe, 2009). Each value
is low, medium or high by the terciles of the reference clips; those of pitch are by gender where
the rows name it.

``questions=levels`` asks for each level (tier ``attribute``). ``questions=emotion`` repeats the
rows' own questions, with answers that first say what is heard, and with the cues that are present
and absent, which grounding rewards and preference pairs read (tier ``emotion``). Teaching prosody
first is EmotionThinker's prosody-aware stage (arXiv 2601.15668); the form is ours.

    mmemo manifest data/prosody.py --root EMODB --output levels.jsonl \
        --option manifest=emodb_train.jsonl --option cache=prosody.csv
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

from mmemo.console import progress
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, DataError
from mmemo.files import write_whole
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode

MEASURES = ("pitch", "range", "loudness", "rate")
CUES: Mapping[str, tuple[str, str]] = {
    "pitch": ("low pitch", "high pitch"),
    "range": ("narrow pitch range", "wide pitch range"),
    "loudness": ("soft voice", "loud voice"),
    "rate": ("slow speech", "fast speech"),
}
ASKED: Mapping[str, str] = {
    "pitch": "How high is the pitch of this voice?",
    "range": "How far does the pitch of this voice move?",
    "loudness": "How loud is this voice?",
    "rate": "How fast does this person speak?",
}
LEVELS = ("low", "medium", "high")
RATE = 16_000
"""Hz at which the sound is measured."""


def rows(
    root: Path,
    *,
    manifest: str,
    reference: str = "",
    questions: Literal["levels", "emotion"] = "levels",
    cache: str = "",
) -> Iterator[dict[str, Any] | Excluded]:
    """Rows about the clips of ``manifest``.

    Args:
        reference: the manifest whose clips give the terciles, usually that of training; by default
            the same. Its answers are not read.
        questions: what is asked, see above.
        cache: a CSV file that keeps the measured values of each file.
    """
    need_option("questions", questions, ("levels", "emotion"))
    samples = load_samples(DataConfig(manifests=[manifest]))
    known = load_samples(DataConfig(manifests=[reference])) if reference else samples
    values = measure_all(root, [*samples, *known], Path(cache) if cache else None)
    limits = terciles(known, values)
    for sample in samples:
        found = values.get(_file(sample))
        if found is None and questions == "levels":
            yield Excluded(sample.sample_id, "no voice", "no frame of it has a pitch")
            continue
        if found is None:  # the emotion is asked all the same
            yield _emotion_row(sample, None)
            continue
        levels = {
            # A kind of voice that the reference lacks is compared with all of them.
            name: LEVELS[
                int(
                    np.searchsorted(
                        limits.get((name, _voice(sample, name)), limits[name, ""]), found[name]
                    )
                )
            ]
            for name in MEASURES
        }
        if questions == "levels":
            yield from (_level_row(sample, name, level) for name, level in levels.items())
        else:
            yield _emotion_row(sample, levels)


def measure_all(
    root: Path, samples: Sequence[Sample], cache: Path | None = None
) -> dict[str, dict[str, float]]:
    """The values of each sound file, by its path; a file without a voice has none.

    Raises:
        ConfigError: librosa is not installed.
        DataError: a row has no sound, or the cache is damaged.
    """
    known = _read(cache) if cache is not None and cache.exists() else {}
    files = list(dict.fromkeys(map(_file, samples)))
    todo = [file for file in files if file not in known]
    with progress("prosody", len(todo), unit="clips") as bar:
        for file in todo:
            known[file] = measure(_wave(root, file))
            bar.advance(1)
    if cache is not None and todo:
        _write(cache, known)
    return {file: values for file in files if (values := known[file]) is not None}


def _wave(root: Path, file: str) -> NDArray[np.float32]:
    job = DecodeJob(root / file, file, frozenset({"audio"}), SamplingConfig(), DecodeConfig())
    wave = decode(job).waveform
    assert wave is not None
    return wave


def measure(wave: NDArray[np.float32]) -> dict[str, float] | None:
    """Pitch in semitones above 55 Hz (median of the voiced frames), its range in semitones (10th to
    90th percentile), loudness in dB of full scale (median of the voiced frames) and syllable
    nuclei per second of sound; None where no frame has a voice.

    Args:
        wave: (n,) samples from -1 to 1 at 16 kHz.
    """
    try:
        import librosa  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("prosody is measured by librosa; pip install 'mmemo[prosody]'") from error
    tools: Any = librosa
    pitch, voiced, _ = tools.pyin(wave, sr=RATE, fmin=65.0, fmax=600.0, frame_length=1024)
    heard = pitch[voiced & np.isfinite(pitch)]
    if len(heard) < 5:
        return None
    semitones = 12 * np.log2(heard / 55.0)
    power = tools.feature.rms(y=wave, frame_length=1024, hop_length=256)[0][: len(voiced)]
    # Syllable nuclei: peaks of the loudness with a dip of 2 dB before and after.
    decibels = 20 * np.log10(np.maximum(np.convolve(power, np.hanning(5) / 2, "same"), 1e-6))
    peaks, _ = find_peaks(decibels, height=decibels.max() - 25, prominence=2.0)
    active = max(0.2, float(np.sum(power > 0.1 * power.max())) * 256 / RATE)
    low, high = np.percentile(semitones, [10, 90])
    return {
        "pitch": float(np.median(semitones)),
        "range": float(high - low),
        "loudness": 20 * math.log10(max(1e-6, float(np.median(power[voiced[: len(power)]])))),
        "rate": len(peaks) / active,
    }


def terciles(
    samples: Sequence[Sample], values: Mapping[str, Mapping[str, float]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """The limits between low, medium and high of each measure, by kind of voice.

    Raises:
        DataError: no clip has a voice.
    """
    by_kind: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        found = values.get(_file(sample))
        for name in MEASURES if found is not None else ():
            for kind in {"", _voice(sample, name)}:
                by_kind[name, kind].append(found[name])
    if not by_kind:
        raise DataError("no clip of the reference has a voice; check the manifest and --root")
    limits: dict[tuple[str, str], tuple[float, float]] = {}
    for key, found in by_kind.items():
        low, high = np.percentile(found, [100 / 3, 200 / 3])
        limits[key] = (float(low), float(high))
    return limits


def _voice(sample: Sample, name: str) -> str:
    """The kind of voice that a value is compared with: pitch differs by gender."""
    return sample.group.get("gender", "") if name == "pitch" else ""


def _file(sample: Sample) -> str:
    if "audio" not in sample.media:
        raise DataError(f"{sample.sample_id} has no sound to measure; leave it out")
    return sample.media["audio"].path


def _level_row(sample: Sample, name: str, level: str) -> dict[str, Any]:
    return {
        "sample_id": f"{sample.sample_id}-{name}",
        "prompt": f"<audio>{ASKED[name]} Answer low, medium or high.",
        "completion": f"<answer>{level}</answer>",
        "audio": _file(sample),
        "tier": "attribute",
        "group": dict(sample.group),
    }


def _emotion_row(sample: Sample, levels: Mapping[str, str] | None) -> dict[str, Any]:
    """The row's own question. Without measured levels it has no cues, and its answer no reason."""
    present: list[str] = []
    absent: list[str] = []
    for name, level in (levels or {}).items():
        for cue, own in zip(CUES[name], ("low", "high"), strict=True):
            (present if level == own else absent).append(cue)
    heard_all = {"audio": [*present, *absent]}
    heard = ", ".join(present) or "an ordinary voice"
    reason = "" if levels is None else f"<think>Voice: {heard}.</think>"
    asked = sample.prompt[-1].text
    return {
        "sample_id": sample.sample_id,
        "prompt": f"{asked} Say first what you hear.",
        "completion": f"{reason}<answer>{sample.truth.label}</answer>",
        "audio": _file(sample),
        "tier": "emotion",
        "label": sample.truth.label,
        "group": dict(sample.group),
        **({} if levels is None else {"cues": {"present": present, "absent": absent, **heard_all}}),
    }


def _read(path: Path) -> dict[str, dict[str, float] | None]:
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            return {
                row["file"]: {name: float(row[name]) for name in MEASURES} if row["pitch"] else None
                for row in csv.DictReader(handle)
            }
    except (KeyError, ValueError, TypeError) as error:
        raise DataError("is no table of measured values; delete it", file=str(path)) from error


def _write(path: Path, values: Mapping[str, Mapping[str, float] | None]) -> None:
    lines = [",".join(("file", *MEASURES))]
    for file, found in values.items():
        cells = ["" if found is None else repr(round(found[name], 6)) for name in MEASURES]
        quoted = '"' + file.replace('"', '""') + '"'
        lines.append(",".join((quoted, *cells)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")
