"""The reader of object arrays: plain data as NumPy reads them, and pickles that attack."""

from __future__ import annotations

import contextlib
import io
import os
import pickle  # noqa: TID251 - the attacks are pickles, which only the reader under test opens
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo.data.releases import npz
from mmemo.data.releases.npz import read_npz_objects
from mmemo.errors import DataError

HEADER = b"\x93NUMPY\x01\x00"


def member(pickled: bytes, descr: str = "|O", shape: str = "()") -> bytes:
    """One ``.npy`` member with a header and any bytes behind it."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return HEADER + struct.pack("<H", len(header)) + header.encode() + pickled


def archive(path: Path, pickled: bytes, **header: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", member(pickled, **header))
    return path


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray)
        assert ours.shape == theirs.shape
        assert ours.tolist() == theirs.tolist()
    else:
        assert ours == theirs


VALUES: dict[str, Any] = {
    "name2reason": {"test_dia0_utt0": "The person is happy. 高兴", "b": ""},
    "corpus": {"a": {"emo": "happy", "val": -10}, "b": {"emo": np.str_("sad"), "val": 1.5}},
    "numpy": {"f": np.float64(0.25), "i": np.int64(-3), "b": np.bool_(True), "f32": np.float32(2)},
    "filenames": np.array(["a", "bcd"]),
    "fileitems": np.array(["[happy]", "[]"], dtype=object),
    "numbers": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "nested": np.array([["a", {"b": [1, (2, None)]}], [{3}, frozenset({4})]], dtype=object),
    "lists": {"a": [[1, 2], [3]], "b": ([], {})},
    "inner": {
        "array": np.arange(4),
        "texts": np.array(["x", "yz"]),
        "big": np.arange(3, dtype=">i4"),
    },
    "ordered": OrderedDict(a=1),
    "empty": np.array([]),
    "bytes": {"a": b"\xff\x00", "b": bytearray(b"x")},
    "large": {"i": 1 << 80, "f": float("inf")},
}


def test_reads_what_numpy_reads(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **VALUES)
    found = read_npz_objects(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=True) as theirs:  # what we wrote ourselves
        assert list(found) == list(theirs)
        for name in theirs:
            value = theirs[name]
            value = value.item() if value.ndim == 0 else value
            if name == "inner":
                for key, one in value.items():
                    same(found[name][key], one)
            elif name == "bytes":
                assert found[name] == {"a": b"\xff\x00", "b": b"x"}
            else:
                same(found[name], value)
    assert type(found["corpus"]["b"]["emo"]) is str
    assert type(found["numpy"]["f"]) is float
    assert type(found["ordered"]) is dict


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    for name, value in VALUES.items():
        array = np.empty((), dtype=object)
        array[()] = value
        found = read_npz_objects(archive(tmp_path / "a.npz", pickle.dumps(array, protocol)))["x"]
        if name == "inner":
            for key, one in value.items():
                same(found[key], one)
        else:
            same(found, {**value, "b": b"x"} if name == "bytes" else value)


def test_pickles_of_python_2_and_of_old_numpy(tmp_path: Path) -> None:
    # Written by hand: str of Python 2 for text and raw data, numpy.core of NumPy 1.
    text = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(tcnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntbI00\n"
        b"(lp1\n(dS'emo'\nS'happy'\nsS'val'\ncnumpy.core.multiarray\nscalar\n"
        b"(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"U\x08\x00\x00\x00\x00\x00\x00\xe0?tRsatb."
    )
    assert read_npz_objects(archive(tmp_path / "a.npz", text))["x"] == {"emo": "happy", "val": 0.5}


class Runs:
    def __init__(self, what: Any, *args: Any) -> None:
        self.what, self.args = what, args

    def __reduce__(self) -> Any:
        return self.what, self.args


def attacks() -> dict[str, bytes]:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    laughs: Any = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    itself: list[Any] = []
    itself.append(itself)
    ring: dict[str, Any] = {}
    ring["ring"] = [ring]
    array = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR"
    state = array + b"(I0\ntS'b'\ntR(I1\n(%s\nt" + dtype + b"I00\n%stb."
    return {
        "os.system": pickle.dumps(Runs(os.system, "touch attacked")),
        "posix": b"cposix\nsystem\n(S'touch attacked'\ntR.",
        "eval": pickle.dumps(Runs(eval, "open('attacked', 'w')")),
        "getattr": pickle.dumps(Runs(getattr, "a", "upper")),
        "import": b"cbuiltins\n__import__\n(S'os'\ntR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0bcore.os.foo\x93.",
        "numpy function": b"cnumpy\nload\n(S'a.npy'\ntR.",
        "class": pickle.dumps(Path("a")),
        "newobj": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "instance": b"(S'a'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'a'\no.",
        "persistent": b"Pabc\n.",
        "extension": b"\x80\x02\x82\x01.",
        "deep": pickle.dumps(deep),
        "deep tuple as key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
        "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "laughs": pickle.dumps(laughs),
        "itself": pickle.dumps(itself),
        "ring": pickle.dumps(ring),
        "huge array": array + b"(I100000000000\ntS'f8'\ntR.",
        "huge state": state % (b"I100000000000", b"f8", b"S''\n"),
        "huge of nothing": state % (b"I100000000000", b"U0", b"S''\n"),
        "huge text type": dtype % b"U9999999999" + b".",
        "more objects": state % (b"I3", b"O8", b"(lNa"),
        "records": dtype % b"f8,f8" + b".",
        "half a character": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
        "bad letters": state % (b"I1", b"U1", b"S'\\xff\\xff\\xff\\xff'\n"),
        "bare name": b"cnumpy\nndarray\n.",
        "call of a text": b"S'a'\n)R.",
        "state of a text": b"S'a'\n)b.",
        "unhashable key": b"\x80\x02}]Ns.",
        "no stop": b"\x80\x02N",
        "empty stack": b"\x80\x02.",
        "unset memo": b"\x80\x02h\x05.",
        "append to text": b"S'a'\nNa.",
        "mark left": b"(.",
        "mark in a tuple": b"N(\x86.",
        "truncated text": b"\x80\x02X\xff\xff\xff\x7fabc",
        "long digits": b"L" + b"9" * 10_000 + b"L\n.",
        "nothing": b"",
    }


@pytest.mark.parametrize("name", attacks())
def test_attacks_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"a\.npz: "):
        read_npz_objects(archive(tmp_path / "a.npz", attacks()[name]))
    assert os.listdir() == ["a.npz"]


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    for descr, shape, data in (
        ("<f8", "(100000000000,)", b""),
        ("<U0", "(100000000000,)", b""),
        ("<f8", "(2,)", b"\0" * 8),
        ("<M8[s]", "(1,)", b"\0" * 8),
        ("|V8", "(1,)", b"\0" * 8),
        ("<f8", "(-1,)", b""),
        ("<f8", "__import__('os')", b""),
        ("<U1", "()", b"\xff" * 4),
    ):
        with pytest.raises(DataError):
            read_npz_objects(archive(tmp_path / "a.npz", data, descr=descr, shape=shape))


def test_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="cannot be read"):
        read_npz_objects(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"damaged or no \.npz"):
        read_npz_objects(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"damaged or no \.npz"):
        read_npz_objects(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    with pytest.raises(DataError, match="holds no arrays"):
        read_npz_objects(path)
    # A bomb by compression: 2 MiB of zeros in a few kilobytes, against a limit of 1 MiB.
    monkeypatch.setattr(npz, "LARGEST", 1 << 20)
    np.savez_compressed(path, x=np.zeros(1 << 18))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        read_npz_objects(path)
    path.write_bytes(b"\0" * ((1 << 20) + 1))
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_npz_objects(path)
    monkeypatch.setattr(npz, "_MOST_VALUES", 100)
    with pytest.raises(DataError, match="more than 100 pickle instructions"):
        read_npz_objects(archive(path, b"\x80\x02" + b"N0" * 100 + b"N."))


PICKLED = pickle.dumps(np.array({"a": {"emo": "happy", "val": np.float64(0.5)}}, dtype=object), 4)


@given(st.data())
def test_damaged_pickles_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(PICKLED)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = archive(tmp_path_factory.getbasetemp() / "fuzz.npz", bytes(damaged))
    with contextlib.suppress(DataError):
        read_npz_objects(path)


@given(st.lists(st.sampled_from([op.code for op in pickletools.opcodes]), max_size=30))
def test_any_instructions_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, codes: list[str]
) -> None:
    pickled = io.BytesIO()
    for code in codes:
        pickled.write(code.encode("latin1") + b"\x00")
    pickled.write(b".")
    path = archive(tmp_path_factory.getbasetemp() / "codes.npz", pickled.getvalue())
    with contextlib.suppress(DataError):
        read_npz_objects(path)
