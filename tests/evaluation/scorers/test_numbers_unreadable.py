"""Every metric of numbers counts an answer without a number alike, rank correlations too."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.evaluation.scorer import score_with, use
from mmemo.statistics import BootstrapConfig

GIVEN = [(1, 1), (2, 2), (3, None), (4, 4)]
ROWS: list[dict[str, Any]] = [
    {"sample_id": str(place), "truth": truth, "answer": answer, "status": "ok", "group": {}}
    for place, (truth, answer) in enumerate(GIVEN)
]


@pytest.mark.parametrize(
    ("params", "spearman", "mae", "n"),
    [
        ({}, 1.0, 0.0, 3),
        # The third answer counts as 1, so the answers 1, 2, 1, 4 have the ranks 1.5, 3, 1.5, 4.
        ({"unreadable": "farthest", "low": 1, "high": 4}, 0.6324555, 0.5, 4),
    ],
)
def test_unreadable_answers(params: dict[str, Any], spearman: float, mae: float, n: int) -> None:
    found = score_with([use("numbers", **params)], ROWS, BootstrapConfig())
    assert found["spearman"]["value"] == pytest.approx(spearman, abs=1e-6)
    assert found["mae"]["value"] == pytest.approx(mae)
    assert found["spearman"]["n"] == n
