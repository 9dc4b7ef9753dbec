"""Keeps quantized layers on disk, so that a machine quantizes a model once: not once in each of its
ranks, and not at each start.

The file's name is a hash of the layers' weights and of how they are quantized, so it can stand for
no other weights. It is one more copy of the language model in 4 or 8 bits, and may be deleted
whenever no run is starting. The environment variable ``MMEMO_QUANTIZED`` names another folder than
``~/.cache/mmemo/quantized``, and 0 keeps nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmemo.console import errors

Layers = dict[str, nn.Module]

_BETWEEN = "/"
_CHECKSUM = "checksum"
"""Of all tensors. safetensors has none of its own."""


def cache_folder() -> Path | None:
    """Where quantized layers are kept; None: nowhere."""
    given = os.environ.get("MMEMO_QUANTIZED", "")
    if given == "0":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "mmemo" / "quantized"


def made_once(
    linears: Mapping[str, nn.Linear],
    kind: str,
    make: Callable[[], Layers],
    restore: Callable[[nn.Linear, Mapping[str, Tensor]], nn.Module],
) -> Layers:
    """The quantized layers of ``linears``: those on disk, or those that ``make`` makes, which are
    then put there. One process makes them while the others of the machine wait. Where the folder
    cannot be written, a warning says so.

    Args:
        kind: everything beside the weights that decides the values.
        make: quantizes all layers.
        restore: makes one layer of its saved tensors.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    file = folder / f"{_digest(linears, kind)}.safetensors"
    made: Layers = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("a") as lock:
            # The kernel gives it back when the process dies.
            fcntl.lockf(lock, fcntl.LOCK_EX)
            found = _read(file, linears)
            if found is None:
                made = make()
                _write(file, made)
                return made
    except (OSError, SafetensorError) as error:  # a full disk is safetensors' own error
        with suppress(OSError):
            file.with_suffix(".part").unlink(missing_ok=True)
        errors.print(f"quantized layers are not kept in {folder} ({error})")
        return made or make()
    return {name: restore(linear, found[name]) for name, linear in linears.items()}


def _digest(linears: Mapping[str, nn.Linear], kind: str) -> str:
    digest = xxhash.xxh3_128(kind.encode())
    for name, linear in linears.items():
        for part, tensor in linear.state_dict().items():
            digest.update(f"{name}.{part}:{tensor.dtype}:{list(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path, linears: Mapping[str, nn.Linear]) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of each layer; None if they are not there, or are damaged."""
    if not file.exists():
        return None
    try:
        flat = load_file(file)
        checksum = flat.pop(_CHECKSUM, None)
    except (SafetensorError, OSError):
        return None
    if checksum is None or checksum.tolist() != _checksum(flat):
        return None
    found: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    for key, tensor in flat.items():
        name, _, part = key.partition(_BETWEEN)
        if name in found:
            found[name][part] = tensor
    return found if all(found.values()) else None


def _write(file: Path, layers: Layers) -> None:
    flat = {
        f"{name}{_BETWEEN}{part}": tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, tensor in layer.state_dict().items()
    }
    flat[_CHECKSUM] = torch.tensor(_checksum(flat), dtype=torch.uint8)
    part = file.with_suffix(".part")
    save_file(flat, part)
    part.replace(file)


def _checksum(flat: Mapping[str, Tensor]) -> list[int]:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(flat.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return list(digest.digest())
