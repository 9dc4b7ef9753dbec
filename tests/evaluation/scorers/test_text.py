"""Metrics of generated texts against hand-computed values and against the libraries themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.errors import EvaluationError
from mmemo.evaluation.scorer import compare_with, score_with, use
from mmemo.evaluation.scorers.text import bleu, same, text, token_f1, words
from mmemo.statistics import BootstrapConfig

CONFIG = BootstrapConfig(resamples=100)
LIGHT = ("token_f1", "exact")


def row(number: int, answer: str | None, truth: Any) -> dict[str, Any]:
    status = "malformed" if answer is None else "ok"
    return {
        "sample_id": f"s{number}",
        "task": "t",
        "labels": [],
        "truth": truth,
        "answer": answer,
        "status": status,
        "raw": answer or "",
        "group": {},
        "media": {},
    }


def test_words_are_squads() -> None:
    assert words("The cat, an  APPLE: it's a-b") == ["cat", "apple", "its", "ab"]
    assert words("他很高兴。") == ["他", "很", "高", "兴"]
    assert words("खूप आनंद") == ["खूप", "आनंद"]
    # 2 of 3 words of the answer, 2 of 4 of the reference: 2 * 2 / 7.
    assert token_f1("sad old man", "A sad man walks home") == pytest.approx(4 / 7)
    assert token_f1("", "x") == 0
    assert token_f1("the", "a") == 1
    assert same("The End!", "end")


def test_light_metrics_need_no_library() -> None:
    rows = [
        row(0, "a sad man", ["happy", "the sad man!"]),
        row(1, None, "x"),
        row(2, "so", "so so"),
    ]
    found = score_with([use("text", metrics=LIGHT)], rows, CONFIG)
    assert list(found) == ["token_f1", "exact_match"]
    assert found["token_f1"]["value"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert (found["exact_match"]["value"], found["exact_match"]["n"]) == (
        pytest.approx(1 / 3),
        3,
    )
    left = score_with([use("text", metrics=LIGHT, unreadable="left_out")], rows, CONFIG)
    assert left["token_f1"]["value"] == pytest.approx(5 / 6)
    assert left["token_f1"]["unscored"] == 1


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on mat today", "He smiled, and left.", "no", ""]
    references = [
        ["the cat sat on the mat today", "a cat is on the mat"],
        ["He smiled and left the room.", "Smiling, he left."],
        ["yes it is", "no it is not"],
        ["something else", "else"],
    ]
    rows = [row(i, a, r) for i, (a, r) in enumerate(zip(answers, references, strict=True))]
    for count in (4, 1, 2):
        expected = sacrebleu.corpus_bleu(
            answers[:count], [[r[i] for r in references[:count]] for i in range(2)]
        )
        values, scored = text(metrics=["bleu"]).values(rows[:count])
        assert scored.all()
        assert float(bleu(values.sum(0))) == pytest.approx(expected.score)
    found = score_with([use("text", metrics=["bleu"])], rows, CONFIG)["bleu"]
    assert found["low"] is not None
    assert found["low"] < found["value"] < found["high"]
    # No answer that can be read is the empty answer, and never helps.
    unread = score_with([use("text", metrics=["bleu"])], [*rows[:3], row(3, None, "else")], CONFIG)
    assert unread["bleu"]["value"] == found["value"]


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    values, _ = text(metrics=["bleu"]).values([row(0, "a b c d e", "a b c d f g")])
    # 4/5, 3/4, 2/3 and 1/2 of the n-grams match; the answer is 5 words to 6.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert float(bleu(values.sum(0))) == pytest.approx(100 * expected)
    assert np.isnan(bleu(np.zeros((2, values.shape[1])))).all()


def test_rouge_is_the_best_reference_in_any_script() -> None:
    module = pytest.importorskip("rouge_score.rouge_scorer")
    pairs = ("Police killed the gunman!", "the gunman killed police, twice_over 3x")
    expected = module.RougeScorer(["rougeL"]).score(*pairs)["rougeL"].fmeasure
    values, _ = text(metrics=["rouge_l"]).values([row(0, pairs[1], ["zz", pairs[0]])])
    assert values.sum() - 1 == pytest.approx(expected)
    for answer, reference, value in (
        ("행복 슬픔", "행복 분노 슬픔", 4 / 5),
        ("他很高兴", "他高兴", 2 * 3 / 7),
        ("खूप आनंद", "खूप आनंद झाला", 4 / 5),
    ):
        values, _ = text(metrics=["rouge_l"]).values([row(0, answer, reference)])
        assert values.sum() - 1 == pytest.approx(value), answer
    stems = use("text", metrics=["rouge_l"], stems=True)
    assert score_with([stems], [row(0, "smiling", "smiled")], CONFIG)["rouge_l"]["value"] == 1


def test_meteor_matches_words_and_stems() -> None:
    pytest.importorskip("nltk")
    found = score_with([use("text", metrics=["meteor"])], [row(0, "cat sat", "cats sat")], CONFIG)
    # Two matches in one chunk: F is 1, and the penalty 0.5 (1 / 2)^3.
    assert found["meteor_stems"]["value"] == pytest.approx(1 - 0.5 / 8)


def test_whatever_is_wrong_is_said() -> None:
    with pytest.raises(EvaluationError, match="metrics must be some of bleu"):
        use("text", metrics=["blue"]).load()
    with pytest.raises(EvaluationError, match="unreadable must be"):
        use("text", unreadable="dropped", metrics=LIGHT).load()
    with pytest.raises(EvaluationError, match="s0 has no reference text"):
        score_with([use("text", metrics=LIGHT)], [row(0, "a", [" "])], CONFIG)
    pytest.importorskip("sacrebleu")
    with pytest.raises(EvaluationError, match="tokeniser 'none-such'"):
        use("text", metrics=["bleu"], tokenize="none-such").load()


def test_runs_are_compared() -> None:
    pytest.importorskip("sacrebleu")
    a = [row(i, "a sad man walks home", "a sad man walks home") for i in range(6)]
    b = [row(i, "a sad", "a sad man walks home") for i in range(6)]
    found = compare_with([use("text", metrics=["bleu", *LIGHT])], a, b, CONFIG)
    assert found["bleu"]["value"] > 50
    assert found["token_f1"]["value"] == pytest.approx(1 - 2 / 5)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=60))
def test_any_texts_have_values_in_range(answer: str, reference: str) -> None:
    if not reference.strip():
        return
    scorer = text(metrics=LIGHT)
    values, scored = scorer.values([row(0, answer, reference)])
    assert scored.all()
    assert ((values >= 0) & (values <= 1)).all()
    assert token_f1(answer, reference) == pytest.approx(token_f1(reference, answer))
    assert token_f1(reference, reference) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=60))
def test_any_texts_pass_the_libraries(answer: str, reference: str) -> None:
    for library in ("sacrebleu", "rouge_score", "nltk"):
        pytest.importorskip(library)
    if not reference.strip():
        return
    scorer = text()
    values, _ = scorer.values([row(0, answer, reference)])
    assert np.isfinite(values).all()
    for metric in scorer.metrics.values():
        assert metric.of_sums is not None
        assert 0 <= float(metric.of_sums(values.sum(0))) <= 100 + 1e-9
