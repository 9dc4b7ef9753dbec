from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmemo.models.attention.reallocation import AmplificationConfig, SinkConfig

MEDIA = torch.tensor([0.0, 1, 1, 1, 0])[None, :, None]


def applied(made: Any, *rows: list[float]) -> Tensor:
    """``made`` on heads with one row of weights each, (S,) -> (heads, S)."""
    plain = torch.tensor(rows)[None, :, None]
    return made.apply(plain.log(), plain, MEDIA)[0, :, 0]


def test_amplified_scores_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.0, torch.finfo(torch.float32).min])
    made = AmplificationConfig(alpha=0.5)
    found = made.apply(scores.view(1, 1, 1, -1), scores.softmax(-1).view(1, 1, 1, -1), MEDIA)
    wanted = torch.tensor([1.0, 3.0, -0.5, 0.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(found.flatten(), wanted)
    hidden = MEDIA.clone()
    hidden[0, 4] = 0.0
    assert float(made.apply(scores.view(1, 1, 1, -1), scores, hidden)[..., -1]) == 0.0


def test_sinks_by_hand() -> None:
    """The mean weight is 0.2, so that a sink has over 0.4: the first token is one."""
    made = SinkConfig(sink=2.0, keep=0.6)
    found = applied(made, [0.5, 0.1, 0.1, 0.2, 0.1])
    # 0.2 goes to the media tokens by their weights.
    torch.testing.assert_close(found[0], torch.tensor([0.3, 0.15, 0.15, 0.3, 0.1]))


def test_a_sink_among_the_media_only_gives() -> None:
    made = SinkConfig(sink=2.0, keep=0.5, most_sunk=0.9)
    found = applied(made, [0.2, 0.5, 0.1, 0.1, 0.1])
    torch.testing.assert_close(found[0], torch.tensor([0.2, 0.25, 0.225, 0.225, 0.1]))


def test_heads_that_do_not_change() -> None:
    elsewhere = [0.85, 0.05, 0.02, 0.03, 0.05]  # a tenth on media
    sunk = [0.1, 0.7, 0.05, 0.05, 0.1]  # most of it on a sink
    none = [0.2, 0.2, 0.2, 0.2, 0.2]
    for row in (elsewhere, sunk, none):
        assert torch.equal(applied(SinkConfig(sink=2.0), row)[0], torch.tensor(row))


def test_a_sink_is_one_for_all_heads_together() -> None:
    """A token that one head alone looks at is no sink."""
    rows = [0.45, 0.1, 0.15, 0.2, 0.1], [0.1, 0.3, 0.2, 0.2, 0.2]
    assert torch.equal(applied(SinkConfig(sink=2.0), *rows), torch.tensor(rows))
    assert not torch.equal(applied(SinkConfig(sink=2.0), rows[0])[0], torch.tensor(rows[0]))
