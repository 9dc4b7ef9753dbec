"""Any image or video encoder of transformers: from a saved folder to features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from mmemo.config import dump
from mmemo.errors import ConfigError
from mmemo.models.composed import encoders, image_encoders
from mmemo.models.composed.image_encoders import VideoWindow, split_windows
from tests.models.composed.encoder_files import SIZES, load_folder, save_encoder
from tests.models.parts import IMAGES, clip, tiny

SQUARE = {"height": 32, "width": 32}
COLOURS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
VIT = {**SIZES, "image_size": 32, "patch_size": 8}
DINOV3 = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "size": SQUARE,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 2,
    **COLOURS,
}
CONVNEXT = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_pct": 0.875,
    **COLOURS,
}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": SQUARE, **COLOURS}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}

# Configs of image encoders, their preprocessors, and the tokens before the patches.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "vit": ({**VIT, "model_type": "vit"}, IMAGES, 1),
    "dinov2": (
        {**VIT, "model_type": "dinov2"},
        {"image_processor_type": "BitImageProcessor", "resample": 3, **CROPPED},
        1,
    ),
    "clip": (
        {**VIT, "model_type": "clip_vision_model"},
        {"image_processor_type": "CLIPImageProcessor", **CROPPED},
        1,
    ),
    "siglip": (
        {**VIT, "model_type": "siglip_vision_model"},
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
        0,
    ),
    "deit": (
        {**VIT, "model_type": "deit"},
        {"image_processor_type": "DeiTImageProcessor", **CROPPED, "size": SQUARE},
        2,
    ),
    "beit": (
        {**VIT, "model_type": "beit"},
        {"image_processor_type": "BeitImageProcessor", **CROPPED, "size": SQUARE},
        1,
    ),
    "blip": (
        {**VIT, "model_type": "blip_vision_model"},
        {"image_processor_type": "BlipImageProcessor", "size": SQUARE},
        1,
    ),
    "dinov3": ({**VIT, "model_type": "dinov3_vit", "num_register_tokens": 3}, DINOV3, 4),
    "dinov3_convnext": (
        {"model_type": "dinov3_convnext", "hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]},
        {**DINOV3, "size": {"height": 128, "width": 128}},
        1,
    ),
    "convnext": ({**STAGES, "model_type": "convnext"}, CONVNEXT, 0),
    "convnextv2": ({**STAGES, "model_type": "convnextv2"}, CONVNEXT, 0),
    "resnet": (
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        CONVNEXT,
        0,
    ),
    "efficientnet": (
        {
            "model_type": "efficientnet",
            "image_size": 128,
            "width_coefficient": 0.1,
            "depth_coefficient": 0.1,
            "hidden_dim": 128,
            "depth_divisor": 4,
        },
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "size": {"height": 128, "width": 128},
            "include_top": True,
            **COLOURS,
        },
        0,
    ),
    "swin": (
        {
            "model_type": "swin",
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        IMAGES,
        0,
    ),
}


def hf_pixels(folder: Path, frames: np.ndarray, preprocessor: dict[str, Any]) -> torch.Tensor:
    """(F, 3, h, w) of transformers' own processor, or of its steps where it needs torchvision."""
    images = [Image.fromarray(frame) for frame in frames]
    if "DINOv3" not in str(preprocessor):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return processor(images, return_tensors="pt")["pixel_values"]
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) * preprocessor["rescale_factor"]
    size = tuple(preprocessor["size"].values())
    x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(preprocessor[key])[:, None, None] for key in COLOURS)
    return (x - mean) / std


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_the_encoders_own_processor_and_model(name: str, tmp_path: Path) -> None:
    config, preprocessor, before = FAMILIES[name]
    folder = save_encoder(tmp_path, config, preprocessor)
    found = load_folder("video", folder, spatial_tokens=2)
    one = clip(0)
    assert one.frames is not None
    with torch.inference_mode():
        state = (
            type(found.model)
            .from_pretrained(folder)
            .eval()(hf_pixels(folder, one.frames, preprocessor))
        )
        state = state.last_hidden_state
    grid = state
    if state.ndim == 3:
        side = int((state.shape[1] - before) ** 0.5)
        grid = state[:, before:].transpose(1, 2).unflatten(2, (side, side))
    want = torch.nn.functional.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    got = encoders.encode(found.model, found.spec, "video", one)["x"]
    assert torch.equal(got, want.flatten(0, 1))
    if before:
        token = load_folder("video", folder, spatial_tokens=0)
        got = encoders.encode(token.model, token.spec, "video", one)["x"]
        assert torch.equal(got, state[:, 0])
    else:
        with pytest.raises(ConfigError, match="class token"):
            load_folder("video", folder, spatial_tokens=0)


def test_registers_are_no_class_token() -> None:
    config = transformers.Dinov2Config(num_register_tokens=2)
    registers = torch.zeros(1, 2, 8)
    with pytest.raises(ConfigError, match="class token"):
        image_encoders.class_token(registers, config)


def siglip2(folder: Path) -> Path:
    return save_encoder(
        folder,
        {
            "model_type": "siglip2",
            "vision_config": {**SIZES, "num_patches": 16, "patch_size": 8},
            "text_config": {**SIZES, "vocab_size": 32},
        },
        {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": 8,
            "max_num_patches": 18,
        },
    )


def test_siglip2_keeps_the_aspect_and_its_padding_is_cut_off(tmp_path: Path) -> None:
    folder = siglip2(tmp_path)
    found = load_folder("video", folder, spatial_tokens=2)
    assert type(found.model).__name__ == "Siglip2VisionModel"
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 80, 3), np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = processor([Image.fromarray(frame) for frame in frames], return_tensors="pt")
    height, width = inputs["spatial_shapes"][0].tolist()
    assert (height, width) == (3, 6)
    with torch.inference_mode():
        vision = AutoModel.from_pretrained(folder).eval().vision_model
        state = vision(**inputs).last_hidden_state[:, : height * width]
        got = image_encoders.encode_frames(found.model, found.spec, frames)
    grid = state.transpose(1, 2).unflatten(2, (height, width))
    want = torch.nn.functional.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    assert torch.equal(got, want.flatten(0, 1))


VIDEO = {**VIT, "num_frames": 4}
VIDEO_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "vivit": (
        {
            **SIZES,
            "model_type": "vivit",
            "image_size": 32,
            "num_frames": 4,
            "tubelet_size": [2, 8, 8],
        },
        {"image_processor_type": "VivitImageProcessor", "rescale_factor": 1 / 127.5, **CROPPED},
        1,
        2,
    ),
    "videomae": (
        {**VIDEO, "model_type": "videomae", "tubelet_size": 2},
        {"image_processor_type": "VideoMAEImageProcessor", **CROPPED},
        0,
        2,
    ),
    "timesformer": (
        {**VIDEO, "model_type": "timesformer"},
        {"image_processor_type": "VideoMAEImageProcessor", **CROPPED},
        1,
        1,
    ),
    "vjepa2": (
        {
            "model_type": "vjepa2",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "crop_size": 32,
            "patch_size": 8,
            "frames_per_clip": 4,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
        },
        {"video_processor_type": "VJEPA2VideoProcessor", **CROPPED},
        0,
        2,
    ),
}


def video_folder(name: str, folder: Path) -> Path:
    config, preprocessor, _, _ = VIDEO_FAMILIES[name]
    kind = "video_" if "video_processor_type" in preprocessor else ""
    return save_encoder(folder, config, preprocessor, f"{kind}preprocessor_config.json")


def hf_video_states(name: str, folder: Path, frames: np.ndarray) -> torch.Tensor:
    """(1, P, D) of transformers' own processor and model on these frames as one video."""
    images = [Image.fromarray(frame) for frame in frames]
    if name == "vjepa2":
        processor = transformers.VideoMAEImageProcessorPil(**CROPPED)
    else:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    video = processor(images, return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(video).last_hidden_state


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_video_encoders_see_the_frames_as_one_clip(name: str, tmp_path: Path) -> None:
    folder = video_folder(name, tmp_path)
    _, _, before, tubelet = VIDEO_FAMILIES[name]
    found = load_folder("video", folder, spatial_tokens=4)
    one = clip(0)
    assert one.frames is not None
    state = hf_video_states(name, folder, one.frames)[:, before:]
    got = encoders.encode(found.model, found.spec, "video", one)["x"]
    want = state[0]
    if name == "timesformer":  # place by place, each over time
        want = want.unflatten(0, (16, 4)).transpose(0, 1).flatten(0, 1)
    assert got.shape == (4 // tubelet * 16, found.spec.feature_size)
    assert torch.equal(got, want)


def test_timesformers_tokens_are_put_in_the_order_of_time(tmp_path: Path) -> None:
    """Its embeddings of a frame change with that frame alone."""
    found = load_folder("video", video_folder("timesformer", tmp_path), spatial_tokens=2, layer=0)
    frames = clip(0).frames
    assert frames is not None
    other = frames.copy()
    other[2] = 0
    one, two = (image_encoders.encode_frames(found.model, found.spec, x) for x in (frames, other))
    changed = (one != two).any(1).unflatten(0, (4, 4)).any(1)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_longer_videos_are_seen_in_windows(name: str, tmp_path: Path) -> None:
    folder = video_folder(name, tmp_path)
    found = load_folder("video", folder, frames=8, spatial_tokens=2)
    frames = clip(1, frames=8).frames
    assert frames is not None
    parts = [image_encoders.encode_frames(found.model, found.spec, x) for x in np.split(frames, 2)]
    whole = image_encoders.encode_frames(found.model, found.spec, frames)
    assert torch.equal(whole, torch.cat(parts))


def test_sampling_that_gives_no_whole_windows_is_refused(tmp_path: Path) -> None:
    folder = video_folder("videomae", tmp_path / "videomae")
    with pytest.raises(ConfigError, match=r"takes 4 frames at a time, .* set sampling.frames to 4"):
        load_folder("video", folder, frames=6)
    with pytest.raises(ConfigError, match=r"sampling\.frames to 4"):
        load_folder("face", folder, frames=2)
    jepa = video_folder("vjepa2", tmp_path / "vjepa2")
    with pytest.raises(ConfigError, match="takes 2 frames at a time"):
        load_folder("video", jepa, frames=3)
    # Rotary positions serve fewer frames than it was trained on.
    x = load_folder("video", jepa, frames=2)
    got = image_encoders.encode_frames(x.model, x.spec, np.zeros((2, 48, 48, 3), np.uint8))
    assert got.shape == (1, 24)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 31])
def test_windows_show_every_frame_in_order(count: int, fixed: bool) -> None:
    windows = split_windows(count, VideoWindow(8, fixed, 2))
    joined = np.concatenate(windows)
    assert sorted(set(joined.tolist())) == list(range(count))
    assert (np.diff(joined) >= 0).all()
    assert len(windows) == -(-count // 8)
    assert all(len(one) == 8 if fixed else len(one) in (2, 4, 6, 8) for one in windows)


def test_a_wrong_crop_would_misplace_v_jepas_patches(tmp_path: Path) -> None:
    config, preprocessor, _, _ = VIDEO_FAMILIES["vjepa2"]
    wider = {**preprocessor, "crop_size": {"height": 32, "width": 48}}
    folder = save_encoder(tmp_path, config, wider, "video_preprocessor_config.json")
    with pytest.raises(ConfigError, match="set crop_size"):
        load_folder("video", folder)


def test_maps_with_the_colours_last_are_turned() -> None:
    found = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)  # (B, h, w, D) of 24 x 32 pixels
    turned = image_encoders.channels_first(found, torch.Size((24, 32)))
    assert turned.shape == (2, 6, 3, 4)
    assert image_encoders.channels_first(turned, torch.Size((24, 32))) is turned


@pytest.mark.parametrize("name", ["dinov3", "efficientnet", "videomae"])
def test_models_with_any_encoder_save_and_load(name: str, tmp_path: Path) -> None:
    if name in VIDEO_FAMILIES:
        folder = video_folder(name, tmp_path / "encoder")
    else:
        folder = save_encoder(tmp_path / "encoder", *FAMILIES[name][:2])
    branch = {"encoder": str(folder), "tokens": 2}
    model: Any = tiny(video=branch, audio=None, face=None, fusion=None).model
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.feature_fingerprint("video") == model.feature_fingerprint("video")
    one, two = (m.encode("video", [clip(5)])[0]["x"] for m in (model, again))
    assert torch.equal(one, two)
    assert dump(again.config.branch("video")) == dump(model.config.branch("video"))


def test_timm_says_what_to_install(tmp_path: Path) -> None:
    if transformers.utils.is_timm_available():
        pytest.skip("timm is here")
    (tmp_path / "config.json").write_text(
        '{"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 10, '
        '"pretrained_cfg": {"input_size": [3, 32, 32]}}'
    )
    with pytest.raises(ConfigError, match="pip install timm torchvision") as refused:
        load_folder("video", tmp_path)
    assert "\n" not in str(refused.value)


def test_encoders_that_cannot_work_say_why_in_a_sentence(tmp_path: Path) -> None:
    clip_text = save_encoder(
        tmp_path / "text",
        {**SIZES, "model_type": "clip_text_model", "vocab_size": 32, "bos_token_id": 0},
        IMAGES,
    )
    with pytest.raises(ConfigError, match="'clip_text_model' cannot encode a test clip"):
        load_folder("video", clip_text)
    sam = save_encoder(
        tmp_path / "sam",
        {**VIT, "model_type": "vit"},
        {"image_processor_type": "Sam2ImageProcessor"},
    )
    with pytest.raises(ConfigError, match=r"Sam2.*needs torchvision"):
        load_folder("video", sam)
