"""Tables of text data sets with the faults of real releases, and passages of long texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.adapter import Excluded
from mmemo.data.texts.files import find_file, plain, read_cells, read_json, read_objects
from mmemo.data.texts.retrieval import best, passages, retrieved
from mmemo.errors import DataError


def test_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeff Text , LABEL,\r\n"a, ""b""\nc",x,\r\n\r\nd,y\r\ne\r\nf,g,h,i\r\n'.encode()
    )
    assert list(read_cells(path, ("Text", "Label"))) == [
        {"Text": 'a, "b"\nc', "Label": "x"},
        {"Text": "d", "Label": "y"},
        Excluded("a.csv:6", "wrong number of cells", "1 cells under 3 columns"),
        Excluded("a.csv:7", "wrong number of cells", "4 cells under 3 columns"),
    ]
    path = tmp_path / "b.tsv"
    path.write_text('"a\tb\nc"\td\n', encoding="utf-8")
    assert list(read_cells(path, ("x",), quoted=False, columns=("x", "y"))) == [
        {"x": '"a', "y": "b"},
        {"x": 'c"', "y": "d"},
    ]
    with pytest.raises(DataError, match=r"has no column 'labels'; it has text, LABEL$"):
        list(read_cells(tmp_path / "a.csv", ("text", "labels")))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        list(read_cells(path, ("x",)))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_cells(tmp_path / "none.csv", ("x",)))


def test_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\n\n[1]\n{broken\n{"b": 1}', encoding="utf-8")
    found = list(read_objects(path))
    assert found[0] == {"a": "x\u2028y"}
    assert found[1] == Excluded("a.jsonl:3", "no object")
    assert isinstance(found[2], Excluded)
    assert (found[2].row, found[2].reason) == ("a.jsonl:4", "no JSON")
    assert found[3] == {"b": 1}
    path.write_text('[{"a": 1}, 2]', encoding="utf-8")
    assert list(read_objects(path)) == [{"a": 1}, Excluded("a.jsonl:2", "no object")]
    path.write_text("[1", encoding="utf-8")
    with pytest.raises(DataError, match="is no JSON"):
        read_json(path)


def test_files_are_found_by_name_in_any_folder(tmp_path: Path) -> None:
    for name in ("x/y/a.csv", "x/b.csv", "x/._b.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_file(tmp_path, "a.csv").name == "a.csv"
    assert find_file(tmp_path, "*.tsv", "*.csv") == tmp_path / "x/b.csv"
    (tmp_path / "x/c.csv").touch()
    with pytest.raises(DataError, match=r"has several files \*\.csv \(b\.csv, c\.csv\)"):
        find_file(tmp_path, "*.csv")
    assert plain("  ＡＢ  c\u0301 ") == plain("ab ć")


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
