from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mmemo.media.containers import is_broken_ogg, is_streamed, missing_bytes


def wav(data_size: int, riff: bytes = b"RIFF", extra: bytes = b"") -> bytes:
    order = ">" if riff == b"RIFX" else "<"
    chunk = struct.pack(order + "HHIIHH", 1, 1, 16000, 32000, 2, 16)
    head = riff + struct.pack(order + "I", 36) + b"WAVE" + extra
    head += b"fmt " + struct.pack(order + "I", 16) + chunk
    return (
        head
        + b"LIST"
        + struct.pack(order + "I", 3)
        + b"abc\0"
        + b"data"
        + struct.pack(order + "I", data_size)
    )


def ds64(size: int) -> bytes:
    return b"ds64" + struct.pack("<IQQQI", 28, 0, size, 0, 0)


SEGMENT = b"\x1aE\xdf\xa3\x83abc\x18S\x80g"


@pytest.mark.parametrize(
    ("head", "streamed"),
    [
        (wav(32000), False),
        (wav(0), True),
        (wav(2**32 - 1), True),
        (wav(0x7FFFF000), True),
        (wav(2**31), True),
        (wav(2**30), False),
        (wav(32000, b"RIFX"), False),
        (wav(0, b"RIFX"), True),
        (wav(2**32 - 1, b"RF64", ds64(32000)), False),
        (wav(2**32 - 1, b"RF64", ds64(0)), True),
        (b"RIFF" + struct.pack("<I", 1000) + b"AVI ", False),
        (b"RIFF" + struct.pack("<I", 0) + b"AVI ", True),
        (b"caff\0\1\0\0data" + struct.pack(">q", -1), True),
        (b"caff\0\1\0\0data" + struct.pack(">q", 99), False),
        (b".snd" + struct.pack(">II", 24, 2**32 - 1), True),
        (SEGMENT + b"\x01" + b"\xff" * 7, True),
        (SEGMENT + b"\xff", True),
        (SEGMENT + b"\x84abcd", False),
        (b"", False),
        (b"\0" * 64, False),
        (b"RIFF", True),
    ],
)
def test_whether_the_length_was_left_open(tmp_path: Path, head: bytes, streamed: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(head)
    assert is_streamed(path) is streamed


def xing(size: int, flags: int = 3) -> bytes:
    """The first frame of an mp3 of ``size`` bytes, of which it is 200."""
    head = b"\xff\xfb\x90\x64" + bytes(32) + b"Xing" + struct.pack(">I", flags)
    head += struct.pack(">I", 99) if flags & 1 else b""
    return (head + struct.pack(">I", size)).ljust(200, b"\0")


def asf(size: int, flags: int = 2) -> bytes:
    """The first 200 bytes of an ASF file of ``size``."""
    head = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c").ljust(30, b"\0")
    head += bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + bytes(24)
    head += struct.pack("<QQQQQQ", size, 0, 26, 10**7, 10**7, 0) + struct.pack("<I", flags)
    return head.ljust(200, b"\0")


def box(kind: bytes, content: int, declared: int | None = None) -> bytes:
    return struct.pack(">I", declared or 8 + content) + kind + bytes(content)


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (box(b"ftyp", 8) + box(b"mdat", 100), 0),
        (box(b"ftyp", 8) + box(b"mdat", 100, 150), 42),
        (box(b"ftyp", 8) + struct.pack(">I", 0) + b"mdat" + bytes(9), 0),
        (b"RIFF" + struct.pack("<I", 104) + b"AVI " + bytes(100), 0),
        (b"RIFF" + struct.pack("<I", 104) + b"AVI " + bytes(40), 60),
        (b"RIFF" + struct.pack("<I", 112) + b"AVI " + bytes(100), 0),  # counts its own header
        (b"RIFF" + struct.pack("<I", 2**32 - 1) + b"AVI " + bytes(40), 0),
        ((b"RIFF" + struct.pack("<I", 104) + b"AVI " + bytes(100)) * 2, 0),
        ((b"RIFF" + struct.pack("<I", 104) + b"AVI " + bytes(100)) * 2 + b"junk" * 9, 0),
        (SEGMENT + b"\xc0" + bytes(64), 0),
        (SEGMENT + b"\xc0" + bytes(20), 44),
        (SEGMENT + b"\xff" + bytes(20), 0),
        (b"another format", 0),
        (xing(3000) + bytes(2800), 0),
        (xing(3000) + bytes(1000), 1800),
        (xing(3000) + bytes(1000) + b"TAG" + bytes(1900), 0),
        (b"ID3\4\0\0\0\0\0\x05" + bytes(5) + xing(3000) + bytes(1000), 1800),
        (xing(3000, 2) + bytes(1000), 1800),
        (xing(3000, 1) + bytes(1000), 0),  # it does not give the bytes
        (asf(3000) + bytes(2800), 0),
        (asf(3000) + bytes(1000), 1800),
        (asf(3000, 1) + bytes(1000), 0),  # a broadcast
    ],
)
def test_bytes_that_are_missing_at_the_end(tmp_path: Path, data: bytes, missing: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert missing_bytes(path) == missing


def page(content: bytes = b"hello", checksum: int | None = None) -> bytes:
    head = b"OggS\0\6" + bytes(8) + struct.pack("<II", 1, 0)
    plain = head + bytes(4) + bytes([1, len(content)]) + content
    return plain[:22] + struct.pack("<I", crc(plain) if checksum is None else checksum) + plain[26:]


def crc(data: bytes) -> int:
    """RFC 3533, section 6: the polynomial 0x04c11db7, from 0, highest bit first."""
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


@pytest.mark.parametrize(
    ("data", "broken"),
    [
        (page() * 3, False),
        (page() + b"TAG" + bytes(125), False),
        (page() + page()[:-1], True),
        (page() + page()[:20], True),
        (page() + page(checksum=1) + page(), True),
        (page() + b"x" + page(), True),
        (page(b"hello") + page(b"jello"), False),
        (page() + page().replace(b"hello", b"jello"), True),
    ],
)
def test_damaged_pages_of_ogg(tmp_path: Path, data: bytes, broken: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert is_broken_ogg(path) is broken
