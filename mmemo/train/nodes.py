"""The machines ("nodes") of a run: how a launcher learns of them and notices one that fell.

A run on several nodes is started by the same command on each. The environment says how many there
are and which one this is: ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, as with
torchrun, or Slurm's variables of a step that ``srun`` started.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mmemo.errors import ConfigError, TrainingError

PORT = 29500
"""``MASTER_PORT`` where none is given; torchrun's."""
LAUNCHED = "MMEMO_LAUNCHED"
"""Variable of a rank that mmemo's own launcher has started."""
TIMEOUT = 1800.0
"""Seconds that processes wait for each other by default, as in Hugging Face's ``ddp_timeout``."""
SILENCE = 60.0
"""Seconds without a sign of life after which a node counts as lost."""
_BEAT = 1.0


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a run. ``rank`` is this one, ``address`` and ``port`` are where the first one
    listens for the ranks; the launchers use the port above it."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = PORT


def nodes_of(environment: Mapping[str, str]) -> Nodes:
    """The nodes that the environment tells of; one where it tells of none.

    Raises:
        ConfigError: it names several nodes, but not which one this is or where the first one is.
    """
    if "NNODES" in environment:
        count = _number(environment, "NNODES", least=1)
        if count == 1:
            return Nodes()
        missing = [x for x in ("NODE_RANK", "MASTER_ADDR") if not environment.get(x)]
        if missing:
            raise ConfigError(
                f"NNODES={count} needs {' and '.join(missing)} too; set on each node NODE_RANK (0 "
                f"to {count - 1}) and, everywhere the same, MASTER_ADDR (the address of node 0)"
            )
        rank = _number(environment, "NODE_RANK")
        address, port = environment["MASTER_ADDR"], _port(environment, PORT)
    elif _number(environment, "SLURM_STEP_NUM_NODES", 1) > 1:
        count = _number(environment, "SLURM_STEP_NUM_NODES")
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", count)
        if tasks != count:
            raise ConfigError(
                f"srun started {tasks} tasks on {count} nodes, and each would start its own "
                "processes; use srun --ntasks-per-node=1 with --processes, or leave --processes "
                "out and start one task for each GPU"
            )
        rank = _number(environment, "SLURM_NODEID")
        address, port = _slurm_address(environment), _port(environment, _slurm_port(environment))
    else:
        return Nodes()
    if rank >= count:
        raise ConfigError(f"NODE_RANK={rank}, but NNODES={count}; number the nodes from 0")
    return Nodes(count, rank, address, port)


def join_slurm(environment: MutableMapping[str, str]) -> bool:
    """Become one of the ranks that ``srun`` started, one task for each GPU: set torchrun's
    variables from Slurm's. True if they were set."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks < 2 or "WORLD_SIZE" in environment or "NNODES" in environment:
        return False
    local = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    environment.update(
        {
            "WORLD_SIZE": str(tasks),
            "RANK": str(_number(environment, "SLURM_PROCID")),
            "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
            "LOCAL_WORLD_SIZE": local[0] if local else "1",
            "MASTER_ADDR": _slurm_address(environment),
            "MASTER_PORT": str(_port(environment, _slurm_port(environment))),
        }
    )
    return True


def _number(
    environment: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0
) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}='{text}' is not a number from {least} up; set it right")
    return int(text)


def _port(environment: Mapping[str, str], default: int) -> int:
    found = _number(environment, "MASTER_PORT", default, least=1)
    # The launchers' own store listens on the next one.
    if found > 65534:
        raise ConfigError(f"MASTER_PORT={found}: use one below 65535")
    return found


def _slurm_port(environment: Mapping[str, str]) -> int:
    # Two jobs that share a node must not share a port.
    return 20000 + 2 * (_number(environment, "SLURM_JOB_ID", 0) % 10000)


def _slurm_address(environment: Mapping[str, str]) -> str:
    given = environment.get("MASTER_ADDR")
    return given or first_host(environment.get("SLURM_STEP_NODELIST", ""))


def first_host(hosts: str) -> str:
    """The first host of Slurm's compressed list: ``gpu[07-09,12],cpu1`` begins with ``gpu07``.

    Raises:
        ConfigError: it is no such list.
    """
    found = re.match(
        r"(?P<plain>[^\[\],\s]+)(?:\[(?P<first>\d+)[^\]]*\](?P<rest>[^\[\],\s]*))?", hosts
    )
    if found is None:
        raise ConfigError(f"'{hosts}' is no list of hosts; set MASTER_ADDR to that of node 0")
    return "".join(part or "" for part in found.groups())


def interface_to(address: str, port: int = 9) -> str | None:
    """The network interface that leads to an address (Linux); None if it is not found. Gloo would
    take the one that the host's name stands for, which is often the loopback."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            with contextlib.suppress(OSError):
                # 0x8915 is SIOCGIFADDR; bytes 20 to 24 of its answer are the address.
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)
                if socket.inet_ntoa(answer[20:24]) == mine:
                    return name
    return None


class Meeting:
    """What the launchers of a run tell each other, in a small store that the first node holds.

    Each shows a sign of life every second, says how its ranks ended, and sees when another has
    failed or fallen silent: ranks would wait for a lost peer until their time limit.
    """

    def __init__(self, nodes: Nodes, timeout: float) -> None:
        """Wait until every launcher is there.

        Raises:
            TrainingError: not all came within ``timeout`` seconds.
        """
        self.nodes, self.round = nodes, 0
        self._next = 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}
        limit = timedelta(seconds=timeout)
        try:
            self._store, self._beats = self._open(limit), self._open(limit, own=False)
            self._beats.set(f"beat{nodes.rank}", "0")
            self._store.wait([f"beat{n}" for n in range(nodes.count)], limit)
        except (RuntimeError, OSError) as error:
            raise TrainingError(
                f"node {nodes.rank}: not all of {nodes.count} nodes came to {nodes.address}:"
                f"{nodes.port + 1} within {timeout:.0f} s ({str(error).strip().splitlines()[0]}); "
                "start the same command on each, with its own NODE_RANK, and see that the ports of "
                "node 0 are open"
            ) from error
        # A launcher may be busy for hours between two launches, with a stage of a pipeline.
        self._stop = threading.Event()
        beat = threading.Thread(target=self._beat, daemon=True)
        beat.start()
        # A thread that is inside the store (C++) while Python ends would abort the process. The
        # time limit is for a store whose machine no longer answers.
        atexit.register(lambda: (self._stop.set(), beat.join(timeout=5)))

    def _open(self, limit: timedelta, *, own: bool = True) -> Any:
        from torch.distributed import TCPStore

        nodes = self.nodes
        holds = own and nodes.rank == 0
        return TCPStore(
            nodes.address,
            nodes.port + 1,
            is_master=holds,
            timeout=limit,
            wait_for_workers=False,
        )

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError, OSError):  # the first node has ended
            while not self._stop.wait(_BEAT):
                count += 1
                self._beats.set(f"beat{self.nodes.rank}", str(count))

    def begin(self) -> None:
        """Begin the next launch; every launcher counts them alike."""
        self.round += 1

    def lost(self) -> str | None:
        """Why the ranks of this launch cannot go on, because of another node; or None."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _BEAT
        try:
            for other in self._others():
                ended = self._ended(other)
                if ended:
                    return f"node {other} failed with exit code {ended}"
                told = self._store.get(f"beat{other}")
                before, since = self._seen.get(other, (b"", now))
                self._seen[other] = (told, since if told == before else now)
                if ended is None and now - self._seen[other][1] > SILENCE:
                    return f"node {other} has given no sign of life for {SILENCE:.0f} s"
        except (RuntimeError, OSError):
            return f"the launcher of node 0 is gone ({self.nodes.address})"
        return None

    def tell(self, code: int) -> None:
        """Tell the others how this node's ranks ended."""
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(f"{self.round}/{self.nodes.rank}", str(code))

    def end(self, seconds: float) -> None:
        """Leave the launch. The first node holds the store, and stays until the others have told
        how they ended, for at most so long."""
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError, OSError):
            while self.nodes.rank == 0 and time.monotonic() < until:
                if all(self._ended(other) is not None for other in self._others()):
                    return
                time.sleep(0.1)

    def call(self, argv: Sequence[str], processes: int) -> None:
        """On the first node: have the followers start their ranks of this launch."""
        self._store.set(f"call{self.round}", json.dumps([list(argv), processes]))

    def dismiss(self, code: int) -> None:
        """On the first node: let the followers end."""
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set("dismissed", str(code))
            time.sleep(2 * _BEAT)  # they look every second

    def called(self) -> tuple[list[str], int] | int:
        """On another node: wait for the first one's next launch.

        Returns:
            The command line and number of ranks; or the exit code, once there are no more.

        Raises:
            TrainingError: the first node is gone.
        """
        while True:
            reason = self.lost()
            try:
                if reason is None and self._store.check([f"call{self.round}"]):
                    argv, processes = json.loads(self._store.get(f"call{self.round}"))
                    return argv, processes
                if reason is None and self._store.check(["dismissed"]):
                    return int(self._store.get("dismissed"))
            except (RuntimeError, OSError):
                reason = "the launcher of node 0 is gone"
            if reason is not None:
                raise TrainingError(f"{reason}; start the same command on each node again")
            time.sleep(_BEAT / 2)

    def _others(self) -> list[int]:
        return [n for n in range(self.nodes.count) if n != self.nodes.rank]

    def _ended(self, node: int) -> int | None:
        """How a node's ranks ended in this launch; 0 for those that were stopped and have saved."""
        key = f"{self.round}/{node}"
        if not self._store.check([key]):
            return None
        code = int(self._store.get(key))
        return 0 if code in (130, 143) else code
