"""Our pixels equal those of transformers' own processors."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as hf_smart_resize,
)

from mmemo.errors import ConfigError
from mmemo.media import image


def frames_of(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


DINOV2 = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS = [
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
]


@pytest.mark.parametrize(("name", "settings_"), PROCESSORS)
@pytest.mark.parametrize("size", [(90, 120), (131, 77), (64, 64), (300, 260)])
def test_pixels_equal_the_hf_processor(name, settings_, size):
    processor = getattr(transformers, name)(**settings_)
    frames = frames_of(2, *size)
    want = processor([*frames], input_data_format="channels_last", return_tensors="np")
    spec = image.ImageSpec.from_hf(processor.to_dict())
    got = image.to_pixels(frames, spec)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want["pixel_values"])
    assert got.shape[2:] == spec.output_size(*size)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    shortest=st.integers(8, 60),
    crop=st.tuples(st.integers(4, 70), st.integers(4, 70)),
)
def test_any_size_and_crop_equals_the_hf_processor(height, width, shortest, crop):
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": shortest}, crop_size={"height": crop[0], "width": crop[1]}
    )
    frames = frames_of(1, height, width)
    want = processor(frames[0], input_data_format="channels_last", return_tensors="np")
    got = image.to_pixels(frames, image.ImageSpec.from_hf(processor.to_dict()))
    np.testing.assert_array_equal(got, want["pixel_values"])


def test_a_saved_preprocessor_config_reads_like_the_processor(tmp_path):
    processor = transformers.BitImageProcessorPil(**DINOV2)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert image.ImageSpec.from_hf(saved) == image.ImageSpec.from_hf(processor.to_dict())


def test_old_configs_with_one_number():
    old = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    square = image.ImageSpec.from_hf({**old, "feature_extractor_type": "ViTFeatureExtractor"})
    assert (square.size, square.shortest, square.crop) == ((224, 224), None, None)
    clip = image.ImageSpec.from_hf({**old, "do_center_crop": True, "crop_size": 200})
    assert (clip.size, clip.shortest, clip.crop) == (None, 224, (200, 200))


GOOD = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "image_processor_type": "LevitImageProcessor"}, "'Levit' is not supported"),
        ({**GOOD, "do_flip_channel_order": True}, "do_flip_channel_order"),
        ({**GOOD, "crop_pct": 0.875}, "crop_pct"),
        ({**GOOD, "image_mean": None}, "no 'image_mean'"),
        ({**GOOD, "image_std": [1.0]}, "'image_std' must hold three"),
        ({**GOOD, "size": None}, "no 'size'"),
        ({**GOOD, "size": {"shortest_edge": 8, "longest_edge": 9}}, "must hold height and width"),
    ],
)
def test_processors_that_do_something_else_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        image.ImageSpec.from_hf(values)


def test_frames_of_another_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        image.to_pixels(np.zeros((1, 8, 8, 3), np.float32), image.ImageSpec())


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([4, 28, 32]),
    least=st.integers(1, 200_000),
    more=st.integers(0, 1_000_000),
)
def test_smart_resize_equals_hf(height, width, factor, least, more):
    arguments = (height, width, factor, least, least + more)
    try:
        want = hf_smart_resize(*arguments)
    except ValueError:
        with pytest.raises(ValueError, match="too long and thin"):
            image.smart_resize(*arguments)
    else:
        assert image.smart_resize(*arguments) == want


@pytest.mark.parametrize("size", [(60, 100), (200, 120)])
def test_patches_of_an_image_equal_qwen2_vl(size):
    processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    frames = frames_of(1, *size)
    want = processor(frames[0], input_data_format="channels_last", return_tensors="np")
    tall, wide = image.smart_resize(*size, 28, 56 * 56, 112 * 112)
    spec = image.ImageSpec(
        size=(tall, wide), mean=tuple(processor.image_mean), std=tuple(processor.image_std)
    )
    patches, grid = image.patchify_qwen(image.to_pixels(frames, spec), 14, 2, 2)
    np.testing.assert_array_equal(patches, want["pixel_values"])
    assert [grid.tolist()] == want["image_grid_thw"].tolist()


def hf_video_patchify():
    """transformers' own function; its module does not import without torchvision."""
    name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
    source = Path(importlib.util.find_spec(name).origin).read_text()
    (function,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "patchify"
    )
    names = {"torch": torch}
    exec(compile(ast.Module([function], []), name, "exec"), names)
    return names["patchify"]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("patch", "temporal", "merge"), [(14, 2, 2), (4, 1, 2), (7, 3, 1)])
def test_patches_of_a_video_equal_qwen2_vl(count, patch, temporal, merge):
    pixels = np.random.default_rng(1).standard_normal((count, 3, 56, 112), np.float32)
    want, *grid = hf_video_patchify()(None, torch.tensor(pixels)[None], patch, merge, temporal)
    got, got_grid = image.patchify_qwen(pixels, patch, temporal, merge)
    np.testing.assert_array_equal(got, want[0].numpy())
    assert got_grid.tolist() == grid


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        image.patchify_qwen(np.zeros((1, 3, 28, 30), np.float32), 14, 2, 2)
