"""The processes of a run: how they talk, how they stop, and how they are started.

Everything that ranks must agree on (a stop, a failure, a name, a count) goes through
:class:`Ranks`. Text travels as bytes in tensors: torch's object collectives unpickle what they
receive. :class:`StopRequest` turns SIGTERM and Ctrl-C into a stop between two steps, after a save;
:func:`run_lock` keeps a second run out of a folder; :func:`launch` starts the ranks of this
machine, which may be one of several (:mod:`mmemo.train.nodes`).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState

from mmemo.errors import MmemoError, TrainingError
from mmemo.files import write_whole
from mmemo.train.nodes import LAUNCHED, TIMEOUT, Meeting, interface_to, nodes_of

T = TypeVar("T")

_LIBC = ctypes.CDLL(None)
_GRACE = 15.0
"""Seconds that the other ranks get to end by themselves after one has failed."""


class Ranks:
    """This process among the processes of the run.

    ``rank`` counts from 0 up to ``size``; ``device`` is where the model is. With one process every
    collective returns what it was given at once. ``timeout``: seconds that a rank waits for others.
    """

    def __init__(self, *, cpu: bool = False, timeout: float | None = None) -> None:
        cpu = cpu or not torch.cuda.is_available()
        if cpu:
            # DeepSpeed looks for an accelerator when it is imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
        backend: dict[str, Any] = {"backend": "gloo"} if cpu and in_launch() else {}
        if timeout is not None and in_launch():
            backend["timeout"] = timedelta(seconds=timeout)
        state = PartialState(cpu=cpu, **backend)
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.device: torch.device = state.device or torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with self._waiting():
                dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        # In float32, counts of tokens above 2**24 would be rounded.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._waiting():
            dist.all_reduce(tensor)
            return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one."""
        return self.sum([float(flag)])[0] > 0

    def all_gather_text(self, text: str) -> list[str]:
        """The text of every rank, in rank order."""
        if self.size == 1:
            return [text]
        raw = text.encode()
        length = torch.tensor([len(raw)], dtype=torch.long, device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(lengths, length)
            sizes = [int(item) for item in lengths]
        # all_gather needs equal shapes: every text is padded to the longest.
        mine = torch.zeros(max(*sizes, 1), dtype=torch.uint8, device=self.device)
        if raw:
            mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everyone = [torch.zeros_like(mine) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(everyone, mine)
        return [
            bytes(row[:size].cpu().numpy()).decode()
            for row, size in zip(everyone, sizes, strict=True)
        ]

    def broadcast_text(self, text: str) -> str:
        """The main rank's text, on every rank."""
        return self.all_gather_text(text if self.is_main else "")[0]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite the tensors with the main rank's."""
        if self.size > 1:
            with self._waiting():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over the ranks, in place, in flat buckets.

        A parameter that only some ranks used counts as zero on the others; one that no rank used
        keeps no gradient. This is why DistributedDataParallel is not used: it does not reduce the
        first kind when an earlier micro-batch of the step used it, and rows with different
        modalities cause that all the time.
        """
        if self.size == 1:
            return
        used = torch.tensor(
            [parameter.grad is not None for parameter in parameters], dtype=torch.int32
        ).to(self.device)
        with self._waiting():
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            self._sum_used(parameters, used.tolist())

    def _sum_used(self, parameters: Sequence[torch.nn.Parameter], used: Sequence[int]) -> None:
        bucket: list[torch.Tensor] = []
        for parameter, wanted in zip(parameters, used, strict=True):
            if not wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            # 64 MiB of float32: few collectives, but never a copy of all gradients at once.
            if sum(grad.numel() for grad in bucket) > 1 << 24:
                _reduce(bucket)
                bucket = []
        if bucket:
            _reduce(bucket)

    @contextmanager
    def _waiting(self) -> Generator[None]:
        """Tell in a sentence that another rank has ended or did not come in time."""
        try:
            yield
        except RuntimeError as error:  # torch's DistBackendError is one
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"rank {self.rank} waited for the other ranks in vain, and one of them says why; "
                f"if none does, one needed longer than run.ddp_timeout ({reason})"
            ) from error


def _reduce(bucket: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1).float() for grad in bucket])
    dist.all_reduce(flat)
    for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
        grad.copy_(part.view_as(grad))


def on_all_ranks(
    ranks: Ranks, call: Callable[[], T], kind: type[TrainingError] = TrainingError
) -> T:
    """What ``call`` gives on this rank. An error of mmemo's on one rank is raised on every one,
    since a rank that raised alone would leave the others waiting for it.

    Raises:
        MmemoError: this rank's own.
        TrainingError: another rank's, as ``kind``.
    """
    failure, result = None, None
    try:
        result = call()
    except MmemoError as error:
        failure = error
    told = [text for text in ranks.all_gather_text(str(failure or "")) if text]
    if failure is not None:
        raise failure
    if told:
        raise kind(told[0])
    return cast(T, result)


def in_launch() -> bool:
    """True in a rank that a launcher (ours, or torchrun with or without Slurm) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def handling(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Generator[None]:
    """Set signal handlers and put the old ones back. Does nothing off the main thread."""
    old: dict[signal.Signals, object] = {}
    try:
        for number, handler in handlers.items():
            try:
                old[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread: the owner of the process decides
                break
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


class StopRequest:
    """Remembers SIGTERM or Ctrl-C so that training can end between two steps, after a save.

    Used as a context. Until :meth:`hold` is called there is nothing to save, and a signal ends the
    process at once; a second Ctrl-C always does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._holding = False

    def __enter__(self) -> StopRequest:
        self._handling = handling({signal.SIGTERM: self._on_term, signal.SIGINT: self._on_int})
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handling.__exit__(None, None, None)

    def hold(self, holding: bool = True) -> None:
        """From here on a signal waits for the end of the step; with False it no longer does."""
        self._holding = holding

    @property
    def code(self) -> int:
        """The exit code: 143 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self._holding:
            raise SystemExit(self.code)

    def _on_int(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal == number, number
        if again or not self._holding:
            raise KeyboardInterrupt


@contextmanager
def run_lock(folder: Path, ranks: Ranks) -> Generator[None]:
    """Hold ``folder/run.lock`` on the main rank; the kernel releases it when the process dies.

    It is a POSIX record lock, which child processes do not inherit: no decoding worker that
    outlives the run can keep its folder locked.

    Raises:
        TrainingError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An exclusive record lock needs a file that is open for writing.
    with (folder / "run.lock").open("a") as handle:
        taken = False
        if ranks.is_main:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                taken = True
        if ranks.any(taken):
            raise TrainingError(
                f"{folder}: another run is training here; wait for it or set another output_dir"
            )
        yield


@contextmanager
def exit_code(folder: Path, ranks: Ranks) -> Generator[None]:
    """Keep in ``folder/exit_code`` how the run ended: 0, 143 after SIGTERM, 130 after Ctrl-C, or 1.

    torchrun ends with 1 whatever its ranks ended with, so that a script that requeues a preempted
    run could not tell one that was stopped, and has saved, from one that failed. A killed run
    leaves no file.
    """
    file, code = folder / "exit_code", 1
    if ranks.is_main:
        file.unlink(missing_ok=True)
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        if ranks.is_main:
            write_whole(file, f"{code}\n")


def leave(code: int = 0) -> NoReturn:
    """End a rank that has done its work, at once and without taking the interpreter down.

    Threads of torch sometimes abort a process while its interpreter shuts down, and a run that has
    finished would then count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Why not torch.distributed.run: tried with torch 2.13 (elastic_launch, two ranks, max_restarts=0,
# shutdown_timeout=600), it starts the ranks and forwards SIGTERM and Ctrl-C as we do, but
# - once it has forwarded a signal it drops the ranks' exit codes: ranks whose save failed and that
#   ended with 2 came back as the signal, as if they had stopped with a checkpoint saved;
# - it signals each rank's process group, not the rank: decoding workers died at once, in the middle
#   of the step that the rank was still to finish;
# - killed with SIGKILL it leaves its ranks running, and writing, with no launcher;
# - a second Ctrl-C arrives as SIGTERM, so a rank cannot tell that it should give up its save;
# - after one rank fails the others wait 30 s, which cannot be set, for a peer that is gone.
def launch(
    argv: Sequence[str], processes: int, *, cpu: bool | None = None, timeout: float = TIMEOUT
) -> None:
    """Run ``mmemo ARGV`` in several ranks on this machine and wait for them.

    Where the environment tells of several nodes (:func:`mmemo.train.nodes.nodes_of`), these are the
    ranks of this node, and a node that fails or falls silent ends the others' too.
    The ranks read torchrun's variables, so the same commands work under torchrun. SIGTERM and
    Ctrl-C are passed on once, and the ranks save before they end; they are killed when this process
    is, so that a killed run never leaves ranks behind that still write.

    Args:
        argv: the command line after ``mmemo``.
        processes: how many ranks.
        cpu: run on the CPU; None: where there is no GPU.
        timeout: seconds to wait for the other nodes.

    Raises:
        ConfigError: the environment tells of several nodes, but not enough.
        TrainingError: a rank or another node failed, or a node did not come.
        SystemExit: 143 or 130, when the ranks were stopped by SIGTERM or Ctrl-C.
    """
    if cpu is None:
        cpu = not torch.cuda.is_available()
    together = meeting(timeout)
    if together is not None:
        together.begin()
        if leading():
            together.call(argv, processes)
    command = [sys.executable, "-c", "from mmemo.cli import main; main()", *argv]
    code = run_ranks(command, processes, cpu=cpu, together=together)
    if code in (130, 143):
        raise SystemExit(code)
    if code:
        raise TrainingError(
            f"a rank ended with exit code {code}, for the reason printed above; run the same "
            "command again to go on from what they have saved"
        )


def run_ranks(
    command: Sequence[str], processes: int, *, cpu: bool, together: Meeting | None = None
) -> int:
    """Start ``command`` in each rank of this node and wait; the exit code of the first that failed,
    else 0. Where another node failed it is 1."""
    common = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if cpu else {})}
    count, first, address, port = 1, 0, "127.0.0.1", None
    if together is not None:
        nodes = together.nodes
        count, first, address, port = nodes.count, nodes.rank * processes, nodes.address, nodes.port
        if cpu and (interface := interface_to(address)) is not None:
            common.setdefault("GLOO_SOCKET_IFNAME", interface)
    common |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port or _free_port()),
        "WORLD_SIZE": str(processes * count),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHED: "1",
    }
    parent = os.getpid()
    ranks: list[subprocess.Popen[bytes]] = []
    with _forward_signals(ranks):
        for local in range(processes):
            variables = {**common, "RANK": str(first + local), "LOCAL_RANK": str(local)}
            # A session of its own keeps the terminal's Ctrl-C from reaching ranks twice.
            ranks.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    start_new_session=True,
                    preexec_fn=lambda: die_with(parent),
                )
            )
        code = _wait(ranks, together)
    if together is not None:
        together.tell(code)
        together.end(_GRACE)
    return code


def _wait(ranks: Sequence[subprocess.Popen[bytes]], together: Meeting | None) -> int:
    first, deadline = 0, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if not first and (failed := [code for code in codes if code]):
            first, deadline = failed[0], time.monotonic() + _GRACE
            if together is not None:
                together.tell(128 - first if first < 0 else first)
        if None not in codes:
            # Popen gives -N for a rank that signal N killed, a shell 128 + N.
            return 128 - first if first < 0 else first
        if together is not None and not first and (reason := together.lost()) is not None:
            print(f"{reason}; the ranks of this node end too", file=sys.stderr, flush=True)
            first, deadline = 1, time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


_meetings: list[Meeting] = []
"""The meeting of this process, once it has begun."""
_leads: list[bool] = []
"""Not empty while this process tells the launchers of the other nodes what to start."""


def meeting(timeout: float) -> Meeting | None:
    """This launcher's meeting with those of the other nodes, begun when first asked for; None
    where this is the only node.

    Raises:
        ConfigError: the environment tells of several nodes, but not enough.
        TrainingError: not all came within ``timeout`` seconds.
    """
    nodes = nodes_of(os.environ)
    if nodes.count == 1:
        return None
    if not _meetings:
        _meetings.append(Meeting(nodes, timeout))
    return _meetings[0]


def leading() -> bool:
    """True while :func:`lead` is open."""
    return bool(_leads)


@contextmanager
def lead(timeout: float = TIMEOUT) -> Generator[bool]:
    """For work of several stages (a pipeline), of which only some have ranks: the first node does
    all of it, and the others start their ranks whenever it does. Yields whether this node is to do
    the work; on another it has been done when the context begins.

    Raises:
        TrainingError: a node did not come, or failed.
        SystemExit: 143 or 130, on another node, when the ranks were stopped.
    """
    together = meeting(timeout)
    if together is None:
        yield True
        return
    if together.nodes.rank > 0:
        _follow(together)
        yield False
        return
    _leads.append(True)
    code = 1
    try:
        yield True
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        raise
    finally:
        _leads.clear()
        together.dismiss(code)


def _follow(together: Meeting) -> None:
    while True:
        together.begin()
        called = together.called()
        if isinstance(called, int):
            if called in (130, 143):
                raise SystemExit(called)
            if called:
                raise TrainingError(
                    f"node 0 ended with exit code {called}, for the reason that is printed there; "
                    "start the same command on each node again"
                )
            return
        argv, processes = called
        command = [sys.executable, "-c", "from mmemo.cli import main; main()", *argv]
        run_ranks(command, processes, cpu=not torch.cuda.is_available(), together=together)


@contextmanager
def _forward_signals(ranks: list[subprocess.Popen[bytes]]) -> Generator[None]:
    """Send SIGTERM and SIGINT on to the ranks, which decide what to do about them."""

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with handling({signal.SIGTERM: forward, signal.SIGINT: forward}):
        try:
            yield
        except BaseException:
            for rank in ranks:
                rank.kill()
            raise


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        # 1 is PR_SET_PDEATHSIG.
        _LIBC.prctl(1, signal.SIGKILL)
        # The parent may have died before the call, and then no signal comes any more.
        if os.getppid() != parent:
            os._exit(137)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
