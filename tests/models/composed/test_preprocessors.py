"""Preprocessors are transformers' own, in their PIL/NumPy form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.errors import ConfigError
from mmemo.models.composed.preprocessors import (
    load_feature_extractor,
    load_image_processor,
    preprocess_frames,
    resolved_settings,
)

DINOV2 = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("BitImageProcessorPil", {}),
    ("BitImageProcessorPil", DINOV2),
    ("CLIPImageProcessorPil", {}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": 65}),
    ("ViTImageProcessorPil", {}),
    ("ViTImageProcessorPil", {"size": {"height": 30, "width": 52}, "do_normalize": False}),
    ("ViTImageProcessorPil", {"do_rescale": False, "image_mean": [120, 110, 100]}),
    ("SiglipImageProcessorPil", {}),
    ("DeiTImageProcessorPil", {}),
    ("BeitImageProcessorPil", {}),
    ("BlipImageProcessorPil", {}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
    ("EfficientNetImageProcessorPil", {}),
    ("LevitImageProcessorPil", {}),
]


def frames_of(count: int, height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(("name", "values"), PROCESSORS)
@pytest.mark.parametrize("size", [(90, 120), (64, 64), (300, 260)])
def test_a_saved_file_gives_the_pixels_of_the_processor(
    name: str, values: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    processor = getattr(transformers, name)(**values)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    frames = frames_of(2, *size)
    want = processor([*frames], input_data_format="channels_last", return_tensors="np")
    got = preprocess_frames(load_image_processor(saved), frames)
    assert got["pixel_values"].dtype == torch.float32
    np.testing.assert_array_equal(got["pixel_values"].numpy(), want["pixel_values"])


@settings(max_examples=15)
@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    shortest=st.integers(8, 60),
    crop=st.tuples(st.integers(4, 70), st.integers(4, 70)),
)
def test_any_size_and_crop(height: int, width: int, shortest: int, crop: tuple[int, int]) -> None:
    values = {
        "size": {"shortest_edge": shortest},
        "crop_size": {"height": crop[0], "width": crop[1]},
    }
    frames = frames_of(1, height, width)
    want = transformers.CLIPImageProcessorPil(**values)(
        frames[0], input_data_format="channels_last", return_tensors="np"
    )
    named = {**values, "image_processor_type": "CLIPImageProcessor"}
    got = preprocess_frames(load_image_processor(named), frames)["pixel_values"]
    np.testing.assert_array_equal(got.numpy(), want["pixel_values"])


def test_old_files_name_a_feature_extractor_and_one_number() -> None:
    old = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    frames = frames_of(1, 40, 60)
    square = load_image_processor({**old, "feature_extractor_type": "ViTFeatureExtractor"})
    assert preprocess_frames(square, frames)["pixel_values"].shape == (1, 3, 224, 224)
    clip = load_image_processor(
        {
            **old,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "do_center_crop": True,
            "crop_size": 200,
        }
    )
    assert preprocess_frames(clip, frames)["pixel_values"].shape == (1, 3, 200, 200)


def test_the_encoder_decides_where_the_file_names_no_class() -> None:
    values = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert "Siglip" in type(load_image_processor(values, "siglip")).__name__
    # An encoder that transformers does not know: resize, rescale and normalise.
    plain = preprocess_frames(load_image_processor(values, "face_expression"), frames_of(1, 9, 9))
    assert plain["pixel_values"].shape == (1, 3, 8, 8)


def test_vivit_needs_no_torchvision_and_shifts_to_minus_one() -> None:
    values = {"video_processor_type": "VivitVideoProcessor", "do_normalize": False}
    black = np.zeros((1, 300, 300, 3), np.uint8)
    pixels = preprocess_frames(load_image_processor(values), black)["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert (pixels == -1).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "NobodysImageProcessor"}, "does not know it"),
        ({"image_processor_type": "Sam2ImageProcessor"}, "needs torchvision .pip install"),
        ({}, "without image_processor_type"),
        ({"video_processor_type": "Qwen2VLVideoProcessor"}, "needs torchvision"),
    ],
)
def test_processors_that_cannot_be_had_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_image_processor(values, "vit" if values else "")
    assert "\n" not in str(refused.value)
    assert "/tmp" not in str(refused.value)


def test_processors_that_cut_an_image_up_are_refused() -> None:
    processor = load_image_processor({"image_processor_type": "LlavaNextImageProcessor"})
    with pytest.raises(ConfigError, match="one image of each frame"):
        preprocess_frames(processor, frames_of(2, 40, 60))


def test_frames_of_another_type_are_refused() -> None:
    processor = load_image_processor({"image_processor_type": "ViTImageProcessor"})
    with pytest.raises(ValueError, match="uint8"):
        preprocess_frames(processor, np.zeros((1, 8, 8, 3), np.float32))  # type: ignore[arg-type]


def test_settings_that_a_file_leaves_out_are_part_of_the_identity() -> None:
    found = resolved_settings(load_image_processor({"image_processor_type": "ViTImageProcessor"}))
    assert found["resample"] == 2
    assert found["class"] == "ViTImageProcessorPil"
    mel = resolved_settings(
        load_feature_extractor({"feature_extractor_type": "WhisperFeatureExtractor"})
    )
    assert mel["hop_length"] == 160
    assert "mel_filters" not in mel


def test_unknown_feature_extractors_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not know it"):
        load_feature_extractor({"feature_extractor_type": "NobodysFeatureExtractor"})
