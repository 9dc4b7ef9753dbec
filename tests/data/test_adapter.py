"""Data set adapters: rows are validated, files are compared, and what is wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.data.adapter import need_option, parse_options, write_manifest
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import ConfigError, DataError

HEAD = "COLUMNS = ('votes',)\n\ndef rows(root, *, split='all', label='sad'):\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "clips").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (folder / f"clips/{name}.wav").write_bytes(b"x")
    (folder / "readme.txt").write_text("x")
    return folder


def adapter(tmp_path: Path, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(HEAD + "".join(f"    {line}\n" for line in body.splitlines()))
    return str(path)


def one(name: str, **changes: Any) -> dict[str, Any]:
    base = {"sample_id": name, "prompt": "<audio>What?", "audio": f"clips/{name}.wav"}
    return base | {"label": "sad", "group": {"speaker": "s1"}} | changes


def test_rows_are_written_counted_and_compared_with_the_folder(tmp_path: Path, root: Path) -> None:
    mine = adapter(tmp_path, f"yield from {[one('a', votes=[1, 2]), one('b'), one('lost')]}")
    made = write_manifest(mine, root, tmp_path / "out/train.jsonl")
    assert made.missing == ("clips/lost.wav",)
    assert made.unused == ("clips/c.wav",)  # the text file is of no kind that a row names
    assert (dict(made.labels), dict(made.speakers)) == ({"sad": 2}, {"s1": 2})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    config = DataConfig(manifests=[str(tmp_path / "out/train.jsonl")], columns=["votes"])
    assert [sample.sample_id for sample in load_samples(config)] == ["a", "b"]


def test_media_inside_content_parts_are_compared_too(tmp_path: Path, root: Path) -> None:
    parts = [{"type": "audio", "audio": "clips/lost.wav"}, {"type": "text", "text": "What?"}]
    rows = [one("a"), {"messages": [{"role": "user", "content": parts}]}]
    made = write_manifest(adapter(tmp_path, f"yield from {rows}"), root, tmp_path / "t.jsonl")
    assert (len(made.samples), made.missing) == (1, ("clips/lost.wav",))


def test_files_of_the_other_splits_are_not_unused(tmp_path: Path, root: Path) -> None:
    body = f"yield from {[one('a'), one('b')]} if split == 'all' else {[one('a')]}"
    mine = adapter(tmp_path, body)
    made = write_manifest(mine, root, tmp_path / "train.jsonl", {"split": "train"})
    assert len(made.samples) == 1
    assert made.unused == ("clips/c.wav",)
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_a_wrong_row_names_its_line_and_keeps_the_old_manifest(tmp_path: Path, root: Path) -> None:
    (tmp_path / "train.jsonl").write_text("old")
    mine = adapter(tmp_path, f"yield from {[one('a'), one('b', lable='x')]}")
    with pytest.raises(DataError, match=r"train\.partial\.jsonl:2: field 'lable': .*'label'"):
        write_manifest(mine, root, tmp_path / "train.jsonl")
    assert (tmp_path / "train.jsonl").read_text() == "old"
    assert len((tmp_path / "train.partial.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("body", "advice"),
    [
        ("yield from []", "finds nothing in .*; its docstring shows"),
        (f"yield {one('lost')}", r"none of the 1 files .* such as 'clips/lost\.wav'; check --root"),
        (f"yield {one('a', audio='../a.wav')}", "must be relative to the data set's root"),
        (f"yield {one('a', audio='/a.wav')}", "must be relative to the data set's root"),
        (f"yield {one('a')}\nyield {{'x': root}}", "row 2 cannot be made .*JSON"),
        ("yield {}['missing column']", "row 1 cannot be made .*missing column"),
        ("yield (root / 'table.csv').read_text()", r"cannot read .*table\.csv .*; check --root"),
        ("yield {'x': None.group(1)}", "row 1 cannot be made .*no attribute 'group'"),
        ("yield 3", "must be a JSON object"),
        (f"yield {one('a')}\nyield {one('a')}", "'a' is the id of"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, root: Path, body: str, advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        write_manifest(adapter(tmp_path, body), root, tmp_path / "train.jsonl")
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "advice"),
    [("rows = []", "'rows' is no function"), ("def rows(:", r"cannot be loaded \(SyntaxError")],
)
def test_a_file_that_is_no_adapter_is_refused(
    tmp_path: Path, root: Path, text: str, advice: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=advice):
        write_manifest(str(tmp_path / "mine.py"), root, tmp_path / "t.jsonl")


def test_options_are_the_adapter_s_own(tmp_path: Path, root: Path) -> None:
    mine = adapter(tmp_path, "yield " + str(one("a")).replace("'sad'", "label"))
    made = write_manifest(mine, root, tmp_path / "t.jsonl", parse_options(["label=calm"]))
    assert made.samples[0].truth.label == "calm"
    for options, advice in (({"lable": "x"}, "did you mean 'label'"), ({"x": "1"}, "options are")):
        with pytest.raises(ConfigError, match=advice):
            write_manifest(mine, root, tmp_path / "t.jsonl", options)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_options(["label"])
    with pytest.raises(ConfigError, match="split is 'tran'; did you mean 'train'"):
        need_option("split", "tran", ("all", "train"))
    with pytest.raises(ConfigError, match=r"must end in \.jsonl"):
        write_manifest(mine, root, tmp_path / "t.csv")
    with pytest.raises(DataError, match="is not a folder"):
        write_manifest(mine, tmp_path / "no", tmp_path / "t.jsonl")


def test_the_command_prints_what_the_manifest_holds(tmp_path: Path, root: Path) -> None:
    mine, output = adapter(tmp_path, f"yield from {[one('a'), one('lost')]}"), tmp_path / "t.jsonl"
    command = ["manifest", mine, "--root", str(root), "--output", str(output), "--split", "train"]
    done = CliRunner().invoke(app, [*command, "--option", "label=sad"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["sample_id"] for line in output.read_text().splitlines()] == ["a"]
    text = " ".join(done.output.split())
    assert "1 rows of 1 speakers" in text
    assert "sad: 1" in text
    assert "1 files named by the data set but not in its folder" in text
    assert "clips/b.wav" in text


def test_labels_must_be_of_the_set_that_the_adapter_names(tmp_path: Path, root: Path) -> None:
    good, bad, output = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "t.jsonl"
    head = "LABELS = 'ravdess'\n\ndef rows(root):\n    yield from "
    good.write_text(f"{head}{[one('a'), one('b', label='fearful')]}\n")
    bad.write_text(f"{head}{[one('a'), one('b', label='fear')]}\n")
    command = ["manifest", str(good), "--root", str(root), "--output", str(output)]
    text = " ".join(CliRunner().invoke(app, command).output.split())
    assert "labels of ravdess: neutral, calm, " in text
    assert "(01 is neutral, 02 is calm, " in text
    with pytest.raises(DataError, match=r"l:2: field 'label': 'fear' is no label of ravdess"):
        write_manifest(str(bad), root, output)
