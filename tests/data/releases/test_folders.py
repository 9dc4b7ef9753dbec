"""What adapters of released folders share: clips by name, labels and words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.adapter import Excluded
from mmemo.data.releases.folders import (
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
    read_words,
    talking,
    words_of,
)
from mmemo.errors import EvaluationError


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


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
