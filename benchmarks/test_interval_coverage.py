"""What docs/concepts/claims.md says of intervals and tests: a part of its tables, with the same
seeds and so the same figures, and the cost of 100,000 clips that are each their own cluster."""

from __future__ import annotations

import random
import resource
import time

import pytest
from interval_coverage import CLUSTERS, pair_cell, share_cell

from mmemo.evaluation.comparison import compare_rows
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import score_task
from mmemo.statistics import BootstrapConfig

NUMBER = 2000


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize(
    ("metric", "design"), [("war", (0.7, 0.05)), ("war", (0.9, 0.1)), ("macro_f1", (0.8, 0.1))]
)
def test_intervals_cover_95_percent(
    metric: str, design: tuple[float, float], clusters: int
) -> None:
    found = share_cell(0, metric, clusters, design, NUMBER).found
    assert 0.93 <= found["mmemo"] <= 0.97


@pytest.mark.parametrize(
    ("metric", "design", "clusters"),
    [*(("war", (0.7, 0.05), clusters) for clusters in CLUSTERS), ("macro_f1", (0.9, 0.1), 10)],
)
def test_differences_cover_and_two_equal_runs_seldom_differ(
    metric: str, design: tuple[float, float], clusters: int
) -> None:
    found = pair_cell(0, metric, clusters, design, NUMBER, NUMBER // 2).found
    assert 0.93 <= found["mmemo"] <= 0.97
    assert found["p < 0.05"] <= 0.06


def test_the_percentile_bootstrap_would_not_pass() -> None:
    found = share_cell(0, "war", 5, (0.9, 0.1), 150, bootstraps=150).found
    assert found["percentile"] < 0.9
    assert found["BCa"] < 0.9


def answered(n: int, skill: float, seed: int) -> list[Row]:
    answers, truths = random.Random(seed), random.Random(0)
    labels = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    rows: list[Row] = []
    for index in range(n):
        truth = truths.choice(labels)
        said = truth if answers.random() < skill else answers.choice(labels)
        common = {"task": "emotion", "labels": labels, "status": "ok", "modality_labels": {}}
        rows.append(
            {
                **common,
                "sample_id": f"c{index}",
                "truth": truth,
                "answer": said,
                "score": float(said == truth),
                "conflict": ("video_aligned", "audio_aligned", "consistent")[index % 3],
                "group": {},
                "media": {"video": f"clips/{index}.mp4"},
            }
        )
    return rows


def test_100_000_single_clips_take_seconds_and_little_memory() -> None:
    first, second = answered(100_000, 0.7, 1), answered(100_000, 0.6, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    block = score_task(first, BootstrapConfig())
    compared = compare_rows(first, second, BootstrapConfig())
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert block["clusters"] == compared["clusters"] == 100_000
    assert seconds < 10, f"{seconds:.1f} s"  # 2 s
    assert grown < 300, f"{grown:.0f} MiB"  # 60 MiB
