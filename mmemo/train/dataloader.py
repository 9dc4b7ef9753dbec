"""Which rows each rank sees in each step, and their batches made ahead in a thread.

A plan lists, for each optimizer step, the rows of all ranks and accumulation steps together. A
step's rows are cut into ``accumulation x ranks`` pieces in order; rank r takes pieces r,
r + ranks, and so on. One rank with accumulation 2 and two ranks with accumulation 1 therefore
learn from the same pieces.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

Batch = dict[str, Any]
"""Tensors by name, and ``sample_ids``: the ids of its rows."""


class Data(Protocol):
    """What a run trains on."""

    def plan(self, epoch: int) -> Sequence[Sequence[int]]:
        """Rows of each optimizer step of an epoch: a pure function of the epoch, equal on every
        rank."""
        ...

    def collate(self, rows: Sequence[int]) -> Batch:
        """One micro-batch. Runs in a background thread: it must draw no global random numbers."""
        ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. ``place`` counts over all ranks. A ``ghost`` fills up a rank that has no
    rows left in a short last step: it runs so that all ranks do the same work, and counts zero."""

    batch: Batch
    place: int
    ghost: bool


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step of one rank: the ``batch``-th of its ``epoch``."""

    epoch: int
    batch: int
    micros: list[MicroBatch]


def pieces(rows: Sequence[int], count: int) -> list[list[int]]:
    """Cut rows into ``count`` runs whose lengths differ by at most one, longer ones first."""
    size, longer = divmod(len(rows), count)
    cuts = [place * size + min(place, longer) for place in range(count + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(cuts)]


def micros(
    data: Data, rows: Sequence[int], accumulation: int, rank: int, ranks: int
) -> list[MicroBatch]:
    """This rank's forward passes of the step that learns from ``rows``."""
    cut = pieces(rows, accumulation * ranks)
    return [
        MicroBatch(data.collate(cut[place] or rows[:1]), place, ghost=not cut[place])
        for place in range(rank, accumulation * ranks, ranks)
    ]


def work(
    data: Data, accumulation: int, rank: int, ranks: int, epoch: int, batch: int
) -> Iterator[Work]:
    """All steps from one on, without end."""
    while True:
        for number, rows in enumerate(data.plan(epoch)):
            if number >= batch:
                yield Work(epoch, number, micros(data, rows, accumulation, rank, ranks))
        epoch, batch = epoch + 1, 0


@contextmanager
def ahead(make: Callable[[], Iterator[Work]], depth: int) -> Generator[Iterator[Work]]:
    """The items of ``make()`` in order, made up to ``depth`` ahead; what it raises is raised when
    its turn comes."""
    if depth == 0:
        yield make()
        return
    stop = threading.Event()
    made: queue.Queue[Work | BaseException] = queue.Queue(maxsize=depth)

    def put(item: Work | BaseException) -> None:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in make():
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:
            put(error)

    def take() -> Iterator[Work]:
        while True:
            item = made.get()
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
