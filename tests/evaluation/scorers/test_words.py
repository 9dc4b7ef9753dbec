"""The scorer of words: forms, arguments, paired comparison, and answers that nobody can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.errors import EvaluationError
from mmemo.evaluation.mer_unibench import MODES
from mmemo.evaluation.scorer import compare_with, score_with, use
from mmemo.evaluation.scorers.words import find_wheels, sentiment_sums, waf, words
from mmemo.statistics import BootstrapConfig
from tests.answers.test_emotion_wheels import write_wheels

CONFIG = BootstrapConfig(resamples=100)


def rows(truths: list[Any], raws: list[Any]) -> list[dict[str, Any]]:
    return [
        {"key": str(place), "sample_id": str(place), "truth": truth, "raw": raw, "group": {}}
        for place, (truth, raw) in enumerate(zip(truths, raws, strict=True))
    ]


@pytest.fixture(autouse=True)
def no_wheels_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMEMO_EMOTION_WHEEL", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_wheels(tmp_path_factory.mktemp("wheels") / "w"))


def test_forms_need_no_wheels() -> None:
    spec = use("words", metric="set", folder="forms")
    asked = rows(["[happy, sad]", ["neutral"], "anger"], ["joyful", "Neutral.", None])
    found = score_with([spec], asked, CONFIG)
    assert list(found) == ["corrected_fscore", "corrected_precision", "corrected_recall"]
    # P: 1, 1, 0. R: 1/2, 1, 0.
    p, r = 2 / 3, 1.5 / 3
    assert found["corrected_fscore"]["value"] == pytest.approx(2 * p * r / (p + r), abs=1e-6)
    hit = score_with([use("words", metric="hit", folder="forms")], rows(["joy"], ["glad"]), CONFIG)
    assert hit["corrected_hitrate"]["value"] == 0


def test_arguments_that_do_not_fit(folder: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="MMEMO_EMOTION_WHEEL"):
        words()
    with pytest.raises(EvaluationError, match="official mode needs the wheels"):
        words(mode="official", folder="forms")
    with pytest.raises(EvaluationError, match="neither"):
        words(folder=str(tmp_path))
    with pytest.raises(EvaluationError, match="scorer 'words'"):
        use("words", metrics="set").load()
    assert find_wheels(needed=False) is None
    assert find_wheels(folder) is not None
    # Sentiment needs no wheels.
    assert list(words(metric="sentiment", mode="official").metrics) == [
        *("official_waf", "official_accuracy"),
    ]


def test_comparison_is_paired(folder: str) -> None:
    spec = use("words", metric="hit", mode="official", folder=folder)
    truths = ["happy", "fear", "neutral", "fear"]
    ours, theirs = rows(truths, ["[happy]"] * 4), rows(truths, ["[fear]"] * 4)
    found = compare_with([spec], ours, theirs, CONFIG)["official_hitrate"]
    # "neutral" counts in neither: 1/3 against 2/3.
    assert found["value"] == pytest.approx(-1 / 3, abs=1e-6)
    assert (found["n"], found["unscored"]) == (3, 1)


def test_waf_of_sums_by_hand() -> None:
    # Truth negative 3: 2 negative, 1 neither. Truth positive 2: 1 negative, 1 positive.
    sums = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    # F1 of negative 2·2/(3 + 3), of positive 2·1/(2 + 1): both 2/3.
    assert waf(sums) == pytest.approx(2 / 3)
    assert np.isnan(waf(np.zeros((2, 3))))
    assert sentiment_sums([float("nan"), 0.0], ["positive"] * 2, "official").sum() == 0


ANSWERS = (
    st.none()
    | st.integers()
    | st.text(max_size=12)
    | st.sampled_from(
        ["[happy]", "[", "]", "['", "happy, sad", "not happy", "positive", "Negative.", "<answer>"]
    )
)
TRUTHS = (
    st.none()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.sampled_from(["happy", "fear", "neutral", ""]), max_size=3)
)


@settings(deadline=None)
@given(st.lists(st.tuples(TRUTHS, ANSWERS), min_size=1, max_size=5), st.data())
def test_no_row_breaks_the_scorer(
    folder: str, pairs: list[tuple[Any, Any]], data: st.DataObject
) -> None:
    asked = rows([truth for truth, _ in pairs], [raw for _, raw in pairs])
    metrics: tuple[Literal["set", "hit", "sentiment"], ...] = ("set", "hit", "sentiment")
    metric, mode = data.draw(st.sampled_from(metrics)), data.draw(st.sampled_from(MODES))
    scorer = words(metric=metric, mode=mode, folder=folder)
    values, scored = scorer.values(asked)
    assert len(values) == len(scored) == len(asked)
    assert np.isfinite(values).all()
    assert (values[~scored] == 0).all()
    for one in scorer.metrics.values():
        assert one.of_sums is not None
        value = float(one.of_sums(values.sum(0)))
        assert np.isnan(value) or -1e-9 <= value <= 1 + 1e-9 or metric == "hit"
