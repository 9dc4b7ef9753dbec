"""Whatever a kill leaves, readers see whole rows and the next append goes on behind them."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo import files
from mmemo.files import (
    DamagedLineError,
    append_rows,
    keep_rows,
    read_intact_rows,
    read_rows,
    write_rows,
    write_whole,
)

ROWS: list[Any] = [
    {"n": 1, "text": "答え, naïve"},
    ["a", {"b": None}],
    {"n": 12.5, "t": "\u2028"},
]

rows = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=9), max_size=3)
    | st.lists(st.integers() | st.none(), max_size=3),
    max_size=6,
)


def test_containers_with_one_process_number_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system of several nodes, each in a container where the process is number 7."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(threading, "get_native_id", lambda: 7)
    names: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (names.append(a.name), replace(a, b))[1])
    for text in ("a", "b"):
        write_whole(tmp_path / "x", text)
    assert len(set(names)) == 2


@given(written=rows, cut=st.integers(0, 10_000), crlf=st.booleans(), ascii_only=st.booleans())
@settings(max_examples=300)
def test_cut_at_any_byte_no_whole_row_is_lost_and_no_half_row_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[Any],
    cut: int,
    crlf: bool,
    ascii_only: bool,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    append_rows(path, written, ensure_ascii=ascii_only)
    data = path.read_bytes().replace(b"\n", b"\r\n" if crlf else b"\n")
    data = data[: cut % (len(data) + 1)]
    path.write_bytes(data)
    whole = data.count(b"\n")
    seen = read_rows(path)
    # A row that lost nothing but its line break is whole as well.
    assert seen in (written[:whole], written[: whole + 1])
    assert list(read_intact_rows(path)) == seen
    assert path.read_bytes() == data  # reading repairs nothing
    append_rows(path, [{"next": "é"}], ensure_ascii=ascii_only)
    assert read_rows(path) == [*seen, {"next": "é"}]
    assert path.read_bytes().startswith(data[: data.rfind(b"\n") + 1])


def test_a_line_torn_in_the_middle_of_a_character_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_rows(path, [{"a": "é"}], ensure_ascii=False)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"a": "é'.encode()[:-1])
    assert read_rows(path) == [{"a": "é"}]
    append_rows(path, [{"b": 2}])
    assert path.read_bytes() == whole + b'{"b": 2}\n'


def test_a_torn_line_longer_than_a_block_is_cut_off_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"long": "' + b"x" * (3 * files._BLOCK))  # pyright: ignore[reportPrivateUsage]
    append_rows(path, [{"b": 2}])
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


@pytest.mark.parametrize("torn", [b"12", b"null", b'"text"', b"\0\0\0", b"{", b"[1, 2"])
def test_what_is_no_object_or_array_is_never_a_row(tmp_path: Path, torn: bytes) -> None:
    """``12`` may be what is left of ``123``."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    assert read_rows(path) == [{"a": 1}]
    append_rows(path, [])
    assert path.read_bytes() == b'{"a": 1}\n'


def test_empty_and_blank_lines_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert list(read_intact_rows(path)) == []
    with pytest.raises(FileNotFoundError):
        read_rows(path)
    path.write_bytes(b"")
    assert read_rows(path) == []
    append_rows(path, ROWS[:1])
    path.write_bytes(b"\n" + path.read_bytes() + b"  \r\n")
    assert read_rows(path) == ROWS[:1]


def test_damage_before_the_end_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"torn": \n{"b": 2}\n')
    with pytest.raises(DamagedLineError, match=r"a\.jsonl:2: is not a whole line of JSON; restore"):
        read_rows(path)
    assert list(read_intact_rows(path)) == [{"a": 1}, {"b": 2}]
    path.write_bytes(b'{"a": 1}\n{"b": 2\n')  # the last line, and yet not torn: it has its end
    with pytest.raises(DamagedLineError, match=":2:"):
        read_rows(path)


def test_what_lies_behind_an_offset_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    end = append_rows(path, [{"new": True}], at=first, durable=True)
    assert read_rows(path) == [ROWS[0], {"new": True}]
    assert end == path.stat().st_size


def test_kept_rows_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step":1,  "x": 1e-3}\r\nnoise\n{"step": 3}\n{"step": 2}\n{"st')
    kept = keep_rows(path, lambda row: row["step"] <= 2)
    assert kept == [{"step": 1, "x": 0.001}, {"step": 2}]
    assert path.read_bytes() == b'{"step":1,  "x": 1e-3}\n{"step": 2}\n'


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_rows_that_are_no_json_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    for write in (append_rows, write_rows):
        with pytest.raises(ValueError, match="JSON compliant"):
            write(path, [{"fine": 1}, {"x": float("nan")}], allow_nan=False)
    assert read_rows(path) == ROWS


def test_many_writers_lose_and_mix_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def write(name: int) -> None:
        for number in range(50):
            append_rows(path, [{"name": name, "number": number, "fill": "x" * 5000}])

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((r["name"], r["number"]) for r in read_rows(path)) == [
        (name, number) for name in range(4) for number in range(50)
    ]


WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from mmemo.files import append_rows, write_whole

    folder = Path(sys.argv[1])
    number = 0
    print("ready", flush=True)
    while True:
        append_rows(folder / "a.jsonl", [{"number": number, "fill": "é" * 1_000_000}],
                    ensure_ascii=False)
        write_whole(folder / "a.json", f"{number}:" + str(number % 10) * 3_000_000, durable=False)
        number += 1
    """
)


def test_a_killed_writer_leaves_whole_rows_and_a_whole_file(tmp_path: Path) -> None:
    log, state = tmp_path / "a.jsonl", tmp_path / "a.json"
    draw = random.Random(0)
    for _ in range(6):
        write_rows(log, [{"number": -1}])
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        while not state.exists() or log.stat().st_size < 1_000_000:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.02, 0.2))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        seen = read_rows(log)
        assert seen[0] == {"number": -1}
        assert all(len(row["fill"]) == 1_000_000 for row in seen if row["number"] >= 0)
        number, _, body = state.read_text().partition(":")
        assert body == str(int(number) % 10) * 3_000_000
        append_rows(log, [{"number": -1}])
        assert [row["number"] for row in read_rows(log)] == [*(r["number"] for r in seen), -1]
        assert json.loads(log.read_bytes().splitlines()[-1]) == {"number": -1}


def left_over(folder: Path, name: str, age_s: float) -> Path:
    path = folder / name
    path.write_text("half")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    dead = left_over(tmp_path, ".state [1].json.tmp-0123456789abcdef", 7200)
    young = left_over(tmp_path, ".state.json.tmp-0123456789abcdee", 60)
    others = [
        left_over(tmp_path, name, 7200)
        for name in ("state.json", ".state.json.tmp-note", "x.tmp-0123456789abcdef", ".hidden")
    ]
    held = left_over(tmp_path, ".rows.jsonl.tmp-0123456789abcded", 7200)
    with held.open("rb") as handle:  # a writer that is slow, not dead
        fcntl.flock(handle, fcntl.LOCK_EX)
        files.write_whole(tmp_path / "new.json", "{}")
    assert not dead.exists()
    assert young.exists()
    assert held.exists()
    assert all(path.exists() for path in others)


def test_a_writer_holds_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    def look(descriptor: int) -> None:
        for temporary in tmp_path.glob(".new.json.tmp-*"):
            with temporary.open("rb") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held.append(True)

    monkeypatch.setattr(files.os, "fsync", look)
    files.write_whole(tmp_path / "new.json", "{}")
    assert held == [True]
