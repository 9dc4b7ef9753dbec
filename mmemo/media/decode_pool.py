"""Decode clips in worker processes that can be killed.

A decoder may hang, crash or exhaust the memory on a bad file, and a hung thread cannot be stopped.
Each clip is therefore decoded in one of a few small processes, each driven by one thread of this
one. A process that fails is killed, its clip is reported, and a new process takes the next clip.

Jobs and clips cross the pipe as JSON and raw arrays. Workers read files that nobody has vetted, so
what comes back from them is data only, and nothing in it is executed when it is read.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mmemo import errors
from mmemo.data.sample import FaceBox
from mmemo.errors import MediaError, MmemoError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob, FaceTrack
from mmemo.media.config import DecodeConfig, SamplingConfig

_START_SECONDS = 120.0  # for a worker to import its modules on a busy machine
_AHEAD = 4  # clips per worker that are queued, being decoded, or decoded and not yet taken
# Not multiprocessing: its workers import the caller's main module, which then needs a guard.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmemo.media.decode_pool import serve; serve(*sys.argv[2:])"
)
# One thread per worker, because many workers share a machine. Few malloc arenas, because each one
# reserves address space, which memory_mb limits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
_PLAIN: dict[str, type[errors.MmemoError]] = {"ConfigError": errors.ConfigError}
_TYPES = frozenset({"uint8", "bool", "float32", "float64"})

Result = DecodedClip | BadClip


class DecodePool:
    """A pool of decoding processes, started when first needed. Use it as a context manager.

    If a worker hangs (``timeout``), dies (``crashed``) or runs out of memory (``out_of_memory``)
    and the backend is ``auto``, its clip is tried once more in a new worker without decord. A clip
    that fails is a :class:`BadClip`.

    Args:
        limits: the number of workers, and the seconds and memory per clip.
        target: ``module:function`` that turns a :class:`DecodeJob` into a :class:`DecodedClip`.
    """

    def __init__(
        self, limits: DecodeConfig, *, target: str = "mmemo.media.decode:decode_guarded"
    ) -> None:
        self._workers = [_Worker(limits, target) for _ in range(limits.workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # started ones first
        for worker in self._workers:
            self._idle.put(worker)
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="decode")

    def map(self, jobs: Iterable[DecodeJob]) -> Generator[Result]:
        """Decode ``jobs`` in parallel and yield the results in the order of the jobs.

        A bounded number of clips is decoded ahead of the one that is yielded.

        Raises:
            MmemoError: a worker cannot start, a job's settings are wrong (no detector file), or
                this process is a fork of the one that made the pool.
        """
        if os.getpid() != self._owner:  # a fork has no threads and would wait forever
            raise MmemoError(
                "a DecodePool belongs to the process that made it; make a new one after a fork"
            )
        jobs = iter(jobs)
        waiting: deque[Future[Result]] = deque()
        try:
            for job in islice(jobs, _AHEAD * len(self._workers)):
                waiting.append(self._threads.submit(self._run, job))
            while waiting:
                result = waiting.popleft().result()
                # Before the yield, so that workers are busy while the caller uses the result.
                for job in islice(jobs, 1):
                    waiting.append(self._threads.submit(self._run, job))
                yield result
        finally:
            for future in waiting:
                future.cancel()

    def _run(self, job: DecodeJob) -> Result:
        worker = self._idle.get()
        try:
            return worker.run(job)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill the workers immediately. The pool cannot be used afterwards."""
        # Killed first: a thread that waits for a hung worker ends only then.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """The parent's side of one process; used by one thread at a time, killed from any."""

    def __init__(self, limits: DecodeConfig, target: str) -> None:
        self._limits, self._target = limits, target
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lifeline = -1
        self._stderr = tempfile.TemporaryFile("ab+")  # noqa: SIM115 - the stderr of the process
        self._closed = False

    def run(self, job: DecodeJob) -> Result:
        """Decode one clip; a failed one is tried once more, see :class:`DecodePool`."""
        result = self._attempt(job)
        failed = isinstance(result, BadClip) and result.kind in (
            "timeout",
            "crashed",
            "out_of_memory",
        )
        if failed:
            self._stop()
            if job.limits.backend == "auto" and not self._closed:
                limits = job.limits.model_copy(update={"backend": "pyav"})
                result = self._attempt(replace(job, limits=limits))
                if isinstance(result, BadClip):
                    self._stop()
        return result

    def kill(self) -> None:
        """Kill the process for good. A thread that waits for it returns immediately."""
        # The flag is set first, so that a thread that is just starting a process kills it itself.
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    def release(self) -> None:
        """Close the files, once no thread uses this worker."""
        self._stop()
        self._stderr.close()

    def _attempt(self, job: DecodeJob) -> Result:
        pipe = self._pipe or self._start()
        try:
            send_job(pipe, job)
            if not pipe.poll(self._limits.timeout):
                detail = f"was not decoded within {self._limits.timeout:g} s; see timeout"
                return BadClip(job.name, "timeout", detail)
            return receive_result(pipe)
        except (EOFError, OSError):
            return BadClip(job.name, "crashed", f"the decoder died: {self._last_words()}")

    def _start(self) -> Connection:
        if self._closed:
            raise MmemoError("the decoding pool is closed")
        # The last words that are reported must not be those of the process before this one.
        self._stderr.truncate(0)
        ours, theirs = socket.socketpair()
        held, self._lifeline = os.pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(held), self._target]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *arguments, str(self._limits.memory_mb)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=(theirs.fileno(), held),
            env=os.environ | _ENVIRONMENT,
            process_group=0,  # Ctrl-C at the terminal goes to the parent only
        )
        # Without this, the pipe stays open here when the worker dies, and no EOFError is raised.
        theirs.close()
        os.close(held)
        pipe = Connection(ours.detach())
        self._pipe = pipe
        if self._closed:  # closed meanwhile, by the main thread
            self._process.kill()
        try:
            if pipe.poll(_START_SECONDS) and pipe.recv_bytes() == b"ready":
                return pipe
        except (EOFError, OSError):
            pass
        last = self._last_words()
        self._stop()
        raise MmemoError(f"a decoding process cannot start: {last}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
            os.close(self._lifeline)
        self._process = self._pipe = None

    def _last_words(self) -> str:
        """How the process ended, and the last line of its stderr."""
        if self._process is None:
            return "closed"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        how = f"exit status {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"{how}; {lines[-1].strip()[:200]}" if lines else how


def serve(pipe_fd: str, lifeline_fd: str, target: str, memory_mb: str) -> None:
    """Main function of a worker process: decode jobs from the pipe until it closes."""
    # This comes first, because the parent may die while the imports below are running.
    _die_with_parent(int(lifeline_fd))
    pipe = Connection(int(pipe_fd))
    module, _, name = target.partition(":")
    function: Callable[[DecodeJob], DecodedClip] = getattr(importlib.import_module(module), name)
    # The limit is set after the imports, so that memory_mb counts only what decoding takes.
    _limit_memory(int(memory_mb))
    pipe.send_bytes(b"ready")
    try:
        while True:
            job = receive_job(pipe)
            send_result(pipe, _guarded(function, job))
    except (EOFError, ConnectionError):
        return  # the parent is gone


def _guarded(
    function: Callable[[DecodeJob], DecodedClip], job: DecodeJob
) -> DecodedClip | BadClip | MmemoError:
    try:
        return function(job)
    except MediaError as error:
        return BadClip(job.name, error.kind, error.detail)
    except MmemoError as error:
        return error
    except MemoryError:
        return BadClip(job.name, "out_of_memory", "needs more memory than memory_mb allows")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        return BadClip(job.name, "crashed", detail)


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process when the parent's end of ``lifeline`` closes.

    Nothing is ever written to the pipe, so SIGIO is sent only when it closes. The default action of
    SIGIO is to end the process, even inside a hung decoder.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


def _limit_memory(memory_mb: int) -> None:
    """Limit this process to ``memory_mb`` MiB of address space beyond what it uses now."""
    # Crashes of decoders are expected here, and core dumps would fill the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if not statm.exists():  # address space is not limited outside Linux
        return
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + memory_mb * (1 << 20)
    # A soft limit above the hard one is an error.
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def send_job(pipe: Connection, job: DecodeJob) -> None:
    """Write one job to the pipe."""
    fields: dict[str, Any] = {
        "path": str(job.path),
        "name": job.name,
        "want": sorted(job.want),
        "sampling": job.sampling.model_dump(mode="json"),
        "limits": job.limits.model_dump(mode="json"),
        "start": job.start,
        "end": job.end,
        "face_boxes": [asdict(box) for box in job.face_boxes],
        "options": dict(job.options),
    }
    pipe.send_bytes(json.dumps(fields).encode())


def receive_job(pipe: Connection) -> DecodeJob:
    """Read one job from the pipe.

    Raises:
        EOFError: the other side has closed the pipe.
    """
    fields = json.loads(pipe.recv_bytes())
    return DecodeJob(
        path=Path(fields["path"]),
        name=fields["name"],
        want=frozenset(fields["want"]),
        sampling=SamplingConfig.model_validate(fields["sampling"]),
        limits=DecodeConfig.model_validate(fields["limits"]),
        start=fields["start"],
        end=fields["end"],
        face_boxes=tuple(_box(row) for row in fields["face_boxes"]),
        options=fields["options"],
    )


def _box(row: dict[str, Any]) -> FaceBox:
    x0, y0, x1, y1 = row["box"]
    left, right = row["left_eye"], row["right_eye"]
    return FaceBox(
        time=row["time"],
        box=(x0, y0, x1, y1),
        left_eye=None if left is None else (left[0], left[1]),
        right_eye=None if right is None else (right[0], right[1]),
    )


def send_result(pipe: Connection, result: DecodedClip | BadClip | errors.MmemoError) -> None:
    """Write a clip, a bad clip, or an error that is not the clip's fault."""
    if isinstance(result, errors.MmemoError):
        pipe.send_bytes(json.dumps({"error": [type(result).__name__, str(result)]}).encode())
        return
    if isinstance(result, BadClip):
        pipe.send_bytes(json.dumps({"bad": [result.path, result.kind, result.detail]}).encode())
        return
    arrays: dict[str, Any] = {
        "frames": result.frames,
        "times": result.times,
        "waveform": result.waveform,
    }
    clip: dict[str, Any] = {
        "name": result.name,
        "digest": result.digest,
        "duration": result.duration,
        "sample_rate": result.sample_rate,
        "notes": result.notes,
    }
    face: dict[str, str] | None = None
    if result.faces is not None:
        track = result.faces
        arrays |= {"crops": track.crops, "found": track.found, "scores": track.scores}
        face = {"detector": track.detector, "colour": track.colour}
    sent = {key: np.ascontiguousarray(a) for key, a in arrays.items() if a is not None}
    shapes = {key: [array.dtype.name, *array.shape] for key, array in sent.items()}
    pipe.send_bytes(json.dumps({"clip": clip, "face": face, "arrays": shapes}).encode())
    for array in sent.values():
        pipe.send_bytes(array.reshape(-1).view(np.uint8).data)


def receive_result(pipe: Connection) -> DecodedClip | BadClip:
    """Read what :func:`send_result` wrote.

    Raises:
        EOFError: the other side has died.
        MmemoError: the other side sent an error, or an array of an unknown type.
    """
    fields = json.loads(pipe.recv_bytes())
    if "bad" in fields:
        return BadClip(*fields["bad"])
    if "error" in fields:
        name, message = fields["error"]
        # Only listed classes are raised: what a worker sends must not choose what is called here.
        raise _PLAIN.get(name, errors.MmemoError)(message)
    arrays: dict[str, Any] = {}
    for key, (dtype, *shape) in fields["arrays"].items():
        if dtype not in _TYPES:
            raise errors.MmemoError(f"a decoder sent an array of type {dtype!r}")
        # A bytearray makes the array writable; over bytes it would be read-only.
        arrays[key] = np.frombuffer(bytearray(pipe.recv_bytes()), dtype=dtype).reshape(shape)
    faces = None
    if fields["face"] is not None:
        parts = {key: arrays.pop(key) for key in ("crops", "found", "scores")}
        faces = FaceTrack(**parts, **fields["face"])
    fields["clip"]["notes"] = tuple(fields["clip"]["notes"])
    return DecodedClip(**fields["clip"], **arrays, faces=faces)
