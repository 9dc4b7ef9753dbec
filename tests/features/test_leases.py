"""Leases: one holder at a time, whatever dies, stops or wakes up, with and without file locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mmemo.errors import StoreError
from mmemo.features import leases
from mmemo.features.leases import Lease
from mmemo.features.store import FeatureStore, StoreConfig
from tests.features.ingest_child import features_of

KEYS = [f"{number:032x}" for number in range(6)]
EXPIRY = 1.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def elsewhere(monkeypatch):
    """A lease of another machine: its ``flock`` tells nothing, only its beat does."""

    def make(folder: Path) -> Lease:
        lease = Lease(folder, EXPIRY)
        with monkeypatch.context() as patch:
            patch.setattr(leases, "_kernel", lambda: "another machine")
            lease.room()
        return lease

    return make


def silence(lease: Lease) -> None:
    """Let a process stop beating, as one does that is stopped or dead."""
    lease._stop.set()
    time.sleep(2 * EXPIRY / 12)


def until_free(lease: Lease, key: str) -> float:
    began = time.monotonic()
    while key in lease.others():
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    return time.monotonic() - began


def open_at(folder: Path) -> FeatureStore:
    return FeatureStore(StoreConfig(path=str(folder), lease_seconds=EXPIRY))


def held(folder: Path) -> list[str]:
    """The keys in all shards of a store, as often as they are there."""
    from safetensors import safe_open

    found: list[str] = []
    for path in (folder / "shards").iterdir():
        with safe_open(str(path), "pt") as handle:
            found += [name.partition(".")[0] for name in handle.keys()]  # noqa: SIM118
    return sorted(found)


def test_of_several_claimants_at_once_one_wins(tmp_path):
    """On a new store, whose lock is made by whoever comes first."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    start = threading.Barrier(6)
    won: list[str] = []

    def work() -> None:
        lease = Lease(tmp_path / "claims")
        start.wait()
        for key in KEYS:
            won.extend(lease.take([key]))
        for _ in range(50):
            with lease():
                value = int(counter.read_text())
                time.sleep(0)
                counter.write_text(str(value + 1))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "300"
    assert sorted(won) == KEYS


def test_a_look_at_the_others_reads_each_of_them_once(tmp_path, monkeypatch):
    """It is part of every claim, and a process may hold thousands of keys."""
    reads, kept = [], leases._state
    monkeypatch.setattr(leases, "_state", lambda path: reads.append(path) or kept(path))
    both = [Lease(tmp_path), Lease(tmp_path)]
    both[0].take(KEYS[:4])
    both[1].take(KEYS[4:])
    reads.clear()
    found = Lease(tmp_path).others()
    assert set(found) == set(KEYS)
    assert set(found.values()) == {f"pid {os.getpid()} on {socket.gethostname()}"}
    assert sorted(reads) == sorted(lease.own for lease in both)


def test_a_silent_lease_of_another_machine_expires_and_a_slow_one_lives(tmp_path, elsewhere):
    slow, silent, mine = (elsewhere(tmp_path) for _ in range(3))
    assert slow.take(KEYS[:1]) == KEYS[:1]
    assert silent.take(KEYS[1:3]) == KEYS[1:3]
    silence(silent)
    assert mine.take(KEYS) == KEYS[3:]
    assert until_free(mine, KEYS[1]) > EXPIRY / 2
    time.sleep(EXPIRY)
    assert mine.take(KEYS) == KEYS[1:]  # the slow one still has its key
    assert silent.take(KEYS[1:3]) == []  # it learns of its end
    assert silent.lost == set(KEYS[1:3])
    assert silent.take(KEYS) == []
    mine.release(KEYS[1:2])
    assert silent.take(KEYS) == KEYS[1:2]  # under a new lease
    assert silent.lost == set(KEYS[2:3])


def test_who_does_not_listen_hears_no_silence(tmp_path, elsewhere, monkeypatch):
    """A process that was stopped for an hour does not take the others for dead when it wakes."""
    other, mine = elsewhere(tmp_path), elsewhere(tmp_path)
    other.take(KEYS)
    silence(other)
    assert mine.take(KEYS) == []
    now = time.monotonic
    monkeypatch.setattr(leases.time, "monotonic", lambda: now() + 3600)
    assert mine.take(KEYS) == []


def test_the_clocks_of_the_machines_do_not_matter(tmp_path, elsewhere):
    other, mine = elsewhere(tmp_path), elsewhere(tmp_path)
    other.take(KEYS)
    for wrong in (0.0, time.time() + 1e8):  # its files are from 1970, or from the future
        for file in other.own.iterdir():
            os.utime(file, (wrong, wrong))
        assert mine.take(KEYS) == []
    time.sleep(1.5 * EXPIRY)
    assert mine.take(KEYS) == []


def test_a_lease_that_ended_half_way_is_ended_by_the_next(tmp_path, elsewhere):
    dead, mine = elsewhere(tmp_path), elsewhere(tmp_path)
    dead.take(KEYS)
    with dead():
        (dead.own / "0").write_text("half a shard")
        dead.own.rename(dead.own.with_name(f"{dead.session}.ended"))
        # Whoever ended it was killed here, with the store's lock and a shard inside.
        assert mine.take(KEYS) == KEYS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["lock", mine.session])


def test_a_lease_that_ends_in_the_middle_of_a_commit_commits_nothing(
    tmp_path, elsewhere, monkeypatch
):
    """At the worst moment: behind everything that could be checked, just before the rename."""
    late, other = open_at(tmp_path), open_at(tmp_path)
    room = late._make_room

    def stopped(size: int) -> bool:
        late._make_room = room
        other._lease._end(late._lease.own)
        assert other.claim(KEYS) == KEYS
        other.put(KEYS[0], features_of(KEYS[0]))
        other.flush()
        return room(size)

    assert late.claim(KEYS) == KEYS
    late.put(KEYS[0], features_of(KEYS[0], steps=3))  # tells which one is there
    monkeypatch.setattr(late, "_make_room", stopped)
    late.flush()
    late.put(KEYS[1], features_of(KEYS[1]))  # what it had claimed before
    late.flush()
    assert held(tmp_path) == KEYS[:1]
    assert late.get(KEYS[0])["x"].shape == (16, 16)
    other.close()
    assert late.claim(KEYS) == KEYS[1:]
    late.put(KEYS[1], features_of(KEYS[1]))
    late.close()
    assert held(tmp_path) == KEYS[:2]
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["lock"]


def test_features_that_nobody_claimed_survive_the_end_of_a_lease(tmp_path):
    """Training puts what it had to compute again, and claims nothing."""
    store, other = open_at(tmp_path), open_at(tmp_path)
    assert store.claim(KEYS[:1]) == KEYS[:1]
    for key in KEYS[:2]:
        store.put(key, features_of(key))
    other._lease._end(store._lease.own)
    store.flush()
    assert held(tmp_path) == KEYS[1:2]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(leases.fcntl, "flock", unsupported)
    one, two = open_at(tmp_path), open_at(tmp_path)
    assert one.claim(KEYS[:3]) == KEYS[:3]
    assert two.claim(KEYS) == KEYS[3:]
    one.put(KEYS[0], features_of(KEYS[0]))
    one.outcomes.set("a", 1)
    one.flush()
    two.outcomes.refresh()
    assert two.outcomes.get("a") == 1
    assert torch.equal(two.get(KEYS[0])["x"], features_of(KEYS[0])["x"])
    silence(one._lease)
    assert two.wait(KEYS[1:3], timeout=20) == KEYS[1:3]
    assert two.claim(KEYS) == KEYS[1:]


def test_a_shard_that_another_machine_evicted_is_missing_and_no_error(tmp_path, monkeypatch):
    store = open_at(tmp_path)
    store.put(KEYS[0], features_of(KEYS[0]))
    store.flush()

    def stale(*_: object) -> int:
        next((tmp_path / "shards").iterdir()).unlink()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("mmemo.features.shard.os.preadv", stale)
    assert store.get(KEYS[0]) is None
    assert store.stats().damaged == ()


def test_a_lock_that_is_held_or_lost_is_one_sentence(tmp_path, elsewhere, monkeypatch):
    one, two = elsewhere(tmp_path / "claims"), Lease(tmp_path / "claims", EXPIRY)
    monkeypatch.setattr(leases, "_LOCK_TIMEOUT", 0.0)
    with one(), pytest.raises(StoreError, match=rf"locked by pid {os.getpid()} on .* end that"):
        two.take(KEYS)
    (tmp_path / "claims" / "lock" / "token").unlink()
    with pytest.raises(
        StoreError, match=r"is lost; end all processes.*make the empty file .*token"
    ):
        two.take(KEYS)


def test_a_forked_child_has_no_lease(tmp_path):
    lease = Lease(tmp_path)
    lease.take(KEYS)
    child = os.fork()
    if child == 0:
        os._exit(int(bool(lease.mine) or lease.own.exists() or lease.take(KEYS) != []))
    assert os.waitpid(child, 0)[1] == 0
    assert lease.take(KEYS) == KEYS


@pytest.fixture
def writer(tmp_path):
    """A real process that claims and puts all keys, and flushes when told to."""
    job = {"folder": str(tmp_path), "name": "w", "keys": KEYS, "lease_seconds": EXPIRY}
    command = [sys.executable, "-m", "tests.features.ingest_child", "late", json.dumps(job)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    ready = tmp_path / "ready-w"
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def test_a_stopped_writer_that_wakes_up_neither_damages_nor_repeats(tmp_path, writer):
    store = open_at(tmp_path / "store")
    assert store.claim(KEYS) == []
    writer.send_signal(signal.SIGSTOP)
    assert store.wait(KEYS, timeout=60) == KEYS
    assert store.claim(KEYS) == KEYS
    store.put(KEYS[0], features_of(KEYS[0]))
    store.flush()
    (tmp_path / "go").touch()
    writer.send_signal(signal.SIGCONT)
    assert writer.wait(timeout=60) == 0
    assert json.loads((tmp_path / "result-w").read_text()) == {"again": [], "other": 1}
    assert held(tmp_path / "store") == [KEYS[0], "f" * 32]
    for key in KEYS[1:]:
        store.put(key, features_of(key))
    store.close()
    assert held(tmp_path / "store") == [*KEYS, "f" * 32]
    again = open_at(tmp_path / "store")
    for key in KEYS:
        assert torch.equal(again.get(key)["x"], features_of(key)["x"])
    assert again.stats().damaged == ()


def test_a_killed_writer_of_another_machine_expires(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(leases, "_unlocked", lambda _: False)  # no flock tells that it is gone
    store = open_at(tmp_path / "store")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    began = time.monotonic()
    assert store.claim(KEYS) == []
    assert store.wait(KEYS, timeout=60) == KEYS
    assert time.monotonic() - began > EXPIRY / 2
    assert store.claim(KEYS) == KEYS
    assert len(list((tmp_path / "store" / "claims").iterdir())) == 2
