"""Several real processes on one store: no double work, no wrong tensor, no waiting for the dead."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.media.config import DecodeConfig
from tests.features.ingest_child import features_of
from tests.features.tiny_backbone import TinyBackbone, sample
from tests.media_files import write_clip

KEYS = [f"{number:032x}" for number in range(60)]
CLIPS = [f"{number}.mp4" for number in range(10)]
BAD = ["empty.mp4", "page.mp4"]
LIMITS = DecodeConfig(workers=1, backend="pyav")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number, name in enumerate(CLIPS):
        write_clip(folder / name, seconds=0.5, size=(64, 64), tone=200.0 + 20 * number)
    (folder / "empty.mp4").touch()
    (folder / "page.mp4").write_text("<html>not a clip</html>")
    return folder


@pytest.fixture
def start(tmp_path):
    """Start processes of :mod:`tests.features.ingest_child`; whatever still runs is killed at the
    end."""
    running: list[subprocess.Popen[bytes]] = []

    def run(role: str, name: str, **job) -> subprocess.Popen[bytes]:
        job = {"folder": str(tmp_path), "name": name, **job}
        command = [sys.executable, "-m", "tests.features.ingest_child", role, json.dumps(job)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


def rank(start, media: Path, name: str, number: int = 0, world: int = 1, seconds: float = 0.02):
    return start(
        "rank",
        name,
        media=str(media),
        clips=[*CLIPS[:4], *BAD, *CLIPS[4:]],
        rank=number,
        world=world,
        seconds=seconds,
        shard_mb=0.001,  # a clip's features fill a shard
    )


def until(condition, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def finished(process: subprocess.Popen[bytes], seconds: float = 400.0) -> None:
    assert process.wait(timeout=seconds) == 0  # long: a busy machine starts processes slowly


def encoded(folder: Path, name: str) -> list[str]:
    path = folder / f"encoded-{name}"
    return path.read_text().splitlines() if path.exists() else []


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"result-{name}").read_text())


def check_all_there(folder: Path, media: Path) -> None:
    """Every feature is in the store, undamaged, and equal to one made without a store."""
    store = FeatureStore(StoreConfig(path=str(folder / "store")))
    backbone, plain = TinyBackbone(), TinyBackbone()
    rows = [sample(name) for name in CLIPS]
    with (
        FeatureSource(rows, backbone, store, media, LIMITS) as stored,
        FeatureSource(rows, plain, None, media, LIMITS, isolate=False) as made,
    ):
        for row in rows:
            for modality, features in made.get(row).items():
                assert torch.equal(stored.get(row)[modality]["x"], features["x"])
    assert backbone.encoded == []
    assert store.stats().damaged == ()


def test_ranks_share_the_work_and_agree(tmp_path, media, start):
    ranks = [rank(start, media, str(n), n, 2, seconds=0.1) for n in range(2)]
    for process in ranks:
        finished(process)
    parts = [encoded(tmp_path, str(n)) for n in range(2)]
    assert max(Counter(parts[0] + parts[1]).values()) == 1  # nothing twice
    assert len(parts[0] + parts[1]) == 3 * len(CLIPS)
    assert min(map(len, parts)) >= 3  # both worked
    want = {"kept": [sample(name).sample_id for name in CLIPS], "bad": {"empty": 1, "not_media": 1}}
    assert [result(tmp_path, str(n)) for n in range(2)] == [want, want]
    check_all_there(tmp_path, media)


def test_a_dead_process_holds_nothing(tmp_path, start):
    """Killed with everything claimed and a feature unwritten, while its forked child lives on."""
    holder = start("holder", "holder", keys=KEYS, fork=True)
    until((tmp_path / "ready-holder").exists)
    store = FeatureStore(StoreConfig(path=str(tmp_path / "store")))
    assert store.claim(KEYS) == []
    assert store.wait(KEYS, timeout=0.1) == []
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    child = int((tmp_path / "child").read_text())
    try:
        os.kill(child, 0)  # it is alive, with all that fork gave it
        began = time.monotonic()
        assert store.wait(KEYS, timeout=10) == KEYS
        assert time.monotonic() - began < 2
        assert store.claim(KEYS) == KEYS
        assert store.get(KEYS[0]) is None
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.fault
def test_fillers_without_a_common_launcher_share_too(tmp_path, media, start):
    names = ["a", "b", "c"]
    for process in [rank(start, media, name, seconds=0.05) for name in names]:
        finished(process)
    done = [line for name in names for line in encoded(tmp_path, name)]
    assert len(done) == len(set(done)) == 3 * len(CLIPS)
    assert len({json.dumps(result(tmp_path, name)) for name in names}) == 1
    check_all_there(tmp_path, media)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(4))
def test_killing_one_filler_costs_only_what_it_had_not_written(tmp_path, media, start, seed):
    chance = random.Random(seed)
    victim = rank(start, media, "victim", seconds=0.1)
    until(lambda: len(encoded(tmp_path, "victim")) >= 1 + chance.randrange(8))
    survivor = rank(start, media, "survivor", seconds=0.01)
    time.sleep(chance.random() * 4)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finished(survivor)
    check_all_there(tmp_path, media)
    counts = Counter(encoded(tmp_path, "victim") + encoded(tmp_path, "survivor"))
    assert len(counts) == 3 * len(CLIPS)
    assert max(counts.values()) <= 2


@pytest.mark.fault
def test_a_filler_killed_again_and_again_gets_there(tmp_path, media, start):
    chance = random.Random(7)
    kills = 0
    for attempt in range(20):
        process = rank(start, media, f"try{attempt}", seconds=0.05)
        with suppress(subprocess.TimeoutExpired):
            name = f"try{attempt}"
            until(lambda n=name, p=process: bool(encoded(tmp_path, n)) or p.poll() is not None)
            process.wait(timeout=chance.random() * 0.8 * (1 + attempt / 3))  # slow machines too
        if process.poll() == 0:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    else:
        pytest.fail("no attempt came to the end")
    assert kills >= 2
    check_all_there(tmp_path, media)
    store = tmp_path / "store"
    assert [path.name for path in (store / "claims").iterdir()] == ["lock"]  # nothing is left


@pytest.mark.fault
def test_a_stopped_filler_is_waited_for_and_its_work_is_not_done_twice(tmp_path, media, start):
    stopped = rank(start, media, "stopped", seconds=0.2)
    until(lambda: len(encoded(tmp_path, "stopped")) >= 2)
    stopped.send_signal(signal.SIGSTOP)
    other = rank(start, media, "other", seconds=0.0)
    until(lambda: len(set(encoded(tmp_path, "other"))) >= 3)  # it does what is free
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=10)
    stopped.send_signal(signal.SIGCONT)
    finished(stopped)
    finished(other)
    done = encoded(tmp_path, "stopped") + encoded(tmp_path, "other")
    assert len(done) == len(set(done)) == 3 * len(CLIPS)
    check_all_there(tmp_path, media)


@pytest.mark.fault
def test_readers_never_see_a_wrong_tensor_while_others_write_evict_and_die(tmp_path, start):
    budget = 25_000 / 1e9  # a third of the keys
    job = {"keys": KEYS, "budget_gb": budget, "seconds": 0.0, "once": False}
    readers = [start("reader", f"reader{n}", keys=KEYS) for n in range(2)]
    writers = [start("writer", f"writer{n}", **job) for n in range(2)]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 4)
    chance = random.Random(3)
    for turn in range(5):
        time.sleep(0.5 + chance.random())
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        writers = [writers[1], start("writer", f"more{turn}", **job)]
        shards = tmp_path / "store" / "shards"
        assert sum(_size(path) for path in shards.iterdir()) <= 25_000
        until((tmp_path / f"ready-more{turn}").exists)
    (tmp_path / "stop").touch()
    for process in [*readers, *writers]:
        finished(process)
    for name in ("reader0", "reader1"):
        assert result(tmp_path, name)["found"] > 50
        assert result(tmp_path, name)["damaged"] == []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.fault
def test_writers_in_a_race_make_each_key_once(tmp_path, start):
    job = {"keys": KEYS, "budget_gb": None, "seconds": 0.01, "once": True}
    names = ["a", "b", "c", "d"]
    for process in [start("writer", name, **job) for name in names]:
        finished(process)
    made = [line for n in names for line in (tmp_path / f"made-{n}").read_text().split()]
    assert sorted(made) == KEYS
    store = FeatureStore(StoreConfig(path=str(tmp_path / "store")))
    for key in KEYS:
        found = store.get(key)
        assert found is not None
        assert torch.equal(found["x"], features_of(key)["x"])


@pytest.mark.fault
def test_shards_damaged_under_a_full_store_are_made_again(tmp_path, media, start):
    finished(rank(start, media, "first", seconds=0.0))
    shards = sorted((tmp_path / "store" / "shards").iterdir())
    assert len(shards) > 3
    for number, path in enumerate(shards[:3]):
        data = bytearray(path.read_bytes())
        if number == 0:
            del data[len(data) // 2 :]
        else:
            data[-number * 7] ^= 16
        path.write_bytes(bytes(data))
    shutil.rmtree(tmp_path / "out")
    rows = [sample(name) for name in CLIPS]
    made: list[tuple[str, str]] = []
    damaged: list[str] = []
    # What was read from a shard before its damage showed is made anew by the next reader.
    for _ in range(2):
        store, backbone = FeatureStore(StoreConfig(path=str(tmp_path / "store"))), TinyBackbone()
        with FeatureSource(rows, backbone, store, media, LIMITS) as found:
            for row in rows:
                found.get(row)
        made += backbone.encoded
        damaged += store.stats().damaged
    assert len(damaged) == 3
    assert made
    assert len(made) == len(set(made))
    check_all_there(tmp_path, media)
