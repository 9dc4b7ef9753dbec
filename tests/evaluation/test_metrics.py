"""Metrics equal scikit-learn's; what could not be read is wrong, in every one of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mmemo.evaluation import metrics

K = 4
ANSWERS = st.lists(st.tuples(st.integers(0, K - 1), st.integers(0, K + 1)), min_size=1, max_size=60)


def counts_of(pairs: list[tuple[int, int]]) -> metrics.Counts:
    counts = np.zeros((K, K + 2))
    for true, answered in pairs:
        counts[true, answered] += 1
    return counts


@given(ANSWERS)
@settings(max_examples=200)
def test_equal_to_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, answered = np.array(pairs).T
    counts = counts_of(pairs)
    present = sorted(set(true.tolist()))
    every = list(range(K))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p, r, f, support = sk.precision_recall_fscore_support(
            true, answered, labels=every, zero_division=0
        )
        assert metrics.war(counts) == pytest.approx(sk.accuracy_score(true, answered))
        assert metrics.uar(counts) == pytest.approx(
            sk.recall_score(true, answered, labels=present, average="macro")
        )
        assert metrics.macro_f1(counts) == pytest.approx(
            sk.f1_score(true, answered, labels=present, average="macro", zero_division=0)
        )
        assert metrics.weighted_f1(counts) == pytest.approx(
            sk.f1_score(true, answered, labels=every, average="weighted", zero_division=0)
        )
    assert metrics.precision(counts) == pytest.approx(p)
    assert metrics.f1(counts) == pytest.approx(f)
    assert counts.sum(-1) == pytest.approx(support)
    own = metrics.recall(counts)
    assert own[present] == pytest.approx(r[present])
    assert np.isnan(np.delete(own, present)).all()


@given(ANSWERS, st.data())
def test_unread_answers_count_as_wrong(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(pairs) - 1))
    true = pairs[index][0]
    right, unread = list(pairs), list(pairs)
    right[index] = (true, true)
    unread[index] = (true, K + data.draw(st.integers(0, 1)))
    for name, value in metrics.scalars(counts_of(unread)).items():
        assert value < metrics.scalars(counts_of(right))[name] + 1e-12
    assert metrics.war(counts_of(unread)) < metrics.war(counts_of(right))


def test_leading_axes_are_independent() -> None:
    generator = np.random.default_rng(0)
    stack = generator.integers(0, 5, size=(7, 3, K, K + 2)).astype(float)
    for name, values in metrics.scalars(stack).items():
        assert values.shape == (7, 3)
        assert values[4, 2] == pytest.approx(metrics.scalars(stack[4, 2])[name])


def test_reliance_is_signed() -> None:
    voice, face, neither = np.eye(3) * 10
    assert metrics.reliance(voice) == 1
    assert metrics.reliance(face) == -1
    assert metrics.reliance(neither) == 0
    assert metrics.reliance(voice + face) == 0
    assert np.isnan(metrics.reliance(np.zeros(3)))
