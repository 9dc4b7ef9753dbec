"""Call a function that may raise or never return, without letting it stop the run.

A thread cannot be killed in Python. A plain function that overruns its time limit is abandoned: its
daemon thread goes on until the function returns or the process ends, and what it then returns is
dropped. A function that overruns again and again is not called while too many of its threads are
still at work. An ``async`` function is cancelled at its next ``await``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

Problem = Literal["raised", "timeout", "overrun"]
"""``overrun``: not called, because earlier calls still run after their time limit."""

_MOST_ABANDONED = 4
_GRACE = 1.0  # seconds in which an event loop must answer after its call was cancelled


@dataclass(frozen=True, slots=True)
class Outcome:
    """``value`` is what the call returned; ``problem`` is set where it returned nothing."""

    value: Any = None
    problem: Problem | None = None
    detail: str = ""


@dataclass(slots=True)
class Pending:
    """A call that was started. ``started`` is on the monotonic clock, in seconds."""

    result: Future[Any]
    started: float
    refused: bool = False


class Guard:
    """Calls one function, sync or async, under a time limit in seconds."""

    def __init__(self, function: Callable[..., Any], timeout_s: float) -> None:
        self.is_async = _is_async(function)
        self._function = function
        self._timeout = timeout_s
        self._abandoned: list[Future[Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, arguments: Mapping[str, Any]) -> Outcome:
        """Start the call and wait for it."""
        return self.wait(self.start(arguments))

    def start(self, arguments: Mapping[str, Any]) -> Pending:
        """Begin a call; the time limit runs from now."""
        self._abandoned = [result for result in self._abandoned if not result.done()]
        started = time.monotonic()
        if len(self._abandoned) >= _MOST_ABANDONED:
            return Pending(Future(), started, refused=True)
        if not self.is_async:
            return Pending(_in_thread(self._function, arguments), started)
        if self._loop is None:
            self._loop = _new_loop()
        limited = _limited(self._function, arguments, self._timeout)
        return Pending(asyncio.run_coroutine_threadsafe(limited, self._loop), started)

    def wait(self, pending: Pending) -> Outcome:
        """The outcome of a call, at the latest a second after its time limit."""
        if pending.refused:
            detail = f"{_MOST_ABANDONED} earlier calls still run after their time limit"
            return Outcome(problem="overrun", detail=detail)
        grace = _GRACE if self.is_async else 0.0  # an async call ends itself
        left = pending.started + self._timeout + grace - time.monotonic()
        try:
            return Outcome(pending.result.result(timeout=max(0.0, left)))
        except _OverTimeError:
            return Outcome(problem="timeout", detail=self._over())
        except TimeoutError as error:
            if pending.result.done():  # the function's own
                return Outcome(problem="raised", detail=_describe(error))
            self._abandon(pending)
            return Outcome(problem="timeout", detail=self._over())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not pending.result.done():
                raise  # Ctrl-C in the waiting thread
            return Outcome(problem="raised", detail=_describe(error))

    def _abandon(self, pending: Pending) -> None:
        self._abandoned.append(pending.result)
        if self.is_async:  # it blocks its loop: the next call gets a new one
            self._loop = None

    def _over(self) -> str:
        return f"no answer within {self._timeout:g} s"


class _OverTimeError(Exception):
    """Tells our own time limit from a TimeoutError that the function raised."""


async def _limited(
    function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float
) -> Any:
    task = asyncio.ensure_future(function(**arguments))
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        task.cancel()
        raise _OverTimeError
    return task.result()


def _in_thread(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Future[Any]:
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(**arguments))
        except BaseException as error:  # also SystemExit: a reward must not end the run
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="mmemo-reward").start()
    return result


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="mmemo-reward-loop").start()
    return loop


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives a coroutine; looks through partials and ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    called: Any = getattr(function, "__call__", None)  # noqa: B004 - its kind, not its presence
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
