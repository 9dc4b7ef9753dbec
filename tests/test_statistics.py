"""Intervals: seeded, clustered, calibrated; paired tests against known values."""

from __future__ import annotations

import numpy as np
import pytest

from mmemo.errors import EvaluationError
from mmemo.statistics import Bootstrap, BootstrapConfig, mcnemar

CONFIG = BootstrapConfig(resamples=1000)


def share(values: np.ndarray) -> np.ndarray:
    return values[..., 0] / values[..., 1]


def with_counts(right: np.ndarray) -> np.ndarray:
    return np.stack([right.astype(float), np.ones(len(right))], axis=-1)


def test_the_same_seed_gives_the_same_interval() -> None:
    right = np.random.default_rng(1).random(60) < 0.7
    clusters = [f"s{i % 12}" for i in range(60)]

    def interval(seed: int):
        config = BootstrapConfig(resamples=500, seed=seed)
        return Bootstrap(clusters, config).resample(with_counts(right)).interval(share, 60)

    assert interval(0) == interval(0)
    assert interval(0) != interval(1)
    assert interval(0).value == pytest.approx(right.mean())


def test_replicates_equal_a_plain_loop_over_resampled_speakers() -> None:
    generator = np.random.default_rng(2)
    values = generator.random((30, 2, 3))
    clusters = [f"s{i}" for i in generator.integers(0, 7, size=30)]
    bootstrap = Bootstrap(clusters, CONFIG)
    drawn = bootstrap.resample(values)
    assert drawn.total == pytest.approx(values.sum(0))
    names = sorted(set(clusters))
    for replicate in (0, 17, 999):
        weights = bootstrap._weights[replicate]
        assert weights.sum() == len(names)
        slow = sum(
            weight * values[[c == name for c in clusters]].sum(0)
            for weight, name in zip(weights, names, strict=True)
        )
        assert drawn.draws[replicate] == pytest.approx(slow)


def test_answers_that_hang_together_widen_the_interval() -> None:
    right = np.repeat(np.random.default_rng(3).random(20) < 0.5, 10)  # 20 speakers x 10 clips

    def width(clusters: list[str]) -> float:
        found = Bootstrap(clusters, CONFIG).resample(with_counts(right)).interval(share, 200)
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    by_speaker = width([f"s{i // 10}" for i in range(200)])
    by_clip = width([f"c{i}" for i in range(200)])
    assert by_speaker > 2 * by_clip


def test_coverage_is_near_nominal() -> None:
    generator = np.random.default_rng(4)
    config = BootstrapConfig(resamples=400)
    covered = 0
    for _ in range(200):
        skill = generator.normal(0.6, 0.15, size=30).clip(0, 1)  # speakers differ
        right = (generator.random((30, 10)) < skill[:, None]).ravel()
        clusters = [f"s{i // 10}" for i in range(300)]
        found = Bootstrap(clusters, config).resample(with_counts(right)).interval(share, 300)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_speaker_gives_no_interval() -> None:
    found = Bootstrap(["s"] * 9, CONFIG).resample(with_counts(np.ones(9))).interval(share, 9)
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_p_is_small_for_a_difference_and_not_for_none() -> None:
    generator = np.random.default_rng(5)
    clusters = [f"s{i // 5}" for i in range(200)]
    bootstrap = Bootstrap(clusters, CONFIG)
    better = generator.normal(0.3, 1, size=(200, 1))
    equal = generator.normal(0.0, 1, size=(200, 1))
    equal -= equal.mean()
    assert bootstrap.resample(better).p_two_sided(lambda v: v[..., 0]) < 0.01
    assert bootstrap.resample(equal).p_two_sided(lambda v: v[..., 0]) > 0.5


def test_mcnemar_exact_values() -> None:
    # 8 against 1 discordant: 2 * (C(9,0) + C(9,1)) / 2^9
    a = [True] * 8 + [False] + [True] * 5
    b = [False] * 8 + [True] + [True] * 5
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.p == pytest.approx(20 / 512)
    assert mcnemar([True, False], [True, False]).p == 1.0
    with pytest.raises(EvaluationError):
        mcnemar([True], [])
