"""What the first bytes of a file say about its length: is its end missing, was it ever declared?

A writer that cannot go back, as into a pipe, leaves the lengths in its header open, and FFmpeg then
guesses them from the bit rate. A guess must neither refuse a file nor cut it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx"})
"""Types of the boxes with which an MP4 or MOV file may begin."""

_LONG = 2**16  # bytes by which a size that stands for "not known yet" may miss a power of two
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the file properties object
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_HEAD = 1 << 16
_EBML = b"\x1aE\xdf\xa3"
_XING_AT = 200  # bytes of a frame of MPEG audio within which its Xing header stands
_TAGGED = 0.02  # share by which the length in the header of an mp3 or ASF file may be wrong
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_SLACK = 16  # some writers count the header in, or pad the end


def missing_bytes(path: Path) -> int:
    """Bytes by which the file ends before its outermost boxes or chunks do; 0 if it is whole."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(12)
        if head[4:8] in BOXES:
            return max(0, _end_of_boxes(handle, size) - size)
        missing = 0
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            missing = _end_of_riffs(handle, size) - size
        elif head[:4] == _EBML:
            handle.seek(0)
            at, length = _segment(handle.read(_HEAD))
            missing = 0 if length is None else at + length - size
        elif head[:3] == b"ID3" or head[:1] == b"\xff" or head[:4] == _ASF[:4]:
            handle.seek(0)
            start = handle.read(_HEAD)
            end, length = _end_of_asf(start) or _end_of_mpeg_audio(start)
            missing = end - size if end - size > _TAGGED * length else 0
        return missing if missing > _SLACK else 0


def is_broken_ogg(path: Path) -> bool:
    """Whether a page of an Ogg file is cut or fails its checksum, so that FFmpeg leaves it out
    without a word (RFC 3533, section 6)."""
    at = 0
    with path.open("rb") as handle:
        while (head := handle.read(27))[:4] == b"OggS":
            lengths = handle.read(head[26]) if len(head) == 27 else b""
            page = head + lengths + handle.read(sum(lengths))
            if len(head) < 27 or len(page) < 27 + head[26] + sum(lengths):
                return True
            # The polynomial of zlib, but neither its order of bits nor its inversions.
            plain = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
            found = zlib.crc32(plain, 0xFFFFFFFF) ^ 0xFFFFFFFF
            if found.to_bytes(4, "big").translate(_MIRRORED) != page[22:26]:
                return True
            at += len(page)
        handle.seek(at)
        return at > 0 and b"OggS" in handle.read()  # what follows else is a tag


def _end_of_asf(head: bytes) -> tuple[int, int] | None:
    """The length in bytes that the header of a finished ASF file gives, twice."""
    at = head.find(_ASF_FILE)
    if not head.startswith(_ASF) or at < 0 or len(head) < at + 92 or head[at + 88] & 1:
        return None
    length = int.from_bytes(head[at + 40 : at + 48], "little")
    return length, length


def _end_of_mpeg_audio(head: bytes) -> tuple[int, int]:
    """Where an mp3 with a Xing header ends, and the length in bytes that this says; else zeros."""
    at = 0
    while head[at : at + 3] == b"ID3" and at + 10 <= len(head):
        size = 0
        for byte in head[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size
    frame = head[at : at + _XING_AT]
    mark = max(frame.find(b"Xing"), frame.find(b"Info"))
    if frame[:1] != b"\xff" or mark < 0 or len(frame) < mark + 16 or not frame[mark + 7] & 2:
        return 0, 0
    # The number of frames stands before the number of bytes, if it is there.
    place = mark + (12 if frame[mark + 7] & 1 else 8)
    length = int.from_bytes(frame[place : place + 4], "big")
    return at + length, length


def _end_of_boxes(handle: BinaryIO, size: int) -> int:
    at = 0
    while at + 8 <= size:
        handle.seek(at)
        head = handle.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        # 0 means up to the end of the file; less than the box's own header would not advance.
        if length < 8:
            return size
        at += length
    return at


def _end_of_riffs(handle: BinaryIO, size: int) -> int:
    """An AVI of over 1 GB is a row of RIFF chunks."""
    at = 0
    while at + 12 <= size:
        handle.seek(at)
        head = handle.read(8)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or _is_open(length):
            return size
        at += 8 + length + length % 2
    return at


def is_streamed(path: Path) -> bool:
    """Whether the header was written before the length was known, and never completed."""
    with path.open("rb") as handle:
        head = handle.read(_HEAD)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        order = "big" if head[:4] == b"RIFX" else "little"
        sizes = dict(_chunks(head, 12, 4, order))
        if b"ds64" in sizes and sizes.get(b"data") == 2**32 - 1:
            at = head.index(b"ds64") + 16  # behind the size of the whole file
            return _is_open(int.from_bytes(head[at : at + 8], "little"))
        return b"data" in sizes and _is_open(sizes[b"data"])
    if head[:4] == b"RIFF":  # AVI
        return _is_open(int.from_bytes(head[4:8], "little"))
    if head[:4] == b"caff":
        sizes = dict(_chunks(head, 8, 8, "big"))
        return b"data" in sizes and _is_open(sizes[b"data"])
    at = head.find(b"fLaC")  # an ID3 tag may stand before it
    if at == 0 or (at > 0 and head[:3] == b"ID3"):
        return int.from_bytes(head[at + 18 : at + 26], "big") % 2**36 == 0  # samples in all
    if head[:4] == b".snd":
        return _is_open(int.from_bytes(head[8:12], "big"))
    if head[:4] == _EBML:
        return _segment(head)[1] is None
    at = head.find(_ASF_FILE)
    return at >= 0 and bool(head[at + 88 : at + 89] and head[at + 88] & 1)  # the broadcast flag


def _chunks(head: bytes, at: int, width: int, order: str) -> Iterator[tuple[bytes, int]]:
    """Names and sizes of the chunks in ``head``; a size has ``width`` bytes."""
    while at + 4 + width <= len(head):
        name = head[at : at + 4]
        size = int.from_bytes(head[at + 4 : at + 4 + width], "big" if order == "big" else "little")
        yield name, size
        if name == b"data":
            return
        at += 4 + width + size
        if width == 4:  # RIFF pads chunks to even lengths
            at += size % 2


def _is_open(size: int) -> bool:
    """Whether a size stands for "not known yet": 0, or nearly the largest one that can be written.

    SoX writes 0x7FFFF000 and ALSA 0x80000000 where FFmpeg writes 0xFFFFFFFF.
    """
    limits = (2**31, 2**32, 2**63, 2**64)
    return size == 0 or any(limit - _LONG <= size <= limit for limit in limits)


def _segment(head: bytes) -> tuple[int, int | None]:
    """Where a Matroska segment's content begins, and its length; None if that was left open."""
    length, at = _vint(head, 4)  # of the EBML header, behind which the segment stands
    size, begin = _vint(head, at + (length or 0) + 4)
    return begin, size


def _vint(head: bytes, at: int) -> tuple[int | None, int]:
    """An EBML variable-size integer, None if all its bits are ones, and the place behind it."""
    first = head[at] if at < len(head) else 0
    width = 9 - first.bit_length()
    if not 1 <= width <= 8:
        return 0, at
    value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width
