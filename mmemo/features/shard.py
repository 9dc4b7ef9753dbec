"""One shard of the feature store: a safetensors file that never changes once it has its name.

The metadata of the file holds one checksum per feature, over its key, tensor names, dtypes, shapes
and bytes, because safetensors refuses a truncated file but loads one with a flipped byte. Features
are read with ``preadv``, not from a memory map: a damaged file then raises an error instead of
killing the process, and no reader keeps a shard open that another process wants to evict.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from mmemo.errors import StoreError
from mmemo.files import sync

if TYPE_CHECKING:  # this import loads transformers
    from mmemo.models.backbone import Features

FORMAT = "mmemo-features-1"
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_MAX_HEADER = 100 << 20  # bytes; a damaged length must not allocate more than that
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class DamagedShard(StoreError):
    """The content of a shard differs from what was written. The message names the file."""

    def __init__(self, path: Path, detail: str) -> None:
        super().__init__(
            f"{path} is damaged ({detail}); it is removed and its features are recomputed"
        )
        self.path = path


class ForeignShard(Exception):
    """An intact shard of another version or program, which is left alone."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The location of one tensor of a feature: bytes ``start`` to ``end`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FeaturePlace:
    """The location of one feature, and its checksum."""

    checksum: str
    tensors: tuple[TensorPlace, ...]


def is_name(name: str) -> bool:
    """Whether a file is named like a shard."""
    return _NAME.fullmatch(name) is not None


def shard_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The name and status of every file that is named like a shard. Other files are skipped."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # evicted meanwhile
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry.name, entry.stat()


def shard_names(folder: Path) -> Iterator[str]:
    """The names of :func:`shard_files`, without asking for the status of each."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.name


def size_of(features: Features) -> int:
    """Size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in features.values())


def write_shard(path: Path, features: Mapping[str, Features]) -> str:
    """Write ``features`` (by key) to the temporary ``path`` and sync it to disk.

    Returns:
        The shard's final name, a hash of its content.

    Raises:
        OSError: the disk is full or not writable.
        StoreError: a tensor has a dtype that a shard cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": FORMAT}
    for key, feature in features.items():
        for name, tensor in feature.items():
            if tensor.dtype not in _CODES:
                raise StoreError(f"feature '{name}' is {tensor.dtype}, which the store cannot hold")
            tensors[f"{key}.{name}"] = tensor
        metadata[key] = checksum(key, feature)
    save_file(tensors, path, metadata=metadata)
    sync(path)
    return _name_of(metadata)


def _name_of(metadata: Mapping[str, str]) -> str:
    # The checksums stand for the content. Sorted, so that equal content gets one name.
    content = json.dumps(sorted(metadata.items())).encode()
    return f"{xxhash.xxh3_128_hexdigest(content)}.safetensors"


def verify_shard(path: Path, name: str) -> None:
    """Check all of a shard's bytes against the name that it was written under.

    Raises:
        DamagedShard: they differ.
    """
    index = read_index(path)
    if _name_of({"format": FORMAT} | {key: place.checksum for key, place in index.items()}) != name:
        raise DamagedShard(path, "its content is not that of its name")
    with path.open("rb") as handle:
        for key, place in index.items():
            read_feature(handle.fileno(), path, key, place, verify=True)


def checksum(key: str, feature: Features) -> str:
    """XXH3-128 of a feature: key, tensor names, dtypes, shapes and bytes."""
    digest = xxhash.xxh3_128()
    # Sorted, because a feature that is read back has its tensors in the order of the file.
    for name in sorted(feature):
        tensor = feature[name]
        head = f"{key}.{name}:{_CODES[tensor.dtype]}:{list(tensor.shape)};"
        digest.update(head.encode())
        # NumPy has no bfloat16 and float8, so all dtypes are hashed as bytes.
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_index(path: Path) -> dict[str, FeaturePlace]:
    """Read the index of a shard from its header.

    Raises:
        FileNotFoundError: the shard has been evicted.
        DamagedShard: the header does not parse, or the file does not have the length it states.
        ForeignShard: the shard has another format.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        return parse_index(path, size, lambda start, end: handle.read(end - start))


def parse_index(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> dict[str, FeaturePlace]:
    """As :func:`read_index`, of a shard of ``size`` bytes of which ``read`` gives those from one
    offset to another, in order."""
    prefix = read(0, 8) if size >= 8 else b""
    if len(prefix) < 8:
        raise DamagedShard(path, "no header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_MAX_HEADER, size - 8):
        raise DamagedShard(path, "the header is longer than the file")
    raw = read(8, 8 + length)
    try:
        header: Any = json.loads(raw)
        return _parse(path, header, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(path, "the header does not parse") from error


def _parse(path: Path, header: Any, base: int, size: int) -> dict[str, FeaturePlace]:
    metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
    if metadata.pop("format", None) != FORMAT:
        raise ForeignShard(path)
    places: dict[str, list[TensorPlace]] = {key: [] for key in metadata}
    last = base
    # Millions of features have the same few shapes, names and number types.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for full, entry in header.items():
        # Keys are hexadecimal, so the first dot ends the key, whatever the tensor is called.
        key, _, name = str(full).partition(".")
        shape = tuple(int(side) for side in entry["shape"])
        shape = shapes.setdefault(shape, shape)
        start, end = (base + int(offset) for offset in entry["data_offsets"])
        count = 1
        for side in shape:
            count *= side
        if not base <= start <= end or end - start != count * _DTYPES[entry["dtype"]].itemsize:
            raise DamagedShard(path, f"tensor '{full}' has the wrong length")
        last = max(last, end)
        dtype = sys.intern(str(entry["dtype"]))
        places[key].append(TensorPlace(sys.intern(name), dtype, shape, start, end))
    if last != size:
        raise DamagedShard(path, f"{size} bytes instead of {last}")
    return {key: FeaturePlace(metadata[key], tuple(found)) for key, found in places.items()}


def read_outline(path: Path, place: FeaturePlace) -> Features:
    """Read one feature with ``x`` on the meta device.

    The checksum covers the whole feature, so it is not verified here.

    Raises:
        FileNotFoundError: the shard has been evicted.
        DamagedShard: the file ended early.
    """
    small = tuple(tensor for tensor in place.tensors if tensor.name != "x")
    feature: Features = {
        tensor.name: torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device="meta")
        for tensor in place.tensors
        if tensor.name == "x"
    }
    if small:
        with path.open("rb") as handle:
            rest = FeaturePlace(place.checksum, small)
            feature.update(read_feature(handle.fileno(), path, "", rest, verify=False))
    return feature


def read_feature(
    descriptor: int, path: Path, key: str, place: FeaturePlace, *, verify: bool
) -> Features:
    """Read one feature from an open shard. Its tensors own their memory.

    Raises:
        DamagedShard: the file ended early, or the bytes differ from those that were written.
    """
    feature: Features = {}
    for tensor in place.tensors:
        buffer = bytearray(tensor.end - tensor.start)
        if os.preadv(descriptor, [buffer], tensor.start) != len(buffer):
            raise DamagedShard(path, "it ends early")
        dtype = _DTYPES[tensor.dtype]
        # torch.frombuffer refuses an empty buffer. The tensor keeps the bytearray alive.
        flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        feature[tensor.name] = flat.reshape(tensor.shape)
    if verify and checksum(key, feature) != place.checksum:
        raise DamagedShard(path, f"feature {key} does not match its checksum")
    return feature
