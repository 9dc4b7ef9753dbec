"""Which rows each rank sees in each step, and their batches prefetched in a thread.

A plan lists, for each optimizer step, the rows of all ranks and accumulation steps together. A
step's rows are cut into ``accumulation x ranks`` shards in order; rank r takes shards r,
r + ranks, and so on. One rank with accumulation 2 and two ranks with accumulation 1 therefore
train on the same shards, and dropout, which is seeded by the shard, is the same too.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Batch = dict[str, Any]
"""Tensors by name, and ``sample_ids``: the ids of its rows."""


class Data(Protocol):
    """The rows of a run, in batches."""

    def plan(self, epoch: int) -> Sequence[Sequence[int]]:
        """Rows of each optimizer step of an epoch: a pure function of the epoch, equal on every
        rank."""
        ...

    def collate(self, rows: Sequence[int]) -> Batch:
        """One micro-batch. Runs in a background thread: it must draw no global random numbers."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """:class:`Data` that cuts the rows of a step into micro-batches itself, as packing does.

    Where it does not depend on ``shards``, nor does the result of a step on the number of ranks.
    """

    def cut(self, rows: Sequence[int], shards: int) -> list[list[int]]:
        """The rows of each micro-batch of a step, over all ranks; ``shards``: ranks times
        accumulation steps. A pure function, equal on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass.

    ``index`` counts the micro-batches of a step over all ranks. A ``padding`` batch fills up a rank
    that has no rows left in a short last step: it is computed, because the ranks' collectives must
    match, and counts nothing.
    """

    batch: Batch
    index: int
    padding: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """What one rank computes in one optimizer step: the ``batch``-th of its ``epoch``."""

    epoch: int
    batch: int
    micro_batches: list[MicroBatch]


def shards(rows: Sequence[int], count: int) -> list[list[int]]:
    """Cut rows into ``count`` runs whose lengths differ by at most one, longer ones first."""
    size, longer = divmod(len(rows), count)
    cuts = [number * size + min(number, longer) for number in range(count + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(cuts)]


def micro_batches(
    data: Data, rows: Sequence[int], accumulation: int, rank: int, ranks: int
) -> list[MicroBatch]:
    """This rank's micro-batches of the step that trains on ``rows``."""
    count = accumulation * ranks
    cut = data.cut(rows, count) if isinstance(data, Cutting) else shards(rows, count)
    # Ranks take equally many, since their collectives must match.
    cut += [[] for _ in range(-len(cut) % ranks)]
    return [
        # A padding batch repeats a row: any will do, since it counts nothing.
        MicroBatch(data.collate(cut[index] or rows[:1]), index, padding=not cut[index])
        for index in range(rank, len(cut), ranks)
    ]


def optimizer_steps(
    data: Data, accumulation: int, rank: int, ranks: int, epoch: int, batch: int
) -> Iterator[OptimizerStep]:
    """This rank's steps from the ``batch``-th of ``epoch`` on, epoch after epoch without end."""
    while True:
        for number, rows in enumerate(data.plan(epoch)):
            if number >= batch:
                yield OptimizerStep(
                    epoch, number, micro_batches(data, rows, accumulation, rank, ranks)
                )
        epoch, batch = epoch + 1, 0


def pinned(value: Any) -> Any:
    """``value`` with all tensors inside its dicts, lists, tuples and dataclasses pinned."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        items: dict[Any, Any] = value
        return {key: pinned(one) for key, one in items.items()}
    if isinstance(value, list | tuple):
        ones: Sequence[Any] = value
        kind: Any = type(ones)
        return kind(pinned(one) for one in ones)
    if is_dataclass(value) and not isinstance(value, type):
        fields_of = {one.name: pinned(getattr(value, one.name)) for one in fields(value)}
        return replace(value, **fields_of)
    return value


@contextmanager
def prefetch(
    make: Callable[[], Iterator[OptimizerStep]], depth: int, *, pin: bool = False
) -> Generator[Iterator[OptimizerStep]]:
    """The items of ``make()`` in order, collated up to ``depth`` steps ahead in a thread.

    An exception that ``make()`` raises is raised when its turn comes. With ``depth`` 0 there is no
    thread.

    Args:
        pin: put the tensors into pinned memory, from which they are copied to CUDA while it
            computes.
    """
    if depth == 0:
        yield make()
        return
    stop = threading.Event()
    ready: queue.Queue[OptimizerStep | BaseException] = queue.Queue(maxsize=depth)

    def put(item: OptimizerStep | BaseException) -> None:
        # Not a blocking put: nobody takes from the queue any more once the context is left.
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in make():
                put(pinned(item) if pin else item)
                if stop.is_set():
                    return
        # Whatever it is, it is handed over: the consumer would wait for the next item forever.
        except BaseException as error:
            put(error)

    def take() -> Iterator[OptimizerStep]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=fill, name="batches", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join(timeout=30)
