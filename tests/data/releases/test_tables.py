"""Tables with the faults of real releases: never a wrong row, never a silent loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.adapter import Excluded
from mmemo.data.releases.tables import (
    find_file,
    read_json,
    read_object,
    read_table,
    read_text,
    tables,
    whole_table,
)
from mmemo.errors import DataError


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


ROWS: list[dict[str, Any]] = [{"id": "1", "question": "a, b"}, {"id": "2", "question": "ü\nd"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"data": ROWS, "version": 1})),
        ("a.json", json.dumps({"1": {"question": "a, b"}, "2": {"question": "ü\nd"}})),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.JSONL", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
        ("a.csv", 'id,question,other\r\n1,"a, b",\r\n2,"ü\nd", \r\n'),
        ("a.csv", '\ufeffid;question\n1;"a, b"\n2;"ü\nd"\n'),
        ("a.tsv", 'id\tquestion\n1\ta, b\n2\t"ü\nd"\n'),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert list(read_table(tmp_path / name)) == ROWS
    assert tables(tmp_path) == [tmp_path / name]


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "1"}\n{"id": \n[1]\n' + "[" * 100_000 + "\n")
    first, *others = read_table(file)
    assert first == {"id": "1"}
    assert [(one.row, one.reason) for one in others if isinstance(one, Excluded)] == [
        *(("a.jsonl:2", "no JSON"), ("a.jsonl:3", "no object"), ("a.jsonl:4", "no JSON"))
    ]
    (tmp_path / "b.csv").write_text("id,question\n1,a,b\n\n2,c\n")
    short, whole = read_table(tmp_path / "b.csv")
    assert isinstance(short, Excluded)
    assert (short.reason, whole) == ("wrong number of cells", {"id": "2", "question": "c"})


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.json", b'[{"id": 1}, {', "is not JSON"),
        ("a.json", b"3", "holds no list"),
        ("a.json", b"\x81 \x8d", "no encoding that is known"),
        ("a.parquet", b"PAR1", r"must end in \.csv"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=error):
        list(read_table(tmp_path / name))
    with pytest.raises(DataError, match="has no table"):
        tables(tmp_path, "*/*.json")


def test_columns_are_found_in_any_case(tmp_path: Path) -> None:
    table = put(
        tmp_path / "a.csv",
        b'\xef\xbb\xbfNAME, label ,text\r\n a ,1,"one, two"\r\nb,2\r\n\r\n,,\r\n'
        b"c,3,x,extra\r\nd,,x,,\r\ne\r\n",
    )
    assert list(read_table(table, ("name", "label"))) == [
        {"name": "a", "label": "1", "text": "one, two"},
        {"name": "b", "label": "2"},
        Excluded("a.csv:6", "wrong number of cells", "4 cells under 3 columns"),
        {"name": "d", "label": "", "text": "x"},
        Excluded("a.csv:8", "wrong number of cells", "1 cells under 3 columns"),
    ]
    with pytest.raises(DataError, match=r"a\.csv: has no column 'discrete' \(it has NAME, label"):
        read_table(table, ("name", "discrete"))
    with pytest.raises(DataError, match="has no column 'name' \\(it has none\\)"):
        read_table(put(tmp_path / "empty.csv", b""), ("name",))
    with pytest.raises(DataError, match="is missing"):
        read_table(tmp_path / "none.csv", ("name",))


def test_a_table_without_quotes_or_header(tmp_path: Path) -> None:
    commas = put(tmp_path / "b.csv", b"one;two;three,1\n")
    (only,) = read_table(commas, ("x",), columns=("x", "y"))
    assert only == {"x": "one;two;three", "y": "1"}
    path = put(tmp_path / "b.tsv", b'"a\tb\nc"\td\n')
    assert list(read_table(path, ("x",), quoted=False, columns=("x", "y"))) == [
        {"x": '"a', "y": "b"},
        {"x": 'c"', "y": "d"},
    ]


def test_a_joined_table_is_whole_or_refused(tmp_path: Path) -> None:
    table = put(tmp_path / "a.csv", b"id,label\n1,happy\n2,sad\n")
    assert whole_table(table, ("ID",)) == [
        {"ID": "1", "label": "happy"},
        {"ID": "2", "label": "sad"},
    ]
    put(table, b"id,label\n1,so, so\n2,sad\n")
    with pytest.raises(DataError, match=r"a\.csv: line 2: wrong number of cells \(3 cells under 2"):
        whole_table(table)
    assert whole_table(tmp_path / "none.csv", optional=True) == []
    with pytest.raises(DataError, match="is missing"):
        whole_table(tmp_path / "none.csv")


def test_the_encoding_of_a_file_is_told_from_its_bytes(tmp_path: Path) -> None:
    chinese = "我很高兴，谢谢。Nice."
    for encoding in ("utf-8", "utf-8-sig", "gb18030"):
        assert read_text(put(tmp_path / "a.txt", chinese.encode(encoding))) == chinese
        # Every kind of table, not only CSV.
        for name, text in (("a.json", f'[{{"text": "{chinese}"}}]'), ("a.csv", f"text\n{chinese}")):
            rows = list(read_table(put(tmp_path / name, text.encode(encoding))))
            assert rows == [{"text": chinese}]
    english = "It\u2019s fine \u2014 caf\u00e9"
    assert read_text(put(tmp_path / "a.txt", english.encode("cp1252"))) == english
    # C1 control characters in UTF-8 are quotes that were decoded as Latin-1 once.
    table = put(tmp_path / "a.csv", "text\nIt\u0092s\n".encode())
    assert list(read_table(table, ("text",))) == [{"text": "It\u2019s"}]
    assert read_text(put(tmp_path / "a.txt", english.encode("utf-16"))) == english
    # One damaged byte is no reason to read all other letters as something else.
    for text in (english * 3, chinese * 3):
        with pytest.raises(DataError, match="is damaged UTF-8"):
            read_text(put(tmp_path / "a.txt", text.encode() + b"\xff."))
    with pytest.raises(DataError, match="no encoding that is known"):
        read_text(put(tmp_path / "a.txt", b"\x81 \x8d"))


def test_json(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", b"[1")
    with pytest.raises(DataError, match="is not JSON"):
        read_json(path)
    assert read_object(put(path, b'\xef\xbb\xbf{"a": [1]}')) == {"a": [1]}
    with pytest.raises(DataError, match="must be a JSON object"):
        read_object(put(path, b"[1]"))
    lines = put(tmp_path / "a.jsonl", '{"a": "x\u2028y"}\n\n[1]\n'.encode())
    assert list(read_table(lines)) == [{"a": "x\u2028y"}, Excluded("a.jsonl:3", "no object")]
    # One line is one row; a whole file may hold its rows in a list.
    one = b'{"turns": [{"a": 1}]}'
    assert list(read_table(put(lines, one))) == [{"turns": [{"a": 1}]}]
    assert list(read_table(put(path, one))) == [{"a": 1}]


def test_files_are_found_by_name_in_any_folder(tmp_path: Path) -> None:
    for name in ("x/y/a.csv", "x/b.csv", "x/._b.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_file(tmp_path, "a.csv").name == "a.csv"
    assert find_file(tmp_path, "*.tsv", "*.csv") == tmp_path / "x/b.csv"
    (tmp_path / "x/c.csv").touch()
    with pytest.raises(DataError, match=r"has several files \*\.csv \(b\.csv, c\.csv\)"):
        find_file(tmp_path, "*.csv")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]))
def test_any_bytes_are_a_table_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = put(tmp_path_factory.getbasetemp() / f"fuzzed{suffix}", data)
    try:
        rows = list(read_table(path, ("name",)))
    except DataError:
        return
    assert all(isinstance(row, dict | Excluded) for row in rows)
    if suffix in (".csv", ".tsv"):
        assert all("name" in row for row in rows if isinstance(row, dict))
