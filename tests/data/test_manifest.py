"""Manifest files: formats, filters, ids, and errors reported together."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.manifest import DataConfig, load_samples, read_rows
from mmemo.data.sample import Sample
from mmemo.errors import DataError
from tests.data.rows import row, write


def load(path: Path, **config: Any) -> list[Sample]:
    return load_samples(DataConfig(manifests=[str(path)], **config))


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [row(sample_id=f"s{index}", **changes) for index in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_every_row_knows_its_line(tmp_path: Path, kind: str) -> None:
    given = rows(3, transcript="two\nlines, one comma")
    path = write(tmp_path / f"rows.{kind}", given)
    text = path.read_text()
    for sample, values in zip(load(path), given, strict=True):
        assert sample.source[0] == str(path)
        assert f"{values['sample_id']}" in "\n".join(text.split("\n")[sample.source[1] - 1 :])
        first = text.split("\n")[sample.source[1] - 1]
        assert first.strip().startswith(("{", '"', "["))


def test_lines_of_a_csv_are_where_rows_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,label,group.speaker\n"a\nb",sad,s1\nc,happy,s2\n', "utf-8")
    first, second = load(path)
    assert (first.source[1], second.source[1]) == (2, 4)
    assert first.turns[0].text == "a\nb"
    assert second.group == {"speaker": "s2"}


def test_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    bad = [*rows(2, lable="x"), row(sample_id="ok"), row(sample_id="z", conflict="x", aus=3)]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "rows.jsonl", bad))
    message = str(caught.value)
    assert [f"rows.jsonl:{line}: " in message for line in (1, 2, 3, 4)] == [True, True, False, True]
    assert "'conflict'" in message
    assert "'aus'" in message
    assert (caught.value.line, caught.value.field) == (1, "lable")


def test_at_most_so_many_problems_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(50, lable="x"))
    with pytest.raises(DataError) as caught:
        load(path, max_errors=4)
    assert str(caught.value).count("'lable'") == 4


def test_a_sample_id_stands_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(), row()])
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: field 'sample_id': 'one' is the id of .*:1"
    ):
        load(path)
    single = write(tmp_path / "one.jsonl", [row()])
    with pytest.raises(DataError, match="sample_id"):
        load_samples(DataConfig(manifests=[str(single), str(single)]))


def test_missing_ids_follow_the_content_and_not_the_line(tmp_path: Path) -> None:
    plain = [row(sample_id=None, label=label) for label in ("sad", "happy", "sad")]
    ids = [s.sample_id for s in load(write(tmp_path / "rows.jsonl", plain))]
    assert len(set(ids)) == 3
    moved = [row(sample_id="new"), *reversed(plain)]
    again = [s.sample_id for s in load(write(tmp_path / "rows.jsonl", moved))]
    assert again[2] == ids[1]
    assert sorted(again[1:]) == sorted(ids)


def test_filters(tmp_path: Path) -> None:
    given = [
        row(sample_id=f"{tier}{speaker}", tier=tier, group={"speaker": speaker})
        for tier in ("attribute", "emotion")
        for speaker in ("s1", "s2", "s3")
    ]
    path = write(tmp_path / "rows.jsonl", given)

    def ids(**config: Any) -> list[str]:
        return [sample.sample_id for sample in load(path, **config)]

    assert ids(tiers=["emotion"]) == ["emotions1", "emotions2", "emotions3"]
    assert ids(groups={"speaker": ["s2", "s3"]}, tiers=["attribute"]) == [
        "attributes2",
        "attributes3",
    ]
    assert ids(limit=2) == ["attributes1", "attributes2"]
    with pytest.raises(DataError, match="did you mean 'emotion'"):
        ids(tiers=["emotoin"])
    with pytest.raises(DataError, match="did you mean 'speaker'"):
        ids(groups={"speakr": ["s1"]})
    with pytest.raises(DataError, match=r"data.groups.speaker.*'s9'"):
        ids(groups={"speaker": ["s9"]})


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("rows.txt", "x", "must end in .jsonl, .json, .csv or .tsv"),
        ("rows.jsonl", "", "has no rows"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "rows.jsonl:2: .*not valid JSON"),
        ("rows.jsonl", '{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        ("rows.jsonl", '["a"]', "must be a JSON object"),
        ("rows.json", '{"prompt": "a"}', "rows.json:1: is not a JSON list of rows"),
        ("rows.json", '[\n{"prompt": "a"},\n{"prompt" 1}]', "rows.json:3: is not valid JSON"),
        ("rows.json", '[\n{"prompt": "a"}\n', "expected , or ]"),
        ("rows.json", '[\n{"prompt": "a"}\n]\n\n[{"prompt": "b"}]', "rows.json:5: continues after"),
        ("rows.json", '[]\n{"prompt": "a"}', "rows.json:2: continues after"),
        ("rows.json", '[{"prompt": "a"},]', "rows.json:1: is not valid JSON"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": "\\uD83D"}', "jsonl:2: field 'prompt': .*half"),
        ("rows.json", '[\n{"prompt": "a", "x\\udc00": 1}]', r"json:2: field 'x.udc00': .*half"),
        ("rows.csv", 'prompt,group\na,"{""s"": ""\\udc00""}"\n', "csv:2: field 'group': .*half"),
        ("rows.csv", "prompt,labels\na,happy\n", r"field 'labels': .*such as \["),
        ("rows.csv", "prompt,cues.present\na,frown\n", "as JSON in one column 'cues', such as "),
        ("rows.csv", "prompt,prompt\na,b\n", "'prompt' twice"),
        ("rows.csv", "prompt,label\na,b,c\n", "rows.csv:2: has 3 cells under 2 columns"),
        ("rows.csv", "prompt,labels\na,sad\n", "field 'labels': must hold JSON in its cell"),
        ("rows.csv", "prompt,start\na,soon\n", "field 'start': must be a finite number"),
        ("rows.csv", "prompt,start\na,nan\n", "field 'start': must be a finite number"),
        ("rows.csv", "prompt,lable\na,sad\n", "did you mean 'label'"),
        ("rows.csv", 'prompt\n"a\n', "is not valid CSV"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, advice: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=advice):
        load(path)


_DEEP, _LONG = "[" * 5000 + "]" * 5000, "1" * 5000
BEYOND = {
    "deep row": ("rows.jsonl", '\n{"prompt": ' + _DEEP + "}", "rows.jsonl:2: is nested too deeply"),
    "deep list": ("rows.json", "[\n" + _DEEP + "]", "rows.json:2: is nested too deeply"),
    "deep cell": ("rows.csv", f"prompt,labels\na,{_DEEP}\n", "rows.csv:2: .*is nested too deeply"),
    "long": ("rows.jsonl", '{"prompt": "a", "start": ' + _LONG + "}", "rows.jsonl:1: .*digits"),
    "long in a list": ("rows.json", '[{"start": ' + _LONG + "}]", "rows.json:1: .*digits"),
    "long in a cell": ("rows.csv", f"prompt,labels\na,{_LONG}\n", "rows.csv:2: .*digits"),
    "long start": ("rows.csv", f"prompt,start\na,{_LONG}\n", "rows.csv:2: field 'start': .*finite"),
}


@pytest.mark.parametrize("case", list(BEYOND))
def test_what_python_refuses_is_a_row_s_problem(tmp_path: Path, case: str) -> None:
    name, content, advice = BEYOND[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=advice) as caught:
        load(tmp_path / name)
    assert len(str(caught.value)) < 500


def test_whole_characters_in_escapes_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a \\ud83d\\ude00"}\n')
    assert load(path)[0].turns[0].text == "a \U0001f600"


def test_nesting_at_the_edge_of_the_limit_is_one_error(tmp_path: Path) -> None:
    """Between what can be read and what can be written again."""
    path = tmp_path / "rows.jsonl"
    for depth in range(600, 1000, 5):
        deep = "[" * depth + "]" * depth
        path.write_text('{"prompt": "a", "x": ' + deep + ', "y": "\\ud83d\\ude00"}')
        with contextlib.suppress(DataError):  # and no other
            load(path, columns=["x", "y"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no.jsonl: cannot be read"):
        load(tmp_path / "no.jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        load(path)


def test_the_problems_of_an_error_are_those_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": 3}], indent=1))
    with pytest.raises(DataError) as caught:
        load(path)
    assert (
        caught.value.line
        == next(
            number for number, line in enumerate(path.read_text().split("\n"), 1) if "3" in line
        )
        - 1
    )
    assert [found.values["prompt"] for found in read_rows(path)] == ["a", 3]


HEADER = "sample_id,prompt,videos,label,group.speaker\n"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_are_read_as_spreadsheets_write_them(
    tmp_path: Path, delimiter: str, ending: str, mark: str
) -> None:
    line = delimiter.join(["a", '"<video>What, now? ; then?"', "clip é 1.mp4", "sad", "s1"])
    text = mark + HEADER.replace(",", delimiter) + line + "\n"
    for name in ("t.csv", "t.tsv"):
        (tmp_path / name).write_bytes(text.replace("\n", ending).encode())
        (sample,) = load(tmp_path / name)
        assert sample.turns[0].text == "<video>What, now? ; then?"
        assert (sample.media["video"].path, sample.truth.label) == ("clip é 1.mp4", "sad")
        assert sample.group == {"speaker": "s1"}


@pytest.mark.parametrize("name", ["t.xlsx", "t.parquet"])
def test_a_table_in_another_format_says_how_to_save_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"must end in \.jsonl.*save the table as CSV UTF-8"):
        load(tmp_path / name)


def test_other_encodings_say_how_to_save_them(tmp_path: Path) -> None:
    for encoding in ("gbk", "utf-16"):
        (tmp_path / "t.csv").write_bytes("sample_id,prompt\na,悲伤\n".encode(encoding))
        with pytest.raises(DataError, match=r"save it as UTF-8 \(in Excel: CSV UTF-8\)"):
            load(tmp_path / "t.csv")


@pytest.mark.parametrize("word", ["nan", "NaN", " nan ", "<NA>", "NaT"])
@pytest.mark.parametrize("field", ["label", "sample_id", "prompt", "completion", "group.speaker"])
def test_the_words_for_a_missing_value_are_none(tmp_path: Path, word: str, field: str) -> None:
    cells = {"sample_id": "a", "prompt": "Q", "completion": "sad", "label": "sad"} | {field: word}
    (tmp_path / "t.csv").write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    with pytest.raises(DataError, match=f"'{field}': is '{word}', as pandas writes a missing"):
        load(tmp_path / "t.csv")


def test_missing_values_in_json_are_none_either(tmp_path: Path) -> None:
    for value, says in (
        ('"nan"', "as pandas writes a missing"),
        ("NaN", "which pandas writes for a missing"),
        ('["sad", "nan"]', "as pandas writes a missing"),
    ):
        key = "labels" if value.startswith("[") else "label"
        (tmp_path / "t.jsonl").write_text(f'{{"prompt": "Q", "{key}": {value}}}\n')
        with pytest.raises(DataError, match=f"field '{key}': is .*{says}"):
            load(tmp_path / "t.jsonl")


def test_words_that_only_look_missing_are_words(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(transcript="Nan, come here!", label="none")])
    (sample,) = load(path)
    assert (sample.transcript, sample.truth.label) == ("Nan, come here!", "none")


@pytest.mark.parametrize("field", ["label", "sample_id", "group.speaker"])
def test_an_integer_that_became_a_float_is_refused(tmp_path: Path, field: str) -> None:
    lines = ["sample_id,prompt,label,group.speaker", "a,Q,sad,s1", "b,Q,,s2"]
    at = lines[0].split(",").index(field)
    for number, value in ((1, "3.0"), (2, "12.0")):
        cells = lines[number].split(",")
        cells[at] = value
        lines[number] = ",".join(cells)
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"t\.csv:2: field '{field}': is '3\.0'.*write '3'"):
        load(tmp_path / "t.csv")


@pytest.mark.parametrize("labels", [["3.0", "1.4"], ["3", "2"], ["3.01"], ["v3.0"]])
def test_other_numbers_stay_labels(tmp_path: Path, labels: list[str]) -> None:
    path = write(tmp_path / "t.jsonl", [row(sample_id=x, label=x) for x in labels])
    assert [sample.truth.label for sample in load(path)] == labels


def test_blanks_around_a_label_make_no_class(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sample_id,prompt,label\na,Q, sad \nb,Q,sad\n")
    assert [sample.truth.label for sample in load(tmp_path / "t.csv")] == ["sad", "sad"]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sample_id,prompt\na," + "x" * 200_000 + "\n")
    assert len(load(tmp_path / "t.csv")[0].turns[0].text) == 200_000
