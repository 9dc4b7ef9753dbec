from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmemo.config import parse
from mmemo.errors import DataError
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.connectors import Connector, collate_features


def connector(**values: object) -> Connector:
    torch.manual_seed(0)
    return Connector(parse(SavedBranchConfig, {"feature_size": 6, **values}), 10)


def test_mean_of_one_token_is_the_mean_of_valid_steps() -> None:
    built = connector(norm=False, connector="linear")
    x, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [3]])
    expected = torch.stack([built.proj(x[0].mean(0)), built.proj(x[1, :3].mean(0))])
    torch.testing.assert_close(built(x, mask)[:, 0], expected)


@pytest.mark.parametrize("score", ["softmax", "linear"])
def test_attention_formula(score: str) -> None:
    built = connector(norm=False, connector="linear", pooling="attention", score=score)
    assert built.scores is not None
    x = torch.randn(1, 4, 6)
    scores = built.scores(x)[0, :, 0]
    weights = torch.softmax(scores, 0) if score == "softmax" else scores
    expected = built.proj((weights.unsqueeze(1) * x[0]).sum(0))
    torch.testing.assert_close(built(x, torch.ones(1, 4, dtype=torch.bool))[0, 0], expected)


@pytest.mark.parametrize(
    "values",
    [
        {"tokens": 3},
        {"tokens": 2, "pooling": "attention"},
        {"tokens": 1, "pooling": "attention", "score": "linear"},
        {"tokens": 2, "layer": "mix", "feature_layers": 3},
    ],
)
def test_padding_changes_nothing_and_gradients_stay_finite(values: dict[str, object]) -> None:
    built = connector(**values)
    layers = (3,) if "feature_layers" in values else ()
    x, mask = torch.randn(1, *layers, 4, 6), torch.ones(1, 4, dtype=torch.bool)
    alone = built(x, mask)
    padded = built(F.pad(x, (0, 0, 0, 5), value=1e3), F.pad(mask, (0, 5)))
    assert alone.shape == (1, values["tokens"], 10)
    torch.testing.assert_close(padded, alone)
    nothing = built(x, torch.zeros_like(mask))
    nothing.sum().backward()
    assert torch.isfinite(nothing).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in built.parameters())


def test_half_precision_features_are_taken() -> None:
    built = connector()
    x, mask = torch.randn(1, 4, 6).bfloat16(), torch.ones(1, 4, dtype=torch.bool)
    assert built(x, mask).dtype == torch.float32


def test_collate_pads_and_masks() -> None:
    one, two = torch.randn(2, 3), torch.randn(4, 3)
    batch = collate_features(
        [{"audio": {"x": one}, "video": {"x": two}}, {"audio": {"x": two}}, {}]
    )
    assert batch["audio_features"].shape == (3, 4, 3)
    assert batch["audio_features_mask"].sum(1).tolist() == [2, 4, 0]
    assert torch.equal(batch["audio_features"][0, :2], one)
    assert batch["audio_features"][0, 2:].abs().sum() == 0
    assert batch["video_features_mask"].sum(1).tolist() == [4, 0, 0]
    assert "face_features" not in batch


def test_collate_refuses_mixed_encoders() -> None:
    with pytest.raises(DataError, match="different encoders"):
        collate_features([{"audio": {"x": torch.ones(2, 3)}}, {"audio": {"x": torch.ones(2, 4)}}])
