"""Decoding in processes that can be killed.

A decoder may hang, crash or eat the memory on a bad file, and a hung thread cannot be stopped. So
each clip is decoded in one of a few small processes, each driven by one thread here. A process
that fails is killed, the clip is reported, and a fresh process takes the next clip.
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

# Jobs and clips as JSON and raw arrays, for the pipe between a training process and its decoders.
#
# A decoder reads files that nobody has vetted, so what comes back from it is data only: nothing in
# it is run when it is read.

_PLAIN: dict[str, type[errors.MmemoError]] = {"ConfigError": errors.ConfigError}
_TYPES = frozenset({"uint8", "bool", "float32", "float64"})


def send_job(pipe: Connection, job: DecodeJob) -> None:
    """Write one job."""
    fields: dict[str, Any] = {
        "path": str(job.path),
        "name": job.name,
        "want": sorted(job.want),
        "sampling": job.sampling.model_dump(mode="json"),
        "limits": job.limits.model_dump(mode="json"),
        "start": job.start,
        "end": job.end,
        "face_boxes": [asdict(box) for box in job.face_boxes],
    }
    pipe.send_bytes(json.dumps(fields).encode())


def receive_job(pipe: Connection) -> DecodeJob:
    """Read one job. Raises EOFError when the other side has closed."""
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
    """Write a clip, a bad clip, or an error that is no clip's fault."""
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
        MmemoError: the other side sent one, or sent what cannot be read.
    """
    fields = json.loads(pipe.recv_bytes())
    if "bad" in fields:
        return BadClip(*fields["bad"])
    if "error" in fields:
        name, message = fields["error"]
        raise _PLAIN.get(name, errors.MmemoError)(message)
    arrays: dict[str, Any] = {}
    for key, (dtype, *shape) in fields["arrays"].items():
        if dtype not in _TYPES:
            raise errors.MmemoError(f"a decoder sent an array of type {dtype!r}")
        arrays[key] = np.frombuffer(bytearray(pipe.recv_bytes()), dtype=dtype).reshape(shape)
    faces = None
    if fields["face"] is not None:
        parts = {key: arrays.pop(key) for key in ("crops", "found", "scores")}
        faces = FaceTrack(**parts, **fields["face"])
    return DecodedClip(**fields["clip"], **arrays, faces=faces)


_START_SECONDS = 120.0  # for a worker to import what it needs, on a busy machine
_AHEAD = 4  # clips per worker that may be under way or waiting to be taken
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmemo.media.decode_pool import serve; serve(*sys.argv[2:])"
)
# Each worker uses one thread, so that many of them share a machine, and few memory arenas, so
# that the limit on address space is spent on clips.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

Result = DecodedClip | BadClip


class DecodePool:
    """A few decoding processes, started when first needed. Use as a context manager.

    A clip whose worker hangs (``timeout``), dies (``crashed``) or runs out of memory
    (``out_of_memory``) is tried once more in a fresh worker without decord when the backend is
    ``auto``, and is a :class:`BadClip` if that fails too.

    Args:
        limits: number of workers, seconds and memory for one clip.
        target: ``module:function`` from a :class:`DecodeJob` to a :class:`DecodedClip`.
    """

    def __init__(
        self, limits: DecodeConfig, *, target: str = "mmemo.media.decode:decode_guarded"
    ) -> None:
        self._workers = [_Worker(limits, target) for _ in range(limits.workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the warm ones first
        for worker in self._workers:
            self._idle.put(worker)
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="decode")

    def map(self, jobs: Iterable[DecodeJob]) -> Generator[Result]:
        """Decode ``jobs``; results come in their order, whatever the workers' timing.

        A bounded number of clips is decoded ahead of the one that is asked for.

        Raises:
            MmemoError: a worker cannot start, or a job's settings are wrong (no detector file),
                or this is a fork of the process that made the pool.
        """
        if os.getpid() != self._owner:  # a fork has no threads, and would wait for ever
            raise MmemoError("a DecodePool belongs to the process that made it; make one here")
        jobs = iter(jobs)
        waiting: deque[Future[Result]] = deque()
        try:
            for job in islice(jobs, _AHEAD * len(self._workers)):
                waiting.append(self._threads.submit(self._run, job))
            while waiting:
                result = waiting.popleft().result()
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
        """Kill the workers at once. The pool cannot be used afterwards."""
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
        self._words = tempfile.TemporaryFile("ab+")  # noqa: SIM115 - what the process says
        self._closed = False

    def run(self, job: DecodeJob) -> Result:
        """Decode one clip, twice if need be."""
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
        """End the process for good; a thread that waits for it comes back at once."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    def release(self) -> None:
        """Give the files back, when no thread uses this any more."""
        self._stop()
        self._words.close()

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
        self._words.truncate(0)
        ours, theirs = socket.socketpair()
        held, self._lifeline = os.pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(held), self._target]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *arguments, str(self._limits.memory_mb)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            pass_fds=(theirs.fileno(), held),
            env=os.environ | _ENVIRONMENT,
            process_group=0,  # Ctrl-C at the terminal is the parent's affair
        )
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
        words = self._last_words()
        self._stop()
        raise MmemoError(f"a decoding process cannot start: {words}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
            os.close(self._lifeline)
        self._process = self._pipe = None

    def _last_words(self) -> str:
        """How the process ended, and the last line it wrote."""
        if self._process is None:
            return "closed"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        how = f"exit status {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        self._words.seek(max(0, self._words.seek(0, os.SEEK_END) - 2000))
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f"{how}; {lines[-1].strip()[:200]}" if lines else how


def serve(pipe_fd: str, lifeline_fd: str, target: str, memory_mb: str) -> None:
    """The worker process: decode jobs from the pipe until it closes."""
    _die_with_parent(int(lifeline_fd))
    pipe = Connection(int(pipe_fd))
    module, _, name = target.partition(":")
    function: Callable[[DecodeJob], DecodedClip] = getattr(importlib.import_module(module), name)
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

    Nothing is ever written to it, so the only signal is its closing. SIGIO's default is to end
    the process, which works inside a hung decoder too.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


def _limit_memory(memory_mb: int) -> None:
    """Let this process add ``memory_mb`` MiB of address space to what its start has taken."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if not statm.exists():  # address space is not limited outside Linux
        return
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + memory_mb * (1 << 20)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
