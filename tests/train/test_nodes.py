"""Which nodes there are, and how their launchers notice one that failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmemo.errors import ConfigError, TrainingError
from mmemo.train import nodes
from mmemo.train.nodes import Meeting, Nodes, first_host, join_slurm, nodes_of

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
}


def test_one_node_where_nothing_is_said() -> None:
    assert nodes_of({}) == Nodes()
    assert nodes_of({"NNODES": "1"}) == Nodes()
    # In a job's own shell, which srun has not started, only this machine works.
    assert nodes_of({"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"}) == Nodes()


def test_torchruns_variables() -> None:
    assert nodes_of(TWO) == Nodes(2, 1, "10.0.0.1", 29500)
    assert nodes_of({**TWO, "MASTER_PORT": "1234"}).port == 1234


def test_slurms_variables() -> None:
    found = nodes_of(STEP)
    assert (found.count, found.rank, found.address) == (2, 1, "gpu07")
    assert found.port == nodes_of({**STEP, "SLURM_NODEID": "0"}).port
    assert found.port != nodes_of({**STEP, "SLURM_JOB_ID": "123457"}).port
    assert nodes_of({**STEP, "MASTER_ADDR": "here", "MASTER_PORT": "7"}).address == "here"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NNODES": "2"}, "NODE_RANK and MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ({**TWO, "NODE_RANK": "2"}, "number the nodes from 0"),
        ({**TWO, "NODE_RANK": "one"}, "NODE_RANK='one' is not a number"),
        ({"NNODES": "0"}, "NNODES='0'"),
        ({**TWO, "MASTER_PORT": "65535"}, "below 65535"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node=1"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
    ],
)
def test_what_is_missing_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nodes_of(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("rack1-n[3,5]-ib,rack2-n1-ib", "rack1-n3-ib"),
        ("a.b.c,d", "a.b.c"),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_task_for_each_gpu_becomes_a_rank() -> None:
    environment = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
    }
    assert join_slurm(environment)
    found = [environment[x] for x in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    assert found == ["8", "6", "2", "4"]
    assert environment["MASTER_ADDR"] == "gpu07"
    assert not join_slurm(dict(environment))  # it is one already
    assert not join_slurm({**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert not join_slurm({})


def free_port() -> int:
    """With a free one after it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def meet(count: int = 2) -> list[Meeting]:
    """The launchers of so many nodes, in threads of this process."""
    port, found = free_port(), dict[int, Meeting]()

    def join(rank: int) -> None:
        found[rank] = Meeting(Nodes(count, rank, port=port), 20)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found.values():
        one.begin()
    return [found[rank] for rank in range(count)]


def test_a_failure_is_seen_by_the_others() -> None:
    first, second, third = meet(3)
    assert first.lost() is second.lost() is None
    third.tell(143)  # stopped, and has saved: the others do so by themselves
    time.sleep(1.1)
    assert second.lost() is None
    second.tell(7)
    time.sleep(1.1)
    assert first.lost() == third.lost() == "node 1 failed with exit code 7"
    for one in (first, second, third):
        one.begin()
    time.sleep(1.1)
    assert first.lost() is None  # the next launch is another


def test_a_silent_node_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SILENCE", 2.0)
    kept: Callable[[Meeting], None] = Meeting._beat  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(Meeting, "_beat", lambda self: None if self.nodes.rank == 1 else kept(self))
    first, second = meet()
    until = time.monotonic() + 10
    while (said := first.lost()) is None and time.monotonic() < until:
        time.sleep(0.2)
    assert said == "node 1 has given no sign of life for 2 s"
    assert second.lost() is None


def test_a_node_that_does_not_come_is_said() -> None:
    with pytest.raises(TrainingError, match=r"not all of 2 nodes came to 127.0.0.1:\d+ within 1 s"):
        Meeting(Nodes(2, 0, port=free_port()), 1)


def test_followers_start_what_the_first_node_starts() -> None:
    first, second = meet()
    first.call(["sft", "a.yaml"], 4)
    assert second.called() == (["sft", "a.yaml"], 4)
    for one in (first, second):
        one.tell(0)
        one.begin()
    told = threading.Thread(target=first.dismiss, args=(143,))
    told.start()
    assert second.called() == 143
    told.join()


BUSY = """
import threading
from mmemo.train import nodes
from tests.train.test_nodes import meet
nodes._BEAT = 0.0
meet()
"""


def test_a_launcher_ends_while_it_beats() -> None:
    """A sign of life may be under way while Python ends."""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")


NODE = """
import sys
from mmemo.train.distributed import meeting, run_ranks
together = meeting(30)
together.begin()
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], 2, cpu=True, together=together))
"""
SHOW = (
    "import os; print(*(os.environ[x] for x in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), flush=True)"
)
WAIT = "import os, time; open(os.environ['HERE'] + os.environ['RANK'], 'w'); time.sleep(60)"


def node(rank: int, port: int, code: str, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "NNODES": "2",
        "NODE_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HERE": f"{folder}/",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", NODE, code], env=environment, **pipes)  # type: ignore


@pytest.mark.distributed
def test_ranks_are_numbered_over_nodes(tmp_path: Path) -> None:
    port = free_port()
    both = [node(rank, port, SHOW, tmp_path) for rank in (0, 1)]
    found = [one.communicate(timeout=100)[0].split("\n") for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sorted(found[0]) == ["", "0 0 4", "1 1 4"]
    assert sorted(found[1]) == ["", "2 0 4", "3 1 4"]


@pytest.mark.distributed
def test_a_killed_node_ends_the_other(tmp_path: Path) -> None:
    port = free_port()
    both = [node(rank, port, WAIT, tmp_path) for rank in (0, 1)]
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    both[0].send_signal(signal.SIGKILL)  # its store is gone with it
    started = time.monotonic()
    _, said = both[1].communicate(timeout=100)
    assert both[1].returncode == 1
    assert "the launcher of node 0 is gone" in said
    assert time.monotonic() - started < 40
    both[0].communicate()
