"""Peak bytes of a computation on the CPU: those of the tensors that are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inputs are known by the time that an operation returns one of them.
        for given in tree_leaves((args, kwargs)):
            self._see(given, counted=False)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            self._see(made, counted=True)
        return out

    def _see(self, value: Any, *, counted: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0  # pyright: ignore
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(compute: Callable[[], Any]) -> int:
    """The most bytes that tensors made by ``compute()`` held at once; its inputs do not count."""
    with _Watch() as watch:
        compute()
    return watch.peak
