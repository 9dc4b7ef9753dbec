"""Released scorers' readings: any answers give numbers, and their defects are where they say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from mmemo.answers.parsing import parse
from mmemo.evaluation.scorers.released import exact_match, preferences, weighted_f1

LABELS = ("happy", "sad", "fear")
SAID = st.one_of(
    st.sampled_from(LABELS),
    st.sampled_from(("Happy", " sad", "sad ", "fear.", "", "<answer>sad</answer>", "no idea")),
    st.text(max_size=12),
)


def row(truth: str, raw: str) -> dict[str, Any]:
    parsed = parse(raw, LABELS)
    return {"truth": truth, "raw": raw, "status": parsed.status, "answer": parsed.label}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), SAID), min_size=1, max_size=10))
def test_war_uar_and_waf_are_scikit_learn_s(pairs: list[tuple[str, str]]) -> None:
    rows = [row(truth, raw) for truth, raw in pairs]
    truth = [one for one, _ in pairs]
    found = exact_match()(rows)
    assert set(found) == {"war", "uar"}
    plain = ["sad" if raw == "<answer>sad</answer>" else raw.lstrip() for _, raw in pairs]
    names = sorted(set(truth))
    recalls: Any = recall_score(truth, plain, average=None, labels=names, zero_division=0)  # type: ignore
    right = sum(a == b for a, b in zip(truth, plain, strict=True))
    assert found["uar"] == pytest.approx(recalls.mean())
    assert found["war"] == pytest.approx(right / len(truth))
    waf = weighted_f1(rows)["waf"]
    read = [str(one["answer"]) for one in rows]
    assert waf == pytest.approx(f1_score(truth, read, average="weighted", zero_division=0))  # type: ignore


def test_uar_is_over_the_classes_that_occur() -> None:
    rows = [row("happy", "happy"), row("happy", "sad"), row("sad", "sad")]
    assert exact_match()(rows) == {"war": 2 / 3, "uar": 0.75}
    assert exact_match({"sad": "blue"})([row("sad", "blue")]) == {"war": 1.0, "uar": 1.0}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("a1", "a2", "same")), st.text(max_size=12)), min_size=1))
def test_any_answers_have_preference_numbers(pairs: list[tuple[str, str]]) -> None:
    found = preferences([{"truth": truth, "raw": raw} for truth, raw in pairs])
    assert all(0 <= value <= 1 for value in found.values())
    assert ("two_class_acc" in found) == any(truth != "same" for truth, _ in pairs)


def test_who_always_says_same_gets_the_share_of_the_first() -> None:
    rows = [{"truth": truth, "raw": "same"} for truth in ("a1", "a1", "a2", "same")]
    assert preferences(rows)["two_class_acc"] == 2 / 3
    found = preferences([{"truth": "a2", "raw": "Banana1 over a2"}])
    assert found["two_class_acc"] == 0  # "a1" inside a word comes first
