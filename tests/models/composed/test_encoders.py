from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmemo.config import parse
from mmemo.errors import ConfigError, MediaError
from mmemo.media.config import SamplingConfig
from mmemo.models.build import Loaded
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.encoders import LoadedEncoder, load_encoder
from mmemo.models.composed.preprocessors import load_image_processor, preprocess_frames
from mmemo.models.config import BranchConfig
from tests.models.parts import IMAGES, MEL, VIT, WHISPER, clip, tiny

SAMPLING = SamplingConfig()


def load(modality: str, config: dict[str, Any], **values: Any) -> LoadedEncoder:
    torch.manual_seed(0)
    values.setdefault("preprocessor", MEL if modality == "audio" else IMAGES)
    branch = parse(BranchConfig, {"encoder_config": config, **values})
    return load_encoder(modality, branch, SAMPLING, torch.float32)  # type: ignore[arg-type]


def encode(found: LoadedEncoder, modality: str, one: Any) -> torch.Tensor:
    return encoders.encode(found.model, found.spec, modality, one)["x"]  # type: ignore[arg-type]


def pixels(one: Any) -> torch.Tensor:
    return preprocess_frames(load_image_processor(IMAGES), one.frames)["pixel_values"]


def test_bits_do_not_depend_on_the_batch(loaded: Loaded) -> None:
    clips = [clip(0, 0.7), clip(1, 2.3), clip(2, 1.0)]
    for modality in ("video", "audio", "face"):
        model: Any = loaded.model
        together = model.encode(modality, clips)
        alone = [model.encode(modality, [one])[0] for one in reversed(clips)][::-1]
        for one, two in zip(together, alone, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
            assert one["x"].device.type == "cpu"
            assert not one["x"].requires_grad


def test_surroundings_change_no_bits(loaded: Loaded) -> None:
    model: Any = loaded.model
    plain = model.encode("video", [clip(0)])[0]["x"]
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = model.encode("video", [clip(0)])[0]["x"]
    model.eval()
    assert torch.equal(plain, other)


def test_face_features_know_how_often_a_face_was_found(loaded: Loaded) -> None:
    model: Any = loaded.model
    assert model.encode("face", [clip(0)])[0]["found"].tolist() == [0.75]
    assert set(model.encode("video", [clip(0)])[0]) == {"x"}


def test_face_branch_sees_the_crops(loaded: Loaded) -> None:
    model: Any = loaded.model
    one = clip(0)
    assert one.faces is not None
    other = dataclasses.replace(one, frames=None)
    assert torch.equal(model.encode("face", [one])[0]["x"], model.encode("face", [other])[0]["x"])
    with pytest.raises(MediaError, match="no_frames"):
        model.encode("face", [dataclasses.replace(one, faces=None)])


def test_missing_streams_are_typed_errors(loaded: Loaded) -> None:
    model: Any = loaded.model
    with pytest.raises(MediaError, match="no_video"):
        model.encode("video", [dataclasses.replace(clip(0), frames=None)])
    with pytest.raises(MediaError, match="no_audio"):
        model.encode("audio", [dataclasses.replace(clip(0), waveform=None)])


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_vit_layers_and_grid(layer: int) -> None:
    found = load("video", VIT, layer=layer, spatial_tokens=2)
    one = clip(0)
    outputs = found.model(pixels(one), output_hidden_states=True)
    state = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    grid = state[:, 1:].reshape(4, 4, 4, 16)  # frames, rows, columns, width
    expected = grid.reshape(4, 2, 2, 2, 2, 16).mean((2, 4)).reshape(16, 16)
    torch.testing.assert_close(encode(found, "video", one), expected)
    assert (found.spec.feature_size, found.spec.feature_layers) == (16, 0)


def test_class_token() -> None:
    found = load("video", VIT, spatial_tokens=0)
    one = clip(0)
    expected = found.model(pixels(one)).last_hidden_state[:, 0]
    torch.testing.assert_close(encode(found, "video", one), expected)


def test_layer_list_is_stacked_for_a_mix() -> None:
    found = load("video", VIT, layer=[0, 2])
    assert found.spec.feature_layers == 2
    single = load("video", VIT, layer=2)
    torch.testing.assert_close(encode(found, "video", clip(0))[1], encode(single, "video", clip(0)))
    assert encode(load("video", VIT, layer="mix"), "video", clip(0)).shape == (3, 4, 16)


def test_other_image_sizes_are_interpolated() -> None:
    larger = {**IMAGES, "size": {"height": 48, "width": 48}}
    found = load("video", VIT, preprocessor=larger, spatial_tokens=6)
    assert encode(found, "video", clip(0)).shape == (4 * 36, 16)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ],
)
def test_convolutional_encoders(config: dict[str, Any]) -> None:
    found = load("video", config)
    one = clip(0)
    state = found.model(pixels(one)).last_hidden_state
    assert state.ndim == 4
    torch.testing.assert_close(encode(found, "video", one), state.mean((2, 3)))
    with pytest.raises(ConfigError, match="class token"):
        load("video", config, spatial_tokens=0)
    with pytest.raises(ConfigError, match="one size"):
        load("video", config, layer="mix")


@pytest.mark.parametrize(
    "config",
    [
        {**VIT, "model_type": "dinov2", "num_register_tokens": 2},
        {**VIT, "model_type": "siglip_vision_model"},
        {**VIT, "model_type": "clip_vision_model"},
        {**VIT, "model_type": "dinov2_with_registers", "num_register_tokens": 2},
    ],
)
def test_usual_vision_encoders(config: dict[str, Any]) -> None:
    found = load("video", config, spatial_tokens=4, layer=1)
    one = clip(0)
    state = found.model(pixels(one), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(encode(found, "video", one), state[:, -16:].reshape(64, 16))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_the_last_layer_is_the_encoders_output_in_a_list_too(modality: str) -> None:
    """Not the state before the final norm."""
    config = VIT if modality == "video" else WHISPER
    one = encode(load(modality, config, layer=-1), modality, clip(0))
    found = encode(load(modality, config, layer=[1, -1]), modality, clip(0))
    torch.testing.assert_close(found[1], one)
    assert found.shape == (2, *one.shape)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_layers_that_are_not_there_are_refused(modality: str) -> None:
    with pytest.raises(ConfigError, match="hidden states 0 to 2"):
        load(modality, VIT if modality == "video" else WHISPER, layer=7)


def test_grid_larger_than_the_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid"):
        load("video", VIT, spatial_tokens=5)


def test_stride_averages_steps() -> None:
    plain, strided = load("audio", WHISPER), load("audio", WHISPER, stride=4)
    x = encode(plain, "audio", clip(0, 0.2))
    expected = torch.stack([x[0:4].mean(0), x[4:8].mean(0), x[8:].mean(0)])
    torch.testing.assert_close(encode(strided, "audio", clip(0, 0.2)), expected)


def test_rate_must_fit() -> None:
    found = load("audio", WHISPER)
    with pytest.raises(ConfigError, match="16000 Hz"):
        encode(found, "audio", dataclasses.replace(clip(0), sample_rate=8000))


def test_non_finite_features_are_refused() -> None:
    found = load("audio", WHISPER)
    one = clip(0)
    wave = np.full_like(one.waveform, np.nan)
    with pytest.raises(MediaError, match="non-finite"):
        encode(found, "audio", dataclasses.replace(one, waveform=wave))


def test_dtype_of_stored_features() -> None:
    assert encode(load("video", VIT, dtype="bfloat16"), "video", clip(0)).dtype == torch.bfloat16


def test_fingerprint_follows_everything_that_matters() -> None:
    base = load("video", VIT)
    prints = {"base": encoders.fingerprint(base.model, base.spec, "video")}
    assert prints["base"] == encoders.fingerprint(*_pair(load("video", VIT)), "video")
    for name, values in {
        "layer": {"layer": 1},
        "grid": {"spatial_tokens": 2},
        "dtype": {"dtype": "float16"},
        "preprocessor": {"preprocessor": {**IMAGES, "image_mean": [0.4, 0.5, 0.5]}},
    }.items():
        prints[name] = encoders.fingerprint(*_pair(load("video", VIT, **values)), "video")
    with torch.no_grad():
        next(base.model.parameters()).view(-1)[0] += 1e-3
    prints["weights"] = encoders.fingerprint(base.model, base.spec, "video")
    assert len(set(prints.values())) == len(prints)
    # What the connector does later changes no feature.
    pooled = load("video", VIT, tokens=4, pooling="attention", norm=False)
    assert encoders.fingerprint(pooled.model, pooled.spec, "video") == prints["base"]


def _pair(found: LoadedEncoder) -> tuple[Any, SavedBranchConfig]:
    return found.model, found.spec


def test_fingerprint_survives_saving(loaded: Loaded, tmp_path: Path) -> None:
    model: Any = loaded.model
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for modality in model.modalities:
        assert again.feature_fingerprint(modality) == model.feature_fingerprint(modality)
        one, two = (m.encode(modality, [clip(5)])[0]["x"] for m in (model, again))
        assert torch.equal(one, two)


def saved_encoder(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> Path:
    import json

    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_encoders_from_folders(tmp_path: Path) -> None:
    vit = saved_encoder(tmp_path / "vit", VIT, IMAGES)
    whole = saved_encoder(tmp_path / "whisper", WHISPER, MEL)
    bare = tmp_path / "encoder"
    encoder = AutoModel.from_pretrained(whole).get_encoder()
    encoder.save_pretrained(bare)
    (bare / "preprocessor_config.json").write_text((whole / "preprocessor_config.json").read_text())
    model: Any = tiny(
        video={"encoder": str(vit)}, face=None, audio={"encoder": str(whole)}, fusion=None
    ).model
    assert isinstance(model.encoder("audio"), WhisperEncoder)
    ours = model.encode("video", [clip(0)])[0]["x"]
    theirs = AutoModel.from_pretrained(vit)(pixels(clip(0))).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(ours, theirs)
    again: Any = tiny(video=None, face=None, fusion=None, audio={"encoder": str(bare)}).model
    assert torch.equal(
        again.encode("audio", [clip(0)])[0]["x"], model.encode("audio", [clip(0)])[0]["x"]
    )


def test_clip_folder_gives_its_vision_half(tmp_path: Path) -> None:
    small = {k: v for k, v in VIT.items() if k != "model_type"}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    config = {"model_type": "clip", "vision_config": small, "text_config": text}
    folder = saved_encoder(
        tmp_path,
        config,
        {**IMAGES, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
    )
    model: Any = tiny(video={"encoder": str(folder)}, audio=None, face=None, fusion=None).model
    assert type(model.encoder("video")).__name__ == "CLIPVisionModel"
    whole = AutoModel.from_pretrained(folder)
    expected = whole.vision_model(pixels(clip(0))).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(model.encode("video", [clip(0)])[0]["x"], expected)


def test_a_checkpoint_without_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved_encoder(tmp_path, VIT, IMAGES)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".0." not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks the weights"):
        tiny(video={"encoder": str(folder)})


def test_folders_that_are_no_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tiny(video={"encoder": str(tmp_path)})
    AutoModel.from_config(AutoConfig.for_model(**VIT)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="preprocessor"):
        tiny(video={"encoder": str(tmp_path)})
