"""Measured prosody: hand-made voices, levels by terciles, and the rows that are made of them."""

from __future__ import annotations

import json
import wave as wavefile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mmemo import content
from mmemo.data.adapter import write_manifest
from mmemo.data.release import ManifestsConfig, run_manifests

pytest.importorskip("librosa", reason="librosa is not installed; pip install 'mmemo[prosody]'")

PROSODY = content.load_module("data/prosody.py")
RATE = 16_000


def voice(
    pitch: float, *, seconds: float = 1.2, volume: float = 0.2, glide: float = 0.0, beats: float = 0
) -> NDArray[np.float32]:
    """A tone with overtones: ``glide`` semitones up, with ``beats`` syllables a second."""
    time = np.arange(int(seconds * RATE)) / RATE
    hertz = pitch * 2 ** (glide / 12 * time / seconds)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    tone = sum(np.sin(n * phase) / n for n in range(1, 6))
    if beats:
        tone = tone * np.sin(np.pi * beats * time) ** 2
    return (volume * tone).astype(np.float32)


def write(path: Path, wave: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())


def test_pitch_is_in_semitones_above_55_hertz() -> None:
    for hertz, semitones in ((110.0, 12.0), (220.0, 24.0)):
        assert PROSODY.measure(voice(hertz))["pitch"] == pytest.approx(semitones, abs=0.3)
    flat, rising = PROSODY.measure(voice(150)), PROSODY.measure(voice(150, glide=10))
    assert flat["range"] < 0.5
    # From the 10th to the 90th percentile of a steady glide: 0.8 of it.
    assert rising["range"] == pytest.approx(8.0, abs=1.0)


def test_loudness_is_in_decibels() -> None:
    soft, loud = PROSODY.measure(voice(150, volume=0.1)), PROSODY.measure(voice(150, volume=0.2))
    assert loud["loudness"] - soft["loudness"] == pytest.approx(6.02, abs=0.2)


def test_rate_counts_syllables_and_noise_has_no_voice() -> None:
    slow, fast = (PROSODY.measure(voice(150, seconds=2, beats=n))["rate"] for n in (2, 6))
    assert (slow, fast) == (pytest.approx(2, abs=0.8), pytest.approx(6, abs=1.5))
    assert PROSODY.measure(np.zeros(RATE, dtype=np.float32)) is None


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in EmoDB's layout: three speakers of training, and those of fold 1."""
    root = tmp_path_factory.mktemp("EMODB")
    pitches = {"10": 100, "11": 120, "12": 150, "15": 180, "03": 210, "08": 250}
    for speaker, pitch in pitches.items():
        for number, letter in enumerate("WTN"):
            sound = voice(pitch, volume=0.05 * (number + 1), beats=3 + number)
            write(root / "wav" / f"{speaker}a01{letter}a.wav", sound)
    write(root / "wav" / "03a02Wa.wav", np.zeros(RATE, dtype=np.float32))
    return root


def test_the_manifests_of_a_fold(release: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache.csv"
    prosody = {"manifest": f"{folder}/train.jsonl", "cache": str(cache)}
    config = ManifestsConfig.model_validate(
        {
            "output_dir": str(folder),
            "root": str(release),
            "manifests": {
                "train": {"adapter": "data/emodb.py", "options": {"split": "train", "fold": 1}},
                "test": {"adapter": "data/emodb.py", "options": {"split": "test", "fold": 1}},
                "levels": {"adapter": "data/prosody.py", "options": prosody},
                "emotion_test": {
                    "adapter": "data/prosody.py",
                    "options": {
                        **prosody,
                        "manifest": f"{folder}/test.jsonl",
                        "reference": f"{folder}/train.jsonl",
                        "questions": "emotion",
                    },
                },
            },
        }
    )
    run_manifests(config)

    def read(name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]

    assert {row["group"]["speaker"] for row in read("test")} == {"03", "08"}  # type: ignore[index]
    # 16 and 15 speak in the last fold, so the man of it is there to be trained on.
    assert {row["group"]["speaker"] for row in read("train")} == {"10", "11", "12"}  # type: ignore[index]
    levels = read("levels")
    assert len(levels) == 4 * 9
    answers = {row["sample_id"]: row["completion"] for row in levels}
    assert answers["emodb-10a01Wa-pitch"] == "<answer>low</answer>"
    assert answers["emodb-12a01Na-pitch"] == "<answer>high</answer>"
    assert answers["emodb-11a01Wa-loudness"] == "<answer>low</answer>"
    tests = {str(row["sample_id"]): row for row in read("emotion_test")}
    assert len(tests) == 7
    silent = tests["emodb-03a02Wa"]
    assert silent["completion"] == "<answer>anger</answer>"
    assert "cues" not in silent
    # The woman of fold 1 has no woman to be compared with, so all voices count.
    assert "high pitch" in tests["emodb-08a01Wa"]["cues"]["present"]  # type: ignore[index]
    assert "low pitch" in tests["emodb-08a01Wa"]["cues"]["absent"]  # type: ignore[index]
    stamp = cache.stat().st_mtime_ns
    run_manifests(config)
    assert cache.stat().st_mtime_ns == stamp  # nothing is measured twice


def test_a_damaged_cache_is_named(release: Path, tmp_path: Path) -> None:
    write_manifest("data/emodb.py", release, tmp_path / "all.jsonl")
    cache = tmp_path / "cache.csv"
    cache.write_text("file,pitch\nwav/a.wav,high\n")
    options = {"manifest": str(tmp_path / "all.jsonl"), "cache": str(cache)}
    with pytest.raises(Exception, match=r"cache\.csv.*is no table of measured values"):
        write_manifest("data/prosody.py", release, tmp_path / "out.jsonl", options)
