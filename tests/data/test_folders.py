"""What adapters of released folders share: tables, clips by name, labels and words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.adapter import Excluded
from mmemo.data.folders import (
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    read_table,
    read_text,
    read_words,
    talking,
    words_of,
)
from mmemo.errors import DataError, EvaluationError


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_table_is_read_by_its_columns(tmp_path: Path) -> None:
    table = put(
        tmp_path / "a.csv",
        b'\xef\xbb\xbfNAME, label ,text\r\n a ,1,"one, two"\r\nb,2\r\n\r\n,,\r\nc,3,x,extra\r\n',
    )
    assert read_table(table, ("name", "label")) == [
        {"name": "a", "label": "1", "text": "one, two"},
        {"name": "b", "label": "2", "text": ""},
        {"name": "c", "label": "3", "text": "x"},
    ]
    with pytest.raises(DataError, match=r"a\.csv: has no column 'discrete' \(it has NAME, label"):
        read_table(table, ("name", "discrete"))
    with pytest.raises(DataError, match="has no column 'name' \\(it has none\\)"):
        read_table(put(tmp_path / "empty.csv", b""), ("name",))
    with pytest.raises(DataError, match="is missing"):
        read_table(tmp_path / "none.csv", ("name",))
    assert read_table(tmp_path / "none.csv", ("name",), optional=True) == []


def test_the_encoding_of_a_table_is_told_from_its_bytes(tmp_path: Path) -> None:
    chinese = "我很高兴，谢谢。Nice."
    for encoding in ("utf-8", "utf-8-sig", "gb18030"):
        assert read_text(put(tmp_path / "a.txt", chinese.encode(encoding))) == chinese
    english = "It\u2019s fine \u2014 caf\u00e9"
    assert read_text(put(tmp_path / "a.txt", english.encode("cp1252"))) == english
    # C1 control characters in UTF-8 are quotes that were decoded as Latin-1 once.
    table = put(tmp_path / "a.csv", "text\nIt\u0092s\n".encode())
    assert read_table(table, ("text",)) == [{"text": "It\u2019s"}]
    with pytest.raises(DataError, match="no encoding that is known"):
        read_text(put(tmp_path / "a.txt", b"\x81 \x8d"))


def test_clips_are_found_by_name_in_the_first_folder(tmp_path: Path) -> None:
    for name in (
        "b/x.avi",
        "b/x.mp4",
        "b/deep/Y.MP4",
        "c/x.mp4",
        "c/._z.mp4",
        "c/x.txt",
        "b/AB.mp4",
    ):
        put(tmp_path / name)
    put(tmp_path / "c/ab.mp4")
    clips = ClipIndex(tmp_path, ["b", "c", "missing"])
    assert clips.find("x", "?") == "b/x.mp4"
    assert clips.find("y", "?") == "b/deep/Y.MP4"
    assert (clips.find("AB", "?"), clips.find("ab", "?")) == ("b/AB.mp4", "c/ab.mp4")
    assert clips.find("z", "c/z.mp4") == "c/z.mp4"
    assert len(ClipIndex(tmp_path, ["."])) == len(clips) == 4


def test_a_label_is_read_as_the_file_writes_it() -> None:
    read = LabelReader("dfew", "mer2023")
    assert read("1", "row") == "happy"
    assert read("Happiness", "row") == "happy"
    assert read("7", "row") == Excluded("row", "no such label in mer2023", "fear", expected=True)
    assert read("8", "row") == Excluded("row", "label outside the set", "8")
    assert read("", "row") == Excluded("row", "label outside the set", "(empty)")
    with pytest.raises(EvaluationError, match="no label set 'mer2o23'"):
        LabelReader("dfew", "mer2o23")


def test_a_row_asks_about_the_media_that_it_has() -> None:
    row = labelled_row(
        "a",
        "Which?",
        "sad",
        {"audio": "a.wav"},
        transcript=" Hm. ",
        group={"speaker": "1", "x": ""},
    )
    assert row == {
        "sample_id": "a",
        "prompt": "<audio>Which?",
        "completion": "<answer>sad</answer>",
        "audio": "a.wav",
        "label": "sad",
        "group": {"speaker": "1"},
        "transcript": "Hm.",
    }
    assert labelled_row("a", "?", "sad", talking("a.mp4"))["prompt"] == "<video><audio><face>?"
    assert "transcript" not in labelled_row("a", "?", "sad", {}, transcript=" ")


def test_the_second_row_of_an_id_is_left_out() -> None:
    def rows() -> Iterator[dict[str, Any] | Excluded]:
        yield from ({"sample_id": "a"}, Excluded("b", "bad"), {"sample_id": "a"})

    assert list(once(rows()))[1:] == [Excluded("b", "bad"), Excluded("a", "listed twice")]


def test_words_come_from_the_first_table_that_is_there(tmp_path: Path) -> None:
    put(tmp_path / "b.csv", "Name,English,Chinese\na,Hi,你好\nb,Bye,\nc,,\nd,nan,nan\n".encode())
    assert read_words(tmp_path, ("a.csv", "b.csv")) == {"a": "你好", "b": "Bye"}
    assert read_words(tmp_path, ("c.csv",)) == {}


def test_words_hold_no_place_of_a_clip() -> None:
    assert words_of(" He says\n<video> <face>\tno. ") == "He says no."


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(data)
    try:
        rows = read_table(path, ("name",))
    except DataError:
        return
    assert all("name" in row for row in rows)
