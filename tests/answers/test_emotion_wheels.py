"""Emotion wheels: the released mapping to the letter, and the one without its defects."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from mmemo.answers.emotion_wheels import load_wheels, read_table, split_words
from mmemo.errors import EvaluationError

DATA = Path(os.environ.get("MMEMO_TEST_DATA", "no data")) / "mer_unibench"
needs_data = pytest.mark.skipif(
    not (DATA / "emotion_wheel").exists(),
    reason="needs MER-UniBench's assets, in MMEMO_TEST_DATA/mer_unibench",
)


def write_wheels(folder: Path) -> Path:
    """A folder of made-up assets with the traps of the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        rows = ["level1,level2,level3", "joyful,content,relaxed", ",proud,brave"]
        rows += ["scared,anxious,worried", ",,fearful" if number == 1 else ",weak,timid"]
        rows += ["mad,bitter,proud"]
        (folder / f"wheel{number}.csv").write_text("\n".join(rows) + "\n")
    forms = ["name,format", 'fear,"fear,fears"', 'fearful,"fear,fearful"']
    forms += ['fearless,"fear,fearless"', 'happy,"happy,happiness"', 'relaxed,"relaxed,relaxes"']
    forms += ["no words,"]
    (folder / "format.csv").write_text("\n".join(forms) + "\n")
    runs = {
        "run1": {"brave": ["fearless", "bold"], "content": ["happy"], "timid": ["fear"]},
        "run2": {"brave": ["fearless"], "content": ["happy", "pleased"], "anxious": ["fear"]},
        "run3": {"joyful": ["happy"], "anxious": ["fear"], "relaxed": []},
    }
    (folder / "synonym.json").write_text(json.dumps({"runs": runs}))
    return folder


def test_official_takes_the_first_word_of_the_alphabet(tmp_path: Path) -> None:
    wheels = load_wheels(write_wheels(tmp_path / "w"))
    assert wheels.official("fear", 1) == "scared"  # "anxious" comes before "brave"
    assert wheels.official("fearless", 1) == "joyful"
    assert wheels.official("Happy ", 0) == "joyful"
    assert wheels.official("neutral", 0) is None
    assert wheels.official("bold", 0) is None  # a synonym, but no surface form
    assert wheels.classes(["neutral", "happy"], 0, "official") == {"joyful"}


def test_corrected_takes_the_nearest_and_drops_nothing(tmp_path: Path) -> None:
    wheels = load_wheels(write_wheels(tmp_path / "w"))
    assert wheels.corrected("fear", 0) == "scared"  # its form "fearful" is on this wheel
    assert wheels.corrected("fear", 1) == "scared"  # two lists name "anxious", one "timid"
    assert wheels.corrected("fearless", 1) == "joyful"
    assert wheels.corrected("neutral", 0) == wheels.corrected("neutrality", 0) == "neutral?"
    assert wheels.classes(["fear", "neutral"], 0, "corrected") == {"scared", "neutral?"}


def test_a_word_in_two_places_counts_where_it_stands_last(tmp_path: Path) -> None:
    wheels = load_wheels(write_wheels(tmp_path / "w"))
    assert wheels.wheels[0].inner["proud"] == "mad"
    rings = [[word for word, ring in wheels.wheels[0].ring.items() if ring == n] for n in (1, 2, 3)]
    assert rings[0] == ["joyful", "scared", "mad"]
    assert rings[1] == ["content", "proud", "anxious", "bitter"]
    assert rings[2] == ["relaxed", "brave", "worried", "fearful"]


def test_answers_are_split_as_the_scorer_does_or_as_people_write() -> None:
    assert split_words("['Happy', \"at ease\", sad]", "official") == ["happy", "at ease", "sad"]
    assert split_words("happy and sad", "official") == ["happy and sad"]
    assert split_words("Happy; sad/at ease\nand angry, happy.", "corrected") == [
        "happy",
        "sad",
        "at ease",
        "angry",
    ]
    assert split_words("1. Happy\n2) at-ease\n- sad. Angry.", "corrected") == [
        "happy",
        "at ease",
        "sad",
        "angry",
    ]
    assert split_words("don't care, 'calm'", "corrected") == ["don't care", "calm"]
    assert split_words("[]", "official") == split_words(" , ", "corrected") == []


SPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
READING = '<rPh sb="0" eb="1"><t>x</t></rPh>'  # how a word is pronounced, no part of the cell
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
MAIN = "application/vnd.openxmlformats-officedocument.spreadsheetml"
FRAME = {  # the parts that make a zip of sheets a workbook
    "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
    '<Default Extension="xml" ContentType="application/xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{MAIN}.sheet.main+xml"/>'
    f'<Override PartName="/xl/sharedStrings.xml" ContentType="{MAIN}.sharedStrings+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{MAIN}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="a" '
    f'Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook {SPACE} xmlns:r="{OFFICE}"><sheets>'
    f'<sheet name="s" sheetId="1" r:id="b"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship '
    f'Id="b" Type="{OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


def sheet(path: Path, rows: list[list[str]]) -> None:
    """An Excel file with shared and inline strings, numbers and gaps, as spreadsheets write."""
    strings: list[str] = []
    lines: list[str] = []
    for index, row in enumerate(rows, start=1):
        cells: list[str] = []
        for column, text in enumerate(row):
            place = f"{'ABCDEFGH'[column]}{index}"
            if not text:
                continue
            if column == 1:
                inside = f'<c r="{place}" t="inlineStr"><is><t>{escape(text)}</t></is></c>'
            elif text.isdigit():
                inside = f'<c r="{place}"><v>{text}</v></c>'
            else:
                strings.append(text)
                inside = f'<c r="{place}" t="s"><v>{len(strings) - 1}</v></c>'
            cells.append(inside)
        lines.append(f'<row r="{index}">{"".join(cells)}</row>')
    shared = "".join(
        f"<si><r><t>{escape(text[:2])}</t></r><r><t>{escape(text[2:])}</t></r>{READING}</si>"
        for text in strings
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FRAME.items():
            archive.writestr(name, text)
        archive.writestr("xl/sharedStrings.xml", f"<sst {SPACE}>{shared}</sst>")
        data = f"<worksheet {SPACE}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        archive.writestr("xl/worksheets/sheet1.xml", data)


def test_excel_files_read_as_their_converted_forms(tmp_path: Path) -> None:
    plain = write_wheels(tmp_path / "plain")
    excel = tmp_path / "excel"
    excel.mkdir()
    shutil.copy(plain / "format.csv", excel)
    for number in range(1, 6):
        text = (plain / f"wheel{number}.csv").read_text()
        sheet(excel / f"wheel{number}.xlsx", [line.split(",") for line in text.splitlines()])
    runs = json.loads((plain / "synonym.json").read_text())["runs"]
    header = [f"{kind}_{run}" for run in runs for kind in ("word", "synonym")]
    rows = [header] + [[""] * 6 for _ in range(3)]
    for column, listed in enumerate(runs.values()):
        for row, (word, synonyms) in enumerate(listed.items(), start=1):
            rows[row][2 * column : 2 * column + 2] = [word, f"['{', '.join(synonyms)}']"]
    sheet(excel / "synonym.xlsx", rows)
    ours, theirs = load_wheels(excel), load_wheels(plain)
    assert ours.wheels == theirs.wheels
    assert {k: dict(v) for k, v in ours.votes.items()} == {
        k: dict(v) for k, v in theirs.votes.items()
    }


def test_bad_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has neither format\.csv nor format\.xlsx"):
        load_wheels(tmp_path)
    (tmp_path / "bad.xlsx").write_text("no zip")
    with pytest.raises(EvaluationError, match=r"bad\.xlsx: cannot be read as a table"):
        read_table(tmp_path / "bad.xlsx")
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    with pytest.raises(EvaluationError, match="declares entities"):
        read_table(tmp_path / "bomb.xlsx")
    sheet(tmp_path / "far.xlsx", [["a", "b"]])
    with zipfile.ZipFile(tmp_path / "far.xlsx") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    data = parts["xl/worksheets/sheet1.xml"].decode()
    for name, place, far in (
        ("rows", 'row r="1"', 'row r="999999999"'),
        ("wide", '"B1"', '"ZZZ1"'),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.xlsx", "w") as archive:
            for part, text in parts.items():
                changed = data.replace(place, far) if part.endswith("sheet1.xml") else text
                archive.writestr(part, changed)
        with pytest.raises(
            EvaluationError, match=rf"{name}\.xlsx: cannot be read .*over 100000 rows"
        ):
            read_table(tmp_path / f"{name}.xlsx")
    with zipfile.ZipFile(tmp_path / "large.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", bytes(65 << 20))
    with pytest.raises(EvaluationError, match="unpacks to over"):
        read_table(tmp_path / "large.xlsx")
    wide = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    with zipfile.ZipFile(tmp_path / "wide.xlsx", "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", wide.encode("utf-16"))
    with pytest.raises(EvaluationError, match="declares entities"):
        read_table(tmp_path / "wide.xlsx")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(EvaluationError, match="no header"):
        read_table(tmp_path / "empty.csv")
    folder = write_wheels(tmp_path / "w")
    (folder / "synonym.json").write_text("[]")
    with pytest.raises(EvaluationError, match="no lists of synonyms"):
        load_wheels(folder)


@needs_data
def test_equals_the_official_scorer_on_meld() -> None:
    meld = json.loads((DATA / "meld.json").read_text())
    wheels = load_wheels(DATA / "emotion_wheel")
    for number, official in enumerate(meld["official"]["per_wheel"]):
        hits: list[float] = []
        for item in meld["items"]:
            truth = wheels.official(item["gt"], number)
            if truth is not None:
                words = split_words(item["pred_openset"], "official")
                hits.append(float(truth in wheels.classes(words, number, "official")))
        assert len(hits) == official["n_kept"]
        assert sum(hits) / len(hits) == official["hitrate"]


@needs_data
def test_the_known_defects_of_the_released_mapping_are_gone() -> None:
    wheels = load_wheels(DATA / "emotion_wheel")
    official = [wheels.official("fear", number) for number in range(5)]
    assert official == ["scared", "happy", "joyful", "genius", "joyful"]
    corrected = [wheels.corrected("fear", number) for number in range(5)]
    assert corrected == ["scared", "fearful", "scared", "fear", "scared"]
    assert wheels.official("happy", 4) == "powerful"
    assert wheels.corrected("happy", 4) == "joyful"
    for word in ("neutral", "surprise", "disgust", "contempt"):
        assert all(wheels.corrected(word, number) for number in range(5))
