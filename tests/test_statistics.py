"""Intervals and tests over clusters: against hand-computed values, and at their limits."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from mmemo.evaluation import metrics
from mmemo.statistics import (
    MOST_CLUSTERS,
    BootstrapConfig,
    Clusters,
    Interval,
    carries_p,
    holm,
    smallest_p,
    t_interval,
    t_test,
)

CONFIG = BootstrapConfig(resamples=1000)


def with_counts(right: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(right, dtype=float), np.ones(len(right))], axis=-1)


def share_of(right: np.ndarray, names: list[str], config: BootstrapConfig = CONFIG) -> Interval:
    sums = Clusters(names, config).sums(with_counts(right))
    return sums.interval(metrics.mean_of_sums, len(right), share=True)


def mean_of(values: np.ndarray, names: list[str]) -> Interval:
    sums = Clusters(names, CONFIG).sums(with_counts(values))
    return sums.interval(metrics.mean_of_sums, len(values))


def p_of(first: np.ndarray, second: np.ndarray, names: list[str], config: BootstrapConfig = CONFIG):
    values = np.stack([first, second, np.ones(len(first))], -1).astype(float)
    sums = Clusters(names, config).sums(values)
    return sums.p_two_sided(lambda v: v[..., 0] - v[..., 1], lambda v: v[..., [1, 0, 2]])


def test_the_mean_of_equal_clusters_has_the_t_interval_of_their_means() -> None:
    values = np.random.default_rng(1).normal(size=(6, 7))
    found = mean_of(values.ravel(), [f"s{i // 7}" for i in range(42)])
    means = values.mean(1)
    low, high = stats.t.interval(0.95, 5, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert t_interval(means.tolist()) == pytest.approx((low, high))


def test_a_share_of_independent_answers_has_clopper_and_pearsons_interval() -> None:
    right = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1])
    names = [f"clip{i}" for i in range(10)]
    exact = stats.binomtest(8, 10).proportion_ci(0.95, method="exact")
    found = share_of(right, names)
    # The jackknife's variance is p (1 - p) / (n - 1), so 9 answers count, as in the survey formula.
    assert found.low == pytest.approx(stats.beta.ppf(0.025, 7.2, 9 - 7.2 + 1))
    assert found.high == pytest.approx(stats.beta.ppf(0.975, 8.2, 9 - 7.2))
    assert found.low < exact.low
    assert found.high > exact.high


@pytest.mark.parametrize("clusters", [2, 4, 10, 37])
def test_all_right_and_all_wrong_are_as_sure_as_there_are_clusters(clusters: int) -> None:
    names = [f"s{i % clusters}" for i in range(clusters * 20)]
    for value, answers in ((1.0, np.ones(len(names))), (0.0, np.zeros(len(names)))):
        found = share_of(answers, names)
        wanted = stats.binomtest(round(clusters * value), clusters).proportion_ci(0.95)
        assert found.value == value
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_more_than_500_clusters_at_100_percent_count_each() -> None:
    found = share_of(np.ones(3000), [f"clip{i}" for i in range(3000)])
    wanted = stats.binomtest(3000, 3000).proportion_ci(0.95)
    assert found.low == pytest.approx(wanted.low)


def test_one_cluster_gives_no_interval_and_no_p() -> None:
    assert share_of(np.ones(9), ["s"] * 9) == Interval(1.0, None, None, 9)
    assert mean_of(np.arange(9.0), ["s"] * 9) == Interval(4.0, None, None, 9)
    assert p_of(np.ones(9), np.zeros(9), ["s"] * 9) is None


def test_no_answer_at_all_gives_nothing() -> None:
    sums = Clusters([], CONFIG).sums(np.zeros((0, 2)))
    assert sums.interval(metrics.mean_of_sums, 0) == Interval(None, None, None, 0)


def test_a_mean_that_never_varies_has_no_interval() -> None:
    found = mean_of(np.full(12, 0.3), [f"s{i % 4}" for i in range(12)])
    assert (found.low, found.high) == (None, None)


def test_intervals_stay_within_the_range_of_the_statistic() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        clusters = int(generator.integers(2, 12))
        names = [f"s{i}" for i in generator.integers(0, clusters, size=50)]
        found = share_of(generator.random(50) < generator.random() ** 3, names)
        assert found.value is not None
        if found.low is not None and found.high is not None:
            assert 0 <= found.low <= found.value <= found.high <= 1
    sums = Clusters(["a", "b", "c"], CONFIG).sums(np.array([[1.0, 1], [1, 1], [-0.5, 1]]))
    found = sums.interval(metrics.mean_of_sums, 3, limits=(-1, 1))
    assert (found.low, found.high) == (-1.0, 1.0)


def test_a_statistic_that_hangs_on_one_cluster_has_no_interval() -> None:
    values = np.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])  # the second mean is s2's alone
    sums = Clusters(["s0", "s1", "s2"], CONFIG).sums(values)
    assert sums.interval(lambda v: metrics.mean_of_sums(v[..., 2:]), 1).low is None
    assert sums.part(slice(0, 2)).interval(metrics.mean_of_sums, 2).low is not None


def test_clusters_without_such_answers_do_not_count() -> None:
    values = np.array([[1.0, 1], [0, 1], [1, 1], [0, 0], [0, 0]])
    with_empty = Clusters(list("abcde"), CONFIG).sums(values)
    without = Clusters(list("abc"), CONFIG).sums(values[:3])
    assert with_empty.clusters == 3
    of = (metrics.mean_of_sums, 3)
    assert with_empty.interval(*of, share=True) == without.interval(*of, share=True)


def test_answers_that_hang_together_widen_the_interval() -> None:
    right = np.repeat(np.random.default_rng(3).random(20) < 0.5, 10)  # 20 speakers x 10 clips

    def width(found: Interval) -> float:
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    by_speaker = width(share_of(right, [f"s{i // 10}" for i in range(200)]))
    by_clip = width(share_of(right, [f"c{i}" for i in range(200)]))
    assert by_speaker > 2 * by_clip


def test_the_order_of_the_answers_changes_nothing() -> None:
    generator = np.random.default_rng(4)
    right, names = generator.random(3000) < 0.6, [f"c{i // 2}" for i in range(3000)]
    order = generator.permutation(3000)
    again = share_of(right[order], [names[i] for i in order])
    found = share_of(right, names)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))


def test_merging_many_clusters_hardly_moves_an_interval() -> None:
    right = np.random.default_rng(5).random(40 * MOST_CLUSTERS) < 0.8
    found = share_of(right, [f"c{i}" for i in range(len(right))])
    wanted = stats.binomtest(int(right.sum()), len(right)).proportion_ci(0.95)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(wanted.high - wanted.low, rel=0.1)


def test_signs_are_flipped_in_every_way_where_clusters_are_few() -> None:
    # Of the 64 sums of +-1, +-2, ..., +-6, two are as far from 0 as 21, and four as far as 19.
    names = list("abcdef")
    gains = np.arange(1.0, 7.0)
    assert p_of(gains, np.zeros(6), names) == 2 / 64
    gains[0] = -1
    assert p_of(gains, np.zeros(6), names) == 4 / 64
    assert p_of(np.zeros(6), np.zeros(6), names) == 1.0


def test_single_clips_give_mcnemars_exact_p() -> None:
    # 8 against 1 discordant: 2 * (C(9,0) + C(9,1)) / 2^9
    first = np.array([1] * 8 + [0] + [1] * 5)
    second = np.array([0] * 8 + [1] + [1] * 5)
    assert p_of(first, second, [f"c{i}" for i in range(14)]) == pytest.approx(20 / 512)


def test_many_clusters_draw_the_exchanges_and_count_the_observed_one() -> None:
    names = [f"s{i}" for i in range(40)]
    first = np.ones(40)
    assert p_of(first, np.zeros(40), names) == pytest.approx(1 / 1001)
    assert p_of(first, first, names) == 1.0
    few = p_of(np.array([1] * 9 + [0] * 31), np.array([0] * 9 + [1] + [0] * 30), names)
    assert few == pytest.approx(22 / 1024)  # ten clusters differ, which is gone through


def test_few_clusters_cannot_carry_a_p() -> None:
    for clusters in range(2, 6):
        names = [f"s{i % clusters}" for i in range(40)]
        assert p_of(np.ones(40), np.zeros(40), names) is None
        assert not carries_p(clusters, CONFIG)
    assert carries_p(6, CONFIG)
    assert smallest_p(6) == 2 / 64
    loose = BootstrapConfig(confidence=0.9)
    assert p_of(np.ones(40), np.zeros(40), [f"s{i % 5}" for i in range(40)], loose) == 2 / 32


def test_a_correlation_has_an_interval_within_its_range() -> None:
    generator = np.random.default_rng(6)
    x = generator.normal(size=200)
    y = x + 0.3 * generator.normal(size=200)
    clusters = Clusters([f"s{i % 20}" for i in range(200)], CONFIG)
    found = clusters.correlation(lambda rows: float(np.corrcoef(x[rows], y[rows])[0, 1]))
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert -1 < found.low < found.value < found.high < 1
    normal = np.tanh(np.arctanh(found.value) + np.array([-1.96, 1.96]) / math.sqrt(197))
    assert (found.low, found.high) == pytest.approx(normal, abs=0.03)
    assert clusters.correlation(lambda rows: 1.0).low is None
    assert clusters.correlation(lambda rows: math.nan).value is None
    one = Clusters(["s"] * 200, CONFIG)
    assert one.correlation(lambda rows: 0.5) == Interval(0.5, None, None, 200)


def test_a_tally_is_the_sum_of_ones() -> None:
    generator = np.random.default_rng(7)
    cells = np.stack([generator.integers(0, 3, 50), generator.integers(0, 4, 50)], 1)
    values = np.zeros((50, 3, 4))
    values[np.arange(50), cells[:, 0], cells[:, 1]] = 1
    clusters = Clusters([f"s{i % 7}" for i in range(50)], CONFIG)
    assert (clusters.tally(cells, (3, 4)).sums == clusters.sums(values).sums).all()


def test_holm_and_t_against_known_values() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([]) == []
    assert t_interval([1.0]) is None
    assert t_interval([2.0, 2.0]) is None
    assert t_test([2.0, 2.0]) is None
    assert t_test([1.0, 2.0, 3.0]) == pytest.approx(stats.ttest_1samp([1, 2, 3], 0).pvalue)


def test_20_000_clusters_cost_little() -> None:
    """A fifth of what benchmarks/test_interval_coverage.py holds to seconds and bytes."""
    generator = np.random.default_rng(8)
    n = 20_000
    cells = np.stack([generator.integers(0, 7, n), generator.integers(0, 9, n)], 1)
    names = [f"clip{i}" for i in range(n)]
    tracemalloc.start()
    started = time.process_time()
    sums = Clusters(names, BootstrapConfig()).tally(cells, (7, 9))
    for name in metrics.SCALARS:
        sums.interval(getattr(metrics, name), n, share=True)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5  # 0.2 s where nothing else runs
    assert peak < 100e6
