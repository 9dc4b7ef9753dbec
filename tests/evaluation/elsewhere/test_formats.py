"""Files of predictions: told apart by content, read whole, or refused by name."""

from __future__ import annotations

import json
import random
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpyxl import Workbook

from mmemo.errors import ConfigError, DataError, MmemoError
from mmemo.evaluation.elsewhere.formats import FORMATS, format_of, read_predictions_file
from mmemo.evaluation.elsewhere.prediction import Columns, as_text


def read(path: Path, content: str | bytes, **given: Any) -> list[tuple[str, str]]:
    """The best id and the text of each prediction."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(one.ids[0], one.text) for one in read_predictions_file(path, **given)[1]]


def test_json_lines_in_every_form_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"sample_id": "a", "raw": "I see\u2028joy", "answer": "happy", "prediction": "sad"},
        {"id": "b", "answer": ["happy", "at ease"]},
        {"name": "c", "answer": "sad", "prediction": None},
        {"Sample_ID": 7, "Response": {"arousal": 3, "valence": 2.5}},
        {"sample_id": "d", "pred": 1e-5},
        {"sample_id": "e", "pred": True},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    expected = [
        *(("a", "I see\u2028joy"), ("b", "happy, at ease"), ("c", "")),
        *(("7", "arousal: 3, valence: 2.5"), ("d", "0.00001"), ("e", "yes")),
    ]
    assert read(file, text) == expected
    assert read(file, "\ufeff" + text) == expected
    assert read(file, text.encode("utf-16")) == expected
    assert read(file, json.dumps(rows, indent=1)) == expected
    wrapped = {"model": "x", "items": rows}
    assert read(file, json.dumps(wrapped)) == read(file, json.dumps(wrapped, indent=1)) == expected
    assert read(file, json.dumps({"a": "happy", "b": {"raw": "sad"}})) == [
        ("a", "happy"),
        ("b", "sad"),
    ]
    assert read(file, '{"sample_id": "a", "raw": NaN}') == [("a", "")]
    assert format_of(file) == "jsonl"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"sample_id": "a", "raw": "x"}\n{"sample_id": "b", "r', "line 2: is no JSON"),
        ('{"sample_id": "a", "raw": "x"}\n[1]', "line 2: is no object"),
        ('{"sample_id": "a", "raw": "x"}\n{"raw": "x"}', "line 2: has no id .*--id NAME"),
        ('{"sample_id": " ", "raw": "x"}\n', "has no id; fill in 'sample_id'"),
        ('{"sample_id": "a", "said": "x"}', "has no prediction .*sample_id, said.*--text NAME"),
        ('{"a": "happy", "a": "sad"}', "occurs twice"),
        ('{"sample_id": "a", "raw": "x", "raw": "y"}', "line 1: .*'raw' occurs twice"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no predictions"),
        ("  \n", "is empty"),
    ],
)
def test_damaged_json_is_refused_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(tmp_path / "p.jsonl", text)


def test_tables_as_programs_write_them(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    expected = [("a", "happy"), ("b", "I think,\nsad"), ("c", ""), ("d", "")]
    plain = 'sample_id,prediction\na,happy\nb,"I think,\nsad"\n\nc,\nd,nan\n'
    assert read(file, plain) == expected
    windows = plain.replace("\n", "\r\n")
    crlf = [(name, text.replace("\n", "\r\n")) for name, text in expected]
    assert read(file, "\ufeff" + windows) == crlf
    assert read(file, windows.encode("utf-16")) == crlf
    assert read(file, plain.encode("utf-16-le").join([b"\xff\xfe", b""])) == expected
    semicolons = 'sep=;\nsample_id;prediction\na;happy\nb;"I think,\nsad"\nc;\nd;NaN'
    assert read(file, semicolons) == expected
    tabs = 'sample_id\tprediction\na\thappy\nb\t"I think,\nsad"\nc\nd\t<NA>\n'
    assert read(file, tabs) == expected
    unnamed = ",sample_id,prediction\n0,a,happy\n"  # an index that pandas wrote
    assert read(file, unnamed) == [("a", "happy")]
    named = "clip name,what it said,truth\na,happy,sad\n"
    given = Columns(id="Clip name", text="what it said")
    assert read(file, named, columns=given) == [("a", "happy")]
    long = "x" * 300_000
    assert read(file, f"id,prediction\na,{long}\n") == [("a", long)]
    assert format_of(file) == "table"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("id,prediction\na,happy, I think\n", "line 2: has 3 cells for 2 columns"),
        ('id,prediction\na,"happy\nb,sad\n', "line 2: is no row of a table"),
        ("id,prediction,Prediction\na,happy,sad\n", "two columns 'prediction'"),
        ("a,happy\nb,sad\n", "line 2: has no prediction .*among a, happy"),
        ("id,prediction\n,happy\n", "line 2: has no id"),
        (b"id,prediction\na,happy\nb,m\xfcde\n", "line 3: is no UTF-8 text"),
        ("id,prediction\na,happy\n".encode("utf-16-le"), "NUL characters"),
        (b"\x80\x04\x95abc", "is a pickle"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel file"),
        (b"\x1f\x8b\x08\x00", "is compressed"),
        ("id,prediction\n", "holds no predictions"),
    ],
)
def test_damaged_tables_are_refused_by_their_line(
    tmp_path: Path, content: str | bytes, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read(tmp_path / "p.csv", content)


def workbook(path: Path, *rows: list[Any]) -> Path:
    book = Workbook()
    for row in rows:
        book.active.append(row)  # type: ignore[union-attr]
    book.save(path)
    return path


def test_results_of_vlmevalkit(tmp_path: Path) -> None:
    header = ["index", "video", "question", "A", "B", "answer", "prediction"]
    rows: list[list[Any]] = [
        [0, "c/x.mp4", "Who?", "one", "two", "A", "A. one\nsurely"],
        [1, "c/y.mp4", "Who?", "one", "two", "B", None],
        [2, "c/z.mp4", "Who?", "one", "two", "B", "#N/A"],
    ]
    file = workbook(tmp_path / "m.xlsx", header, *rows)
    name, found = read_predictions_file(file)
    assert name == "vlmevalkit"
    assert [one.ids for one in found] == [("c/x.mp4",), ("c/y.mp4",), ("c/z.mp4",)]
    assert [one.text for one in found] == ["A. one\nsurely", "", ""]
    assert [one.truth for one in found] == ["A", "B", "B"]
    assert [one.where for one in found] == ["row 2", "row 3", "row 4"]
    alone = workbook(tmp_path / "n.xlsx", ["index", "question", "answer", "prediction"],
                     [4.0, "?", "A", 3])  # fmt: skip
    (one,) = read_predictions_file(alone)[1]
    assert (one.ids, one.text) == (("4",), "3")
    tsv = tmp_path / "m.tsv"
    tsv.write_text('index\tquestion\tanswer\tprediction\n7\t"a\nb"\tA\tB\n')
    name, (one,) = read_predictions_file(tsv)
    assert (name, one.ids, one.text, one.truth) == ("vlmevalkit", ("7",), "B", "A")


@pytest.mark.parametrize(
    ("cell", "told"),
    [("=A1", "cell B2 is a formula"), (date(2026, 1, 2), "cell B2 is a date")],
)
def test_cells_that_are_no_text_are_refused(tmp_path: Path, cell: Any, told: str) -> None:
    file = workbook(tmp_path / "m.xlsx", ["id", "prediction"], ["a", cell])
    with pytest.raises(DataError, match=told):
        read_predictions_file(file)


def test_hostile_workbooks_are_refused(tmp_path: Path) -> None:
    file = workbook(tmp_path / "m.xlsx", ["id", "prediction"], ["a", "x"])
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/big", b"0" * (65 << 20))
    with pytest.raises(DataError, match="unpacks to over"):
        read_predictions_file(file)
    file = workbook(tmp_path / "n.xlsx", ["id", "prediction"], ["a", "x"])
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("xl/more.xml", '<!DOCTYPE x [<!ENTITY a "b">]><x/>')
    with pytest.raises(DataError, match="declares entities"):
        read_predictions_file(file)
    file.write_bytes(b"PK\x03\x04broken")
    with pytest.raises(DataError, match="damaged archive"):
        read_predictions_file(file)


def test_sample_logs_of_lmms_eval(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"doc_id": 0, "doc": {"video": "c/x.mp4", "answer": "C"}, "target": "B",
         "resps": [["I say B"]], "filtered_resps": ["B"]},
        {"doc_id": 1, "doc": {"sample_id": "s2", "video": {"path": "c/y.mp4"}}, "target": 3,
         "filtered_resps": ["4"]},
        {"doc_id": 2, "doc": {"question": "?"}, "target": "", "resps": [[{"text": "yes"}]]},
    ]  # fmt: skip
    file = tmp_path / "20260101_samples_x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name, found = read_predictions_file(file)
    assert name == "lmms-eval"
    assert [one.ids for one in found] == [("c/x.mp4",), ("s2", "c/y.mp4"), ()]
    assert [one.text for one in found] == ["I say B", "4", "yes"]
    assert [one.truth for one in found] == ["B", "3", None]
    file.write_text('{"doc_id": 0, "filtered_resps": [{"logprob": 1}]}')
    with pytest.raises(DataError, match="line 1: has neither 'resps'"):
        read_predictions_file(file)


def test_affectgpts_archives(tmp_path: Path) -> None:
    pytest.importorskip(
        "mmemo.data.releases.npz", reason="the reader of npz objects is not there yet"
    )
    file = tmp_path / "p.npz"
    np.savez_compressed(file, name2reason=np.array({"a": "She is [glad].", "b": ""}, dtype=object))
    assert format_of(file) == "affectgpt"
    assert [(one.ids[0], one.text) for one in read_predictions_file(file)[1]] == [
        ("a", "She is [glad]."),
        ("b", ""),
    ]
    names = np.array(["a", "b"], dtype=object)
    np.savez_compressed(file, filenames=names, fileitems=np.array(["[x, y]", "[z]"], dtype=object))
    assert [one.text for one in read_predictions_file(file)[1]] == ["[x, y]", "[z]"]
    np.savez_compressed(file, other=names)
    with pytest.raises(DataError, match="has neither 'name2reason'"):
        read_predictions_file(file)


def test_a_format_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("id,prediction\na,b\n")
    assert read_predictions_file(file, "table")[0] == "table"
    with pytest.raises(DataError, match="line 1: is no JSON"):
        read_predictions_file(file, "jsonl")
    with pytest.raises(ConfigError, match="did you mean 'lmms-eval'"):
        read_predictions_file(file, "lmms_eval")
    with pytest.raises(DataError, match="is no file"):
        read_predictions_file(tmp_path)


def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    chance = random.Random(0)
    book = workbook(tmp_path / "w.xlsx", ["id", "prediction"], ["a", "b"])
    seeds = [b'{"sample_id": "a", "raw": "x"}\n', b'id,prediction\r\na,"b\nc"\r\n',
             b'[{"id": 1, "pred": [1, null]}]', "id\tprediction\n1\tü\n".encode("utf-16"),
             book.read_bytes()]  # fmt: skip
    file = tmp_path / "f"
    for _ in range(300):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(data))
            data[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            data = data or bytearray(b"x")
        file.write_bytes(data)
        for name in (None, *FORMATS):
            try:
                found = read_predictions_file(file, name)[1]
            except MmemoError as error:
                told = str(error)
            else:
                told = f"{file} is read"
                assert all(isinstance(one.text, str) for one in found)
            assert told.startswith(str(file))


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (-0.25, "-0.25"), (1e-7, "0.0000001"), (float("inf"), "inf"), (False, "no"),
     ((1, None), "1, "), (12345678.5, "12345678.5"), (1e22, "1" + "0" * 22), (0.0, "0")],
)  # fmt: skip
def test_values_become_texts(value: Any, text: str) -> None:
    assert as_text(value) == text
