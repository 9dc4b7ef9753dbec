"""Frames become Qwen2-VL's patches exactly as in transformers' own processors."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as hf_smart_resize,
)

from mmemo.media import image


def frames_of(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(90, 120), (131, 77), (64, 64), (300, 260)])
def test_pixels_equal_the_hf_processor(size):
    processor = transformers.ViTImageProcessorPil(
        size={"height": 84, "width": 56},
        resample=3,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2] * 3,
    )
    frames = frames_of(2, *size)
    want = processor([*frames], input_data_format="channels_last", return_tensors="np")
    got = image.normalise(image.resize(frames, (84, 56)), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want["pixel_values"])


def test_frames_of_another_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        image.resize(np.zeros((1, 8, 8, 3), np.float32), (4, 4))


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
    sized = image.resize(frames, (tall, wide))
    pixels = image.normalise(sized, tuple(processor.image_mean), tuple(processor.image_std))
    patches, grid = image.patchify_qwen(pixels, 14, 2, 2)
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
