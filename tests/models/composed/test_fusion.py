from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models.composed.configuration import FusionConfig
from mmemo.models.composed.fusion import (
    AttentionFusion,
    LayerMix,
    QFormerFusion,
    build_fusion,
    masked_mean,
    part_weights,
)


def settings(**values: object) -> FusionConfig:
    return parse(FusionConfig, values)


def by_hand(score: str) -> AttentionFusion:
    """Widths 1 and 2, so W = 2; every weight written out."""
    fusion = AttentionFusion(settings(score=score, norm=False), (1, 0), (2, 0), 2)
    weights = {
        "visual_proj.weight": [[1.0], [2.0]],
        "visual_proj.bias": [0.0, 1.0],
        "audio_proj.weight": [[1.0, 0.0], [0.0, 1.0]],
        "audio_proj.bias": [0.0, 0.0],
        "attention.0.weight": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
        "attention.0.bias": [0.0, 0.0],
        "attention.1.weight": [[2.0, 0.0], [0.0, -1.0]],
        "attention.1.bias": [0.5, 0.0],
        "proj.weight": [[1.0, 0.0], [0.0, 1.0]],
        "proj.bias": [0.0, 0.0],
    }
    fusion.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return fusion


def test_attention_by_hand_as_released() -> None:
    # v = mean(1, 3) = 2 -> (2, 5); a = (4, 6). Scores: 2 * 2 + .5 = 4.5 and -6.
    fused = by_hand("linear")(
        torch.tensor([[[1.0], [3.0], [99.0]]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([[[4.0, 6.0]]]),
        torch.tensor([[True]]),
    )
    assert fused.tolist() == [[[4.5 * 2 - 6 * 4, 4.5 * 5 - 6 * 6]]]


def test_attention_by_hand_with_softmax() -> None:
    fusion = by_hand("softmax")
    v, a = torch.tensor([[2.0, 5.0]]), torch.tensor([[4.0, 6.0]])
    expected = torch.softmax(torch.tensor([[4.5, -6.0]]), -1)
    assert torch.equal(fusion.weights(v, a), expected)
    assert fusion.weights(v, a).sum().item() == pytest.approx(1)


def test_masked_mean() -> None:
    x = torch.tensor([[[1.0], [3.0], [50.0]], [[7.0], [8.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(x, mask).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_are_adaptive_average_pooling_of_the_valid_steps(steps: int, parts: int) -> None:
    x = torch.randn(1, 20, 4)
    mask = (torch.arange(20) < steps).unsqueeze(0)
    pooled = torch.einsum("npt,ntd->npd", part_weights(mask, parts), x)
    expected = F.adaptive_avg_pool1d(x[:, :steps].transpose(1, 2), parts).transpose(1, 2)
    torch.testing.assert_close(pooled, expected)


def test_parts_of_nothing_are_zero() -> None:
    assert part_weights(torch.zeros(2, 3, dtype=torch.bool), 4).abs().sum() == 0


def test_layer_mix_is_a_softmax() -> None:
    mix = LayerMix(3)
    mix.scores.data = torch.tensor([0.0, 1.0, 2.0])
    x = torch.randn(2, 3, 4, 5)
    weights = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    torch.testing.assert_close(mix(x), sum(weights[i] * x[:, i] for i in range(3)))


def qformer(**values: object) -> QFormerFusion:
    torch.manual_seed(0)
    built = build_fusion(
        settings(kind="qformer", queries=3, hidden_size=16, heads=4, positions=12, **values),
        (6, 0),
        (8, 2),
        10,
    )
    assert isinstance(built, QFormerFusion)
    torch.nn.init.normal_(built.positions)
    torch.nn.init.normal_(built.queries)
    return built


def test_qformer_does_not_depend_on_the_padding_of_others() -> None:
    fusion = qformer()
    visual, audio = torch.randn(1, 4, 6), torch.randn(1, 2, 5, 8)
    yes = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    alone = fusion(visual, yes[0], audio, yes[1])
    assert alone.shape == (1, 3, 10)
    padded = fusion(
        F.pad(visual, (0, 0, 0, 7), value=5.0),
        F.pad(yes[0], (0, 7)),
        F.pad(audio, (0, 0, 0, 9), value=5.0),
        F.pad(yes[1], (0, 9)),
    )
    torch.testing.assert_close(padded, alone)


def test_qformer_averages_streams_longer_than_its_positions() -> None:
    fusion = qformer()
    x, mask = fusion._fit(torch.randn(2, 9, 8), torch.arange(9) < torch.tensor([[9], [4]]))
    assert x.shape == (2, 6, 8)
    assert mask.sum(1).tolist() == [6, 4]
    short = torch.randn(1, 12, 8)
    pooled, _ = fusion._fit(short, torch.ones(1, 12, dtype=torch.bool))
    torch.testing.assert_close(pooled, short.unflatten(1, (6, 2)).mean(2))


def test_qformer_hears_and_sees() -> None:
    fusion = qformer()
    visual, audio = torch.randn(1, 4, 6, requires_grad=True), torch.randn(1, 2, 5, 8)
    audio.requires_grad_(True)
    masks = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    fusion(visual, masks[0], audio, masks[1]).square().sum().backward()
    assert visual.grad is not None
    assert audio.grad is not None
    assert (visual.grad.abs().sum(-1) > 0).all()
    assert (audio.grad.abs().sum((0, 1, 3)) > 0).all()
    assert all(p.grad is not None for p in fusion.parameters())


@pytest.mark.parametrize("kind", ["attention", "qformer"])
def test_a_clip_without_streams_is_finite(kind: str) -> None:
    fusion = build_fusion(settings(kind=kind, hidden_size=8, heads=2), (4, 0), (4, 0), 8)
    none = torch.zeros(1, 3, dtype=torch.bool)
    out = fusion(torch.randn(1, 3, 4), none, torch.randn(1, 3, 4), none)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


def test_heads_must_divide() -> None:
    with pytest.raises(ConfigError, match="multiple of heads"):
        settings(kind="qformer", hidden_size=10, heads=4)
