"""NaturalVoices' metadata on a miniature: soft labels, attributes, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.adapter import AdaptedManifest, write_manifest
from mmemo.errors import ConfigError, DataError
from tests.media_files import write_wav


def line(**more: Any) -> dict[str, Any]:
    return {
        "start": 0.5,
        "end": 2,
        "text": "Well, hello.",
        "speakers": ["SPEAKER_01"],
        "num_speakers": 1,
        "Neutral": 0.2,
        "Angry": 0.1,
        "Sad": 0.1,
        "Happy": 0.6,
        "Arousal": 0.7,
        "Dominance": 0.5,
        "Valence": 0.9,
        "gender": "F",
        "SNR": 30.0,
        **more,
    }


UTTERANCES = {
    "0001": line(),
    "0002": line(Arousal=None, Dominance=float("nan"), Valence=1.5, gender="male"),
    "0003": line(num_speakers=2),
    "0004": {k: v for k, v in line().items() if k != "Happy"},
    "0005": line(Happy=0.9),
    "0006": line(end=0.5),
    "0007": line(SNR=5),
    "0008": line(Neutral=0.3, Happy=0.5),
    "0009": "broken",
    "0010": line(Happy=float("nan")),
}


def release(root: Path) -> Path:
    """Two podcasts, one without sound; a pickle stands beside the metadata and is never read."""
    root.mkdir()
    data = {"MSP_1": UTTERANCES, "MSP_2": {"0001": line()}}
    (root / "all_data.json").write_text(json.dumps(data), encoding="utf-8")
    (root / "all_data.pk").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    write_wav(root / "audio/MSP_1.wav", 2.5)
    return root


def make(root: Path, **options: str) -> AdaptedManifest:
    return write_manifest("data/naturalvoices.py", root, root.parent / "nv.jsonl", options)


def test_soft_labels_and_attributes(tmp_path: Path) -> None:
    made = make(release(tmp_path / "nv"))
    first, second = made.samples[:2]
    assert first.truth.label == "Happy"
    assert first.columns["votes"] == {"Neutral": 0.2, "Angry": 0.1, "Sad": 0.1, "Happy": 0.6}
    assert first.truth.attributes == {"audio": {"arousal": 0.7, "dominance": 0.5, "valence": 0.9}}
    assert first.group == {"speaker": "MSP_1-SPEAKER_01", "podcast": "MSP_1", "gender": "female"}
    ref = first.media["audio"]
    assert (ref.path, ref.start, ref.end) == ("audio/MSP_1.wav", 0.5, 2.0)
    assert (second.truth.attributes, second.group["gender"]) == ({}, "male")
    assert {one.row[-4:]: one.reason for one in made.excluded} == {
        "0003": "several speakers",
        "0004": "not classified",
        "0005": "no probabilities",
        "0006": "no span",
        "0009": "no record",
        "0010": "not classified",
    }
    assert made.missing == ("audio/MSP_2.wav",)


def test_options(tmp_path: Path) -> None:
    root = release(tmp_path / "nv")
    strict = make(root, certain="0.55", snr="10")
    assert [one.sample_id[-4:] for one in strict.samples] == ["0001", "0002"]
    reasons = {one.row[-4:]: one.reason for one in strict.excluded}
    assert (reasons["0007"], reasons["0008"]) == ("noisy", "uncertain")
    scaled = make(root, scale="0-2").samples[0].truth.attributes["audio"]
    assert scaled == {"arousal": 0.35, "dominance": 0.25, "valence": 0.45}
    for options in ({"scale": "7-1"}, {"scale": "all"}, {"certain": "very"}):
        with pytest.raises(ConfigError):
            make(root, **options)
    (root / "all_data.json").write_text("[1]")
    with pytest.raises(DataError, match="must be a JSON object"):
        make(root)
