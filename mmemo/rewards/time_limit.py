"""Time limits for functions that may raise or never return, so that they cannot stop a run.

Python cannot kill a thread. A plain function that exceeds its time limit is therefore abandoned:
its daemon thread runs on until the function returns or the process ends, and its result is
dropped. While too many abandoned threads of a function are still running, the function is not
called again. An ``async`` function is cancelled at its next ``await``.
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

CallProblem = Literal["raised", "timeout", "overrun"]
"""``overrun``: not called, because earlier calls still run after their time limit."""

_MAX_ABANDONED = 4
_GRACE_S = 1.0  # time for an event loop to answer after its call was cancelled
_THREAD = "mmemo-reward"


@dataclass(frozen=True, slots=True)
class CallResult:
    """``value``: what the call returned. ``problem``: why it returned nothing, None if it did."""

    value: Any = None
    problem: CallProblem | None = None
    detail: str = ""


@dataclass(slots=True)
class Pending:
    """A call under way. ``started``: seconds on the monotonic clock. ``refused``: the function was
    not called, because earlier calls still run."""

    result: Future[Any]
    started: float
    refused: bool = False


class TimeLimitedFunction:
    """A function, sync or async, whose every call has a time limit in seconds."""

    def __init__(self, function: Callable[..., Any], timeout_s: float) -> None:
        self.is_async = _is_async(function)
        self._function = function
        self._timeout = timeout_s
        self._abandoned: list[Future[Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, arguments: Mapping[str, Any]) -> CallResult:
        """Start a call and wait for its result."""
        return self.wait(self.start(arguments))

    def start(self, arguments: Mapping[str, Any]) -> Pending:
        """Start a call; its time limit runs from now."""
        # Calls that have ended since then make room for new ones.
        self._abandoned = [result for result in self._abandoned if not result.done()]
        started = time.monotonic()
        if len(self._abandoned) >= _MAX_ABANDONED:
            return Pending(Future(), started, refused=True)
        if not self.is_async:
            return Pending(_in_thread(self._function, arguments), started)
        # The loop is kept between calls, because a reward's connections and locks belong to it.
        if self._loop is None:
            self._loop = _new_loop()
        limited = _limited(self._function, arguments, self._timeout)
        return Pending(asyncio.run_coroutine_threadsafe(limited, self._loop), started)

    def wait(self, pending: Pending) -> CallResult:
        """The result of a call, at the latest one second after its time limit. Raises nothing that
        the function raises."""
        if pending.refused:
            detail = f"{_MAX_ABANDONED} earlier calls still run after their time limit"
            return CallResult(problem="overrun", detail=detail)
        grace = _GRACE_S if self.is_async else 0.0  # an async call ends itself
        left = pending.started + self._timeout + grace - time.monotonic()
        try:
            return CallResult(pending.result.result(timeout=max(0.0, left)))
        except _OverTimeError:
            return CallResult(problem="timeout", detail=self._timeout_detail())
        except TimeoutError as error:
            if pending.result.done():  # raised by the function itself
                return CallResult(problem="raised", detail=_describe(error))
            self._abandon(pending)
            return CallResult(problem="timeout", detail=self._timeout_detail())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not pending.result.done():
                raise  # Ctrl-C reaches the waiting thread
            return CallResult(problem="raised", detail=_describe(error))

    def _abandon(self, pending: Pending) -> None:
        self._abandoned.append(pending.result)
        if self.is_async:  # it blocks its event loop, so the next call gets a new one
            self._loop = None

    def _timeout_detail(self) -> str:
        return f"no answer within {self._timeout:g} s"


class _OverTimeError(Exception):
    """Distinguishes our own time limit from a TimeoutError that the function raised."""


async def _limited(
    function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float
) -> Any:
    task = asyncio.ensure_future(function(**arguments))
    # asyncio.wait_for would wait until the cancelled task ends, which a task may refuse to do.
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

    # Python joins the threads of a ThreadPoolExecutor at exit, where an abandoned call would hang
    # it.
    threading.Thread(target=run, daemon=True, name=_THREAD).start()
    return result


def running_on() -> bool:
    """Whether a plain function of this process still runs, which was abandoned. Python must not
    shut down then: if the function is inside torch, the process would abort."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="mmemo-reward-loop").start()
    return loop


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` returns a coroutine; looks through partials and ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    called: Any = getattr(function, "__call__", None)  # noqa: B004 - its kind, not its presence
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
