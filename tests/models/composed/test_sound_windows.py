"""Every kind of sound encoder hears a clip from its first to its last second."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mmemo.models.composed.audio_encoders import sound_window
from mmemo.models.composed.encoders import LoadedEncoder
from mmemo.models.composed.preprocessors import load_feature_extractor
from tests.media_files import sine
from tests.models.composed.encoder_files import SIZES, load_folder, save_encoder
from tests.models.composed.test_audio_encoders import (
    AST,
    CLAP,
    CLAP_MEL,
    FBANK,
    WAVE,
    WAVEFORM,
    heard,
    noise,
)
from tests.models.parts import MEL, WHISPER

QWEN = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 16,
}
S2T = {
    "model_type": "speech_to_text",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "conv_channels": 16,
    "vocab_size": 50,
}


class Case(NamedTuple):
    """``size``, ``hop`` in seconds, as documented; None where any length will do."""

    config: dict[str, Any]
    extractor: dict[str, Any]
    size: float | None = None
    hop: float | None = None
    rate: int = 16000


CASES = {
    "whisper": Case(WHISPER, MEL, 30.0, 30.0),
    "qwen2-audio": Case(QWEN, MEL, 30.0, 30.0),
    "clap": Case(CLAP, CLAP_MEL, 10.0, 10.0, 48000),
    # The tiny one has 128 frames of 10 ms where released ones have 1024: 10.255 s, every 10.1 s.
    "ast": Case(AST, FBANK, 1.295, 1.2),
    "wav2vec2-bert": Case(
        {**SIZES, "model_type": "wav2vec2-bert", "feature_projection_input_dim": 160},
        {"feature_extractor_type": "SeamlessM4TFeatureExtractor"},
    ),
    "speech-to-text": Case(S2T, {"feature_extractor_type": "Speech2TextFeatureExtractor"}),
    **{
        kind: Case({**WAVEFORM, "model_type": kind}, WAVE)
        for kind in ("wav2vec2", "hubert", "wavlm", "sew", "unispeech-sat")
    },
}


def load(name: str, folder: Path) -> LoadedEncoder:
    case = CASES[name]
    return load_folder(
        "audio", save_encoder(folder, case.config, case.extractor), sample_rate=case.rate
    )


@pytest.mark.parametrize("name", CASES)
def test_a_tone_in_the_last_second_is_heard(name: str, tmp_path: Path) -> None:
    case, found = CASES[name], load(name, tmp_path)
    seconds = 4.4 if case.size is None else case.size + 1.3
    plain = noise(seconds, case.rate)
    other = plain.copy()
    other[-case.rate :] += sine(1.0, case.rate, 880.0)
    one, two = heard(found, plain, case.rate), heard(found, other, case.rate)
    assert one.shape == two.shape
    changed = (one - two).abs().amax(1) > 1e-6
    # Up to the last step. What is before the last second changes only within its own window.
    assert bool(changed[-1])
    if case.hop is not None:
        before = int((seconds - 1.0) // case.hop) * case.hop
        assert not changed[: int(len(one) * before / seconds) - 1].any()
    # The steps go on at one rate: no window is skipped, none is padding from end to end.
    length = case.hop or 2.2
    part = heard(found, plain[: round(length * case.rate)], case.rate)
    assert len(one) == pytest.approx(seconds / length * len(part), abs=2)


@pytest.mark.parametrize("name", CASES)
def test_a_short_clip_is_one_window(name: str, tmp_path: Path) -> None:
    case, found = CASES[name], load(name, tmp_path)
    extractor = load_feature_extractor(found.spec.preprocessor, found.model.config.model_type)
    window = sound_window(extractor, found.model)
    if case.size is None or case.hop is None:
        assert window is None
        return
    assert window is not None
    assert (window.size, window.hop) == (round(case.size * case.rate), round(case.hop * case.rate))
    sound = noise(1.2 * case.size, case.rate)
    first = heard(found, sound[: window.size], case.rate)
    whole = heard(found, sound, case.rate)
    assert torch.equal(whole[: len(first)], first)
    assert window.starts(window.size) == [0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.size])
def test_no_window_is_padding_alone(name: str, tmp_path: Path) -> None:
    found = load(name, tmp_path)
    extractor = load_feature_extractor(found.spec.preprocessor, found.model.config.model_type)
    window = sound_window(extractor, found.model)
    assert window is not None
    for samples in np.linspace(1, 3.5 * window.size, 200).astype(int):
        starts = window.starts(int(samples))
        assert all(samples - start >= window.least for start in starts[1:])
        # What no window reaches is less than one is made for.
        assert samples - (starts[-1] + window.size) < window.least


@pytest.mark.parametrize("name", ["ast", "clap", "qwen2-audio"])
def test_steps_of_padding_are_cut_off(name: str, tmp_path: Path) -> None:
    """The steps kept of a padded window are those of its sound, at the rate of a full one."""
    case, found = CASES[name], load(name, tmp_path)
    assert case.size is not None
    full = len(heard(found, noise(case.size, case.rate), case.rate))
    for share in (0.3, 0.8):
        part = heard(found, noise(case.size * share, case.rate), case.rate)
        assert len(part) == pytest.approx(full * share, abs=1.5)
