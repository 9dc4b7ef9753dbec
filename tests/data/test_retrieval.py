"""Passages of long texts: the right one is found, and together they hold the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.retrieval import best, passages, retrieved


def test_the_passage_with_the_rare_word_is_found() -> None:
    text = " ".join(["the man walks"] * 50 + ["Ann weeps."] + ["the man walks"] * 50)
    found = retrieved(text, "Why does Ann weep in the walks?", top=1, size=20)
    assert "Ann" in found
    assert len(found.split()) == 20
    assert best(["a b", "c d", "a c"], "c d", 2) == [1, 2]
    assert best(["a", "b"], "", 1) == [0]
    assert retrieved("我很高兴。他很悲伤。", "悲伤", top=1, size=4) == "他很悲伤。"
    assert retrieved("", "x") == ""
    with pytest.raises(ValueError, match="size must be larger"):
        passages("a", 2, 2)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.integers(1, 9), st.integers(0, 8), st.integers(1, 5))
def test_passages_hold_the_whole_text(text: str, size: int, overlap: int, top: int) -> None:
    if overlap >= size:
        return
    parts = passages(text, size, overlap)
    if overlap == 0:
        assert "".join("".join(parts).split()) == "".join(text.split())
    places = best(parts, text, top)
    assert places == sorted(set(places))
    assert len(places) == min(top, len(parts))
