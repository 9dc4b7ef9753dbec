"""The predictions file: whole batches, in order, reused only where every key is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import PredictionsFile, Row, key_of, read_predictions

SIZE = 3


def rows_of(keys: list[str]) -> list[Row]:
    return [{"key": key, "raw": f"答 {key}"} for key in keys]


def finish(path: Path, keys: list[str]) -> int:
    """Write what is missing; how many rows had to be made."""
    file = PredictionsFile(path, keys, SIZE)
    made = 0
    for start in range(len(file.kept), len(keys), SIZE):
        batch = keys[start : start + SIZE]
        file.append(rows_of(batch))
        made += len(batch)
    assert file.kept == rows_of(keys)
    return made


KEYS = [key_of(["question", index]) for index in range(11)]


@given(cut=st.integers(0, 10_000), junk=st.binary(max_size=40))
@settings(max_examples=150)
def test_cut_anywhere_it_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole, torn = folder / "whole.jsonl", folder / "torn.jsonl"
    assert finish(whole, KEYS) == len(KEYS)
    data = whole.read_bytes()
    torn.write_bytes(data[: cut % (len(data) + 1)] + junk)
    made = finish(torn, KEYS)
    assert torn.read_bytes() == data
    batches_left = data[: cut % (len(data) + 1)].count(b"\n") // SIZE
    assert made <= len(KEYS) - batches_left * SIZE
    assert finish(torn, KEYS) == 0


def test_a_line_that_lost_only_its_end_is_made_again(tmp_path: Path) -> None:
    """Kept as it is, it would run on into the next answer."""
    path = tmp_path / "p.jsonl"
    finish(path, KEYS)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 2 * SIZE])[:-1])
    assert finish(path, KEYS) == len(KEYS) - SIZE
    assert path.read_bytes() == data


def test_a_changed_key_drops_its_batch_and_all_after_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    finish(path, KEYS)
    before = path.read_bytes()
    changed = [*KEYS[:4], key_of("other"), *KEYS[5:]]
    file = PredictionsFile(path, changed, SIZE)
    assert [row["key"] for row in file.kept] == KEYS[:3]
    assert file.dropped == len(KEYS) - 3
    # Only an answer takes the place of answers.
    assert path.read_bytes() == before
    file.append(rows_of(changed[3 : 3 + SIZE]))
    assert read_predictions(path) == rows_of(changed[: 3 + SIZE])


def test_fewer_or_more_questions_keep_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    finish(path, KEYS[:5])
    assert len(PredictionsFile(path, KEYS, SIZE).kept) == 3  # the second batch was of two
    finish(path, KEYS)
    assert len(PredictionsFile(path, KEYS[:6], SIZE).kept) == 6
    assert read_predictions(path) == rows_of(KEYS[:6])


def test_kept_rows_are_replaced_and_what_is_behind_them_stays(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    finish(path, KEYS)
    before = path.read_bytes()
    file = PredictionsFile(path, [*KEYS[:3], key_of("other")], SIZE)
    file.replace(list(file.kept))
    assert path.read_bytes() == before
    anew = [{**row, "status": "read anew"} for row in file.kept]
    file.replace(anew)
    assert read_predictions(path) == [*anew, *rows_of(KEYS)[3:]]
    file.append(rows_of([key_of("other")]))
    assert read_predictions(path) == [*anew, *rows_of([key_of("other")])]


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    file = PredictionsFile(tmp_path / "p.jsonl", KEYS, SIZE)
    with pytest.raises(EvaluationError, match="out of order"):
        file.append(rows_of(KEYS[1:4]))


def test_reading_names_the_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(EvaluationError, match="run the evaluation first"):
        read_predictions(path)
    finish(path, KEYS)
    assert read_predictions(path) == rows_of(KEYS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvaluationError, match=":11: is damaged"):
        read_predictions(path)
