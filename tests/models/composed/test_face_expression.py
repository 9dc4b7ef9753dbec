"""The expression encoder with random weights; its real weights are checked in real_weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from mmemo.models.composed.face_expression import (
    EXPRESSIONS,
    PREPROCESSOR,
    FaceExpressionConfig,
    FaceExpressionModel,
)
from mmemo.models.composed.preprocessors import load_image_processor, preprocess_frames


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FaceExpressionModel(FaceExpressionConfig(hidden_sizes=[4, 8, 6, 10])).eval()


def test_shapes_and_that_the_pooled_vector_is_the_mean_of_the_map(model):
    output = model(torch.randn(2, 3, 112, 112), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 49, 10)
    assert output.pooler_output.shape == (2, 10)
    assert output.logits.shape == (2, len(EXPRESSIONS))
    assert [state.shape[1:] for state in output.hidden_states] == [
        (56 * 56, 4),
        (28 * 28, 8),
        (14 * 14, 6),
        (7 * 7, 10),
    ]
    torch.testing.assert_close(output.last_hidden_state.mean(1), output.pooler_output)


def test_an_image_means_the_same_in_any_batch(model):
    images = torch.randn(3, 3, 112, 112)
    alone = model(images[1:2]).pooler_output
    torch.testing.assert_close(model(images).pooler_output[1:2], alone)


def test_a_saved_folder_loads_through_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, FaceExpressionModel)
    assert again.config.hidden_size == 10
    assert again.config.id2label[1] == "happy"
    weights, theirs = model.state_dict(), again.state_dict()
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    # Not to the bit: some kernels round otherwise when weights lie unaligned, as in a mapped file.
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(model(images).logits, again(images).logits, atol=0, rtol=1e-4)
    assert model(images, return_dict=False)[1].shape == (1, 10)


def test_padding_is_tensorflows_same():
    """An even side padded by one at the end only: the first output looks at pixels 0 to 2."""
    model = FaceExpressionModel(FaceExpressionConfig(hidden_sizes=[1]))
    first = model.stages[0].convolutions[0]
    with torch.no_grad():
        first.mix.weight.zero_()
        first.mix.bias.zero_()
        first.mix.weight[0, 0, 0, 0] = 1  # copies the top-left pixel of each window
        image = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(1, 3, 1, 1)
        assert first(image)[0, 0].tolist() == [[0, 2], [8, 10]]


def test_preprocessor_subtracts_the_mean_colour_in_rgb_order():
    processor = load_image_processor(json.loads(json.dumps(PREPROCESSOR)))
    frame = np.tile(np.array([255, 0, 10], np.uint8), (1, 112, 112, 1))
    got = preprocess_frames(processor, frame)["pixel_values"][0, :, 0, 0].numpy()
    want = (np.array([255, 0, 10]) - np.array([122.782, 117.001, 104.298])) / 255
    np.testing.assert_allclose(got, want, atol=1e-6)
