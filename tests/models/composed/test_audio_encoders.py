"""Any audio encoder of transformers hears the whole of a sound."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    ClapAudioModel,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.media.config import SamplingConfig
from mmemo.models.composed import encoders
from mmemo.models.composed.audio_encoders import SoundWindow, encode_sound, whisper_states
from mmemo.models.composed.encoders import LoadedEncoder, load_encoder
from mmemo.models.config import BranchConfig
from tests.models.composed.encoder_files import SIZES, load_folder, save_encoder
from tests.models.parts import MEL, WHISPER, clip, tiny

WAVE = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 16000,
    "do_normalize": True,
}
WAVEFORM = {
    **SIZES,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
AST = {
    **SIZES,
    "model_type": "audio-spectrogram-transformer",
    "num_mel_bins": 32,
    "max_length": 128,
}
FBANK = {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 32, "max_length": 128}
CLAP = {
    "model_type": "clap_audio_model",
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "patch_embeds_hidden_size": 8,
    "hidden_size": 64,
    "window_size": 4,
}
CLAP_MEL = {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc"}


def load(config: dict[str, Any], **values: Any) -> LoadedEncoder:
    torch.manual_seed(0)
    values.setdefault("preprocessor", MEL)
    branch = parse(BranchConfig, {"encoder_config": config, **values})
    return load_encoder("audio", branch, SamplingConfig(), torch.float32)


def encode(found: LoadedEncoder, modality: str, one: Any) -> torch.Tensor:
    return encoders.encode(found.model, found.spec, modality, one)["x"]  # type: ignore[arg-type]


def noise(seconds: float, rate: int = 16000, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(int(seconds * rate))).astype(np.float32)


def heard(found: LoadedEncoder, sound: Any, rate: int = 16000) -> torch.Tensor:
    with torch.inference_mode():
        return encode_sound(found.model, found.spec, sound, rate)


def whisper() -> WhisperEncoder:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**WHISPER)
    return WhisperEncoder(config).eval()


def test_whisper_equals_transformers_at_thirty_seconds() -> None:
    encoder = whisper()
    mel = torch.randn(1, 16, 3000)
    states = whisper_states(encoder, mel)
    theirs = encoder(mel, output_hidden_states=True)
    torch.testing.assert_close(states.last_hidden_state, theirs.last_hidden_state)
    assert len(states.hidden_states) == 3
    torch.testing.assert_close(states.hidden_states[0], theirs.hidden_states[0])
    torch.testing.assert_close(states.hidden_states[1], theirs.hidden_states[1])


def test_whisper_mel_of_a_short_clip_is_the_start_of_the_padded_one() -> None:
    """All but the last frames: there the padded mel looks into the silence after the sound."""
    extractor = WhisperFeatureExtractor(**{k: v for k, v in MEL.items() if "type" not in k})
    wave = clip(3, 1.25).waveform
    ours = extractor(wave, sampling_rate=16000, padding="do_not_pad", return_tensors="pt")
    padded = extractor(wave, sampling_rate=16000, return_tensors="pt")
    assert ours["input_features"].shape[-1] == 125
    torch.testing.assert_close(
        ours["input_features"][..., :-2], padded["input_features"][..., :123], atol=1e-5, rtol=0
    )


def test_whisper_short_and_long_clips() -> None:
    found = load(WHISPER)
    assert encode(found, "audio", clip(0, 1.0)).shape == (50, 24)
    assert encode(found, "audio", clip(0, 0.01)).shape == (5, 24)
    long = clip(0, 31.0)
    joined = encode(found, "audio", long)
    assert joined.shape == (1550, 24)
    assert long.waveform is not None
    tail = dataclasses.replace(long, waveform=long.waveform[480000:])
    assert torch.equal(joined[1500:], encode(found, "audio", tail))


@pytest.mark.parametrize(
    "kind",
    ["wav2vec2", "hubert", "wavlm", "data2vec-audio", "sew", "unispeech-sat", "wav2vec2-conformer"],
)
def test_waveform_encoders_equal_their_own_processor_and_model(kind: str, tmp_path: Path) -> None:
    config = {**WAVEFORM, "model_type": kind}
    if kind == "data2vec-audio":
        config |= {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}
    folder = save_encoder(tmp_path, config, WAVE)
    found = load_folder("audio", folder, layer=1)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    sound = noise(0.8)
    with torch.inference_mode():
        inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
        model = AutoModel.from_pretrained(folder).eval()
        want = model(inputs, output_hidden_states=True).hidden_states[1]
    assert torch.equal(heard(found, sound), want[0])


@pytest.mark.parametrize("samples", [16000, 16160])  # 98 frames, and 99: they go in twos
def test_wav2vec2_bert_equals_its_own_processor_and_model(samples: int, tmp_path: Path) -> None:
    config = {**SIZES, "model_type": "wav2vec2-bert", "feature_projection_input_dim": 160}
    extractor = {"feature_extractor_type": "SeamlessM4TFeatureExtractor"}
    folder = save_encoder(tmp_path, config, extractor)
    found = load_folder("audio", folder)
    sound = noise(2)[:samples]
    inputs = AutoFeatureExtractor.from_pretrained(folder)(
        sound, sampling_rate=16000, return_tensors="pt"
    )
    with torch.inference_mode():
        want = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]
    valid = int(inputs["attention_mask"].sum())
    torch.testing.assert_close(heard(found, sound), want[:valid])
    assert valid == 49


def ast_grid(state: torch.Tensor) -> torch.Tensor:
    """(1, 2 + f t, D) -> (t, D) of the tiny AST, which has 2 rows of 12 steps."""
    return state[0, 2:].reshape(2, 12, -1).mean(0)


def test_ast_equals_its_own_processor_and_model_on_a_short_sound(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, AST, FBANK)
    found = load_folder("audio", folder)
    sound = noise(1.0)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        state = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    # 98 frames: patches start at frames 0, 10, ..., and the one at 90 sees the last of them.
    torch.testing.assert_close(heard(found, sound), ast_grid(state)[:10])


def test_ast_hears_all_of_a_long_sound(tmp_path: Path) -> None:
    found = load_folder("audio", save_encoder(tmp_path, AST, FBANK))
    sound = noise(6.0)
    other = sound.copy()
    other[48000:] = noise(3.0, seed=1)
    one, two = heard(found, sound), heard(found, other)
    assert one.shape == (60, 16)
    assert not torch.equal(one[30:], two[30:])
    assert torch.equal(one[:12], two[:12])  # the first window lies before the change


def test_asts_windows_are_those_of_one_long_spectrogram(tmp_path: Path) -> None:
    """The embeddings of patches say nothing of what is around: they are cut without a seam."""
    found = load_folder("audio", save_encoder(tmp_path, AST, FBANK), layer=0)
    sound = noise(5.0)
    got = heard(found, sound)
    projection: Any = found.model.get_input_embeddings().projection
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    extractor.max_length = 498
    mel = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        whole = projection(mel.transpose(1, 2)[:, None])[0].mean(1).T  # (t, D)
        positions: Any = found.model.embeddings.position_embeddings
        place = positions[0, 2:].reshape(2, 12, -1).mean(0)
    steps = len(whole)  # 49: where a whole patch fits; one more sees the last frames and padding
    want = whole + place.repeat(5, 1)[:steps]
    torch.testing.assert_close(got[:steps], want, atol=1e-5, rtol=1e-4)
    assert steps <= len(got) <= steps + 1


@pytest.mark.parametrize("fusion", [False, True])
def test_clap_equals_its_own_processor_and_model(fusion: bool, tmp_path: Path) -> None:
    mel = {**CLAP_MEL, "truncation": "fusion"} if fusion else CLAP_MEL
    folder = save_encoder(tmp_path, {**CLAP, "enable_fusion": fusion}, mel)
    found = load_folder("audio", folder, sample_rate=48000)
    sound = noise(10.0, 48000)
    inputs = AutoFeatureExtractor.from_pretrained(folder)(
        sound, sampling_rate=48000, return_tensors="pt"
    )
    with torch.inference_mode():
        state = ClapAudioModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    want = state[0].mean(1).T  # (D, f, t) -> (t, D)
    torch.testing.assert_close(heard(found, sound, 48000), want)
    # A shorter sound is repeated to fill the window, and only its own part is kept.
    assert len(heard(found, sound[: 5 * 48000], 48000)) == len(want) // 2


def test_clap_hears_all_of_a_long_sound(tmp_path: Path) -> None:
    found = load_folder("audio", save_encoder(tmp_path, CLAP, CLAP_MEL), sample_rate=48000)
    sound = noise(20.0, 48000)
    whole = heard(found, sound, 48000)
    parts = [heard(found, part, 48000) for part in np.split(sound, 2)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, heard(found, sound, 48000))  # nothing is drawn at random


def test_claps_inner_layers_are_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, CLAP, CLAP_MEL)
    with pytest.raises(ConfigError, match="in order of time; use layer -1"):
        load_folder("audio", folder, layer=1, sample_rate=48000)
    with pytest.raises(ConfigError, match=r"set sampling\.sample_rate to 48000"):
        load_folder("audio", folder)


def test_whole_clap_gives_its_audio_half(tmp_path: Path) -> None:
    text = {**SIZES, "vocab_size": 32, "pad_token_id": 0}
    whole = {"model_type": "clap", "audio_config": CLAP, "text_config": text}
    folder = save_encoder(tmp_path, whole, CLAP_MEL)
    branch = {"encoder": str(folder)}
    model: Any = tiny(
        video=None, face=None, fusion=None, audio=branch, sampling={"sample_rate": 48000}
    ).model
    assert isinstance(model.encoder("audio"), ClapAudioModel)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.feature_fingerprint("audio") == model.feature_fingerprint("audio")


def test_encoders_that_insist_on_thirty_seconds_are_padded(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 16,
    }
    folder = save_encoder(tmp_path, config, MEL)
    found = load_folder("audio", folder)
    sound = noise(4.0)
    inputs = AutoFeatureExtractor.from_pretrained(folder)(
        sound, sampling_rate=16000, return_tensors="pt"
    )
    with torch.inference_mode():
        want = AutoModel.from_pretrained(folder).eval()(inputs["input_features"])
    torch.testing.assert_close(heard(found, sound), want.last_hidden_state[0, :100])
    assert len(heard(found, noise(40.0))) == 750 + 250


def test_the_encoder_of_an_encoder_decoder_is_taken(tmp_path: Path) -> None:
    config = {
        "model_type": "speech_to_text",
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "conv_channels": 16,
        "vocab_size": 50,
    }
    mel = {"feature_extractor_type": "Speech2TextFeatureExtractor"}
    found = load_folder("audio", save_encoder(tmp_path, config, mel))
    assert type(found.model).__name__ == "Speech2TextEncoder"
    assert heard(found, noise(1.0)).shape == (25, 16)


def test_codecs_are_refused_in_a_sentence(tmp_path: Path) -> None:
    mimi = {"model_type": "mimi", "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match="use an encoder that returns one, not a codec"):
        load(
            mimi,
            preprocessor={
                "feature_extractor_type": "EncodecFeatureExtractor",
                "sampling_rate": 16000,
            },
        )


def test_windows_start_where_a_step_is_worth_it() -> None:
    window = SoundWindow(size=100, hop=90, least=20, padded=True)
    assert window.starts(100) == [0]
    assert window.starts(105) == [0]
    assert window.starts(110) == [0, 90]
    assert window.starts(199) == [0, 90]
    assert window.starts(200) == [0, 90, 180]
