"""Random state without pickle, and seeds that depend on nothing but the step.

Every micro-batch seeds torch from (seed, step, micro-batch of the step): dropout is the same
whether a step's micro-batches run on one rank or on several, and whether or not the run was
interrupted. The saved states serve whatever else draws random numbers.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def seed_micro_batch(seed: int, step: int, place: int) -> None:
    """Seed torch for the micro-batch at ``place`` of an optimizer step, over all ranks."""
    text = f"{seed}/{step}/{place}".encode()
    value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    # torch.manual_seed formats a traceback for each kind of accelerator, which costs more than
    # the step of a small model.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save(path: Path) -> None:
    """Write the states of python, numpy, torch and each CUDA device."""
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner: dict[str, object] = numpy_state["state"]  # pyright: ignore
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.asarray(inner["key"], dtype=np.int64)),
        "numpy_place": torch.tensor([inner["pos"], numpy_state["has_gauss"]]),  # pyright: ignore
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),  # pyright: ignore
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    save_file(tensors, path)


def restore(path: Path) -> None:
    """Set the states that :func:`save` wrote."""
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    place, has_gauss = tensors["numpy_place"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": place},
            "has_gauss": has_gauss,
            "gauss": float(tensors["numpy_gauss"]),
        }
    )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _optional(value: float | None) -> torch.Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
