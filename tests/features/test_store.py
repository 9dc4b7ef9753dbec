"""The store keeps what it is given, to the bit, and never hands out anything else."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mmemo.errors import StoreError
from mmemo.features import store as store_module
from mmemo.features.journal import Journal
from mmemo.features.leases import Lease
from mmemo.features.store import FeatureStore, StoreConfig, open_store

KEY = "{:032x}".format


def features(seed: int, steps: int = 8, width: int = 16, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, width, generator=generator).to(dtype)
    return {"x": x, "found": torch.tensor([seed % 2 == 0, True])}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def make(path: Path, **settings) -> FeatureStore:
    return FeatureStore(StoreConfig(path=str(path), **settings))


def filled(path: Path, count: int = 6, per_shard: int = 2) -> FeatureStore:
    store = make(path)
    for number in range(count):
        store.put(KEY(number), features(number))
        if number % per_shard == per_shard - 1:
            store.flush()
    store.flush()
    return store


def shard_files(path: Path) -> list[Path]:
    return sorted((path / "shards").iterdir())


def test_an_outline_has_the_sizes_and_the_small_tensors(tmp_path: Path) -> None:
    """Also of what is still to be written; and what is damaged is dropped, as by ``get``."""
    store = filled(tmp_path)
    found = store.outline(KEY(3))
    assert found is not None
    assert found["x"].device.type == "meta"
    assert (found["x"].shape, found["x"].dtype) == ((8, 16), torch.float32)
    assert torch.equal(found["found"], features(3)["found"])
    store.put(KEY(9), features(9))
    pending = store.outline(KEY(9))
    assert pending is not None
    assert pending["x"].shape == (8, 16)
    assert store.outline(KEY(10)) is None
    for file in shard_files(tmp_path):
        file.unlink()
    assert store.outline(KEY(3)) is None


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_tensor_comes_back_to_the_bit(tmp_path, dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
    value = {"x": raw.to(dtype), "extra": torch.arange(3)}
    folder = tmp_path / f"{dtype}-{shape}-{seed}"
    with make(folder) as store:
        store.put(KEY(1), value)
    found = make(folder).get(KEY(1))
    assert found is not None
    assert found["x"].dtype == dtype
    assert list(found["x"].shape) == shape
    assert torch.equal(
        found["x"].view(torch.uint8) if shape else found["x"].reshape(1).view(torch.uint8),
        value["x"].view(torch.uint8) if shape else value["x"].reshape(1).view(torch.uint8),
    )


def test_nan_bits_and_views_survive(tmp_path):
    batch = torch.randn(4, 3, 5)
    batch[1, 0, 0] = float("nan")
    with make(tmp_path) as store:
        for row in range(4):
            store.put(KEY(row), {"x": batch[row].t()})  # not contiguous, and sharing one storage
        batch.zero_()  # what is kept is a copy
        kept = store.get(KEY(1))
        assert kept is not None
        assert kept["x"].isnan().sum() == 1
    again = make(tmp_path).get(KEY(1))
    assert again is not None
    assert again["x"].shape == (5, 3)
    assert torch.equal(again["x"].isnan(), kept["x"].isnan())


def test_pending_features_are_seen_by_the_writer_only_until_the_flush(tmp_path):
    writer, reader = make(tmp_path), make(tmp_path)
    writer.put(KEY(1), features(1))
    assert same(writer.get(KEY(1)), features(1))
    assert reader.get(KEY(1)) is None
    writer.flush()
    assert same(reader.get(KEY(1)), features(1))


def test_a_full_shard_is_written_by_itself_and_is_plain_safetensors(tmp_path):
    store = make(tmp_path, shard_mb=0.002)
    for number in range(8):  # 512 bytes each
        store.put(KEY(number), features(number))
    files = shard_files(tmp_path)
    assert len(files) == 2
    with safe_open(str(files[0]), "pt") as handle:
        names = set(handle.keys())
    assert all(name.endswith((".x", ".found")) for name in names)
    assert [path.name for path in tmp_path.glob("claims/*/[0-9]*")] == []


def test_the_same_content_has_the_same_name(tmp_path):
    one, two = filled(tmp_path / "a"), filled(tmp_path / "b")
    assert [f.name for f in shard_files(one.folder)] == [f.name for f in shard_files(two.folder)]


def test_missing_keeps_order_and_counts(tmp_path):
    store = filled(tmp_path, 4)
    assert store.missing([KEY(9), KEY(0), KEY(7), KEY(3)]) == [KEY(9), KEY(7)]
    store.get(KEY(0))
    store.get(KEY(9))
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.features, stats.shards) == (1, 1, 4, 2)
    assert stats.bytes == sum(file.stat().st_size for file in shard_files(tmp_path))


def test_every_flipped_byte_is_caught_or_harmless(tmp_path, capsys):
    """Flip every byte of a shard in turn: never a wrong tensor, and the file is named."""
    filled(tmp_path, 2)
    (path,) = shard_files(tmp_path)
    good = path.read_bytes()
    want = {KEY(number): features(number) for number in range(2)}
    dropped = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(bad))
        store = make(tmp_path)
        for key, value in want.items():
            found = store.get(key)
            assert found is None or same(found, value), f"byte {at}"
        if store.stats().damaged:
            dropped += 1
            assert store.stats().damaged == (str(path),)
            assert not path.exists()
    assert dropped > 0.9 * len(good)
    assert path.name in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_dropped_and_can_be_made_again(tmp_path, share):
    filled(tmp_path, 2)
    (path,) = shard_files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    store = make(tmp_path)
    assert store.missing([KEY(0), KEY(1)]) == [KEY(0), KEY(1)]
    assert store.stats().damaged == (str(path),)
    store.put(KEY(0), features(0))
    store.flush()
    assert same(make(tmp_path).get(KEY(0)), features(0))


def test_damage_after_opening_is_found_at_the_first_read(tmp_path):
    store = filled(tmp_path, 4)
    for path in shard_files(tmp_path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    assert [store.get(KEY(number)) for number in range(4)].count(None) >= 2
    assert store.stats().damaged


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_files_of_others_in_the_folder_are_left_alone(tmp_path, capsys):
    filled(tmp_path, 2)
    shards = tmp_path / "shards"
    (shards / "notes.txt").write_text("hello")
    (shards / "model.safetensors").write_text("weights")
    (shards / f"{'A' * 32}.safetensors").write_text("not hex as we write it")
    (shards / f"{'a' * 32}.safetensors").mkdir()
    (shards / f"{'b' * 32}.safetensors").symlink_to("notes.txt")
    (shards / "mine" / "deep").mkdir(parents=True)
    (shards / "mine" / f"{'c' * 32}.safetensors").write_text("in a subfolder")
    (tmp_path / "claims" / "thesis.json").write_text("{}")
    before = everything(tmp_path)
    store = make(tmp_path, budget_gb=1e-9, shard_mb=0.001)
    assert same(store.get(KEY(0)), features(0))
    assert store.claim([KEY(7)]) == [KEY(7)]
    store.put(KEY(7), features(7))
    store.close()  # evicts what it can: the budget is a byte
    assert store.stats().damaged == ()
    after = everything(tmp_path)
    ours = [path for path in before if path not in after]
    assert [path.parent.name for path in ours] == ["shards"]  # the one shard
    assert all(after[path] == before[path] for path in after if path in before)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("metadata", [{"format": "mmemo-features-2"}, {"format": "pt"}, None])
def test_a_shard_of_another_format_is_ignored_and_kept(tmp_path, metadata):
    filled(tmp_path, 2)
    other = tmp_path / "shards" / f"{'d' * 32}.safetensors"
    save_file({f"{KEY(5)}.x": torch.ones(3)}, other, metadata=metadata)
    data = other.read_bytes()
    store = make(tmp_path, budget_gb=1e-9)
    assert store.get(KEY(5)) is None
    assert store.stats().damaged == ()
    assert store.stats().shards == 1
    store.put(KEY(9), features(9))
    store.flush()
    assert other.read_bytes() == data


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-0.tar").write_text("a data set")
    before = everything(tmp_path)
    for read_only in (False, True):
        config = StoreConfig(path=str(tmp_path))
        with pytest.raises(StoreError, match=r"holds other files.*new or empty folder"):
            FeatureStore(config, read_only=read_only)
    assert everything(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").stats().features == 0


def test_read_only_writes_and_removes_nothing(tmp_path):
    filled(tmp_path / "store", 4)
    first, second = shard_files(tmp_path / "store")
    first.write_bytes(first.read_bytes()[:-1])
    for path in (first, second):
        age(path, 1000)
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    store = FeatureStore(StoreConfig(path=str(tmp_path / "store")), read_only=True)
    assert [store.get(KEY(number)) is None for number in range(4)].count(True) == 2
    assert store.stats().damaged == (str(first),)
    store.close()
    assert (
        FeatureStore(StoreConfig(path=str(tmp_path / "none")), read_only=True).get(KEY(0)) is None
    )
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {path: (s.st_size, s.st_mtime_ns) for path, s in before.items()} == {
        path: (s.st_size, s.st_mtime_ns) for path, s in after.items()
    }


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_shard_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_TOUCH_SECONDS", 0.0)
    filled(tmp_path, 6)
    names = {KEY(n): next(f for f in shard_files(tmp_path) if _holds(f, KEY(n))) for n in range(6)}
    for number in range(6):
        age(names[KEY(number)], 1000 - 100 * number)
    total = sum(file.stat().st_size for file in shard_files(tmp_path))
    store = make(tmp_path, budget_gb=total * 1.01 / 1e9)
    assert store.get(KEY(0)) is not None  # the oldest file, used just now
    store.put(KEY(100), features(100))
    store.flush()
    assert [store.get(KEY(number)) is None for number in range(6)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    assert store.get(KEY(100)) is not None
    assert store.stats().evicted == 2


def _holds(path: Path, key: str) -> bool:
    with safe_open(str(path), "pt") as handle:
        return key in (handle.metadata() or {})


def test_the_budget_is_never_exceeded(tmp_path):
    store = make(tmp_path, shard_mb=0.002, budget_gb=20_000 / 1e9)
    for number in range(200):
        store.put(KEY(number), features(number))
        assert sum(file.stat().st_size for file in shard_files(tmp_path)) <= 20_000
    store.flush()
    stats = store.stats()
    assert stats.bytes <= 20_000
    assert stats.evicted > 100
    assert same(store.get(KEY(199)), features(199))
    assert store.get(KEY(0)) is None


def test_needed_features_are_not_evicted_for_new_ones(tmp_path):
    """An epoch larger than the budget keeps its hits instead of evicting them in a circle."""
    store = make(tmp_path, shard_mb=0.002, budget_gb=20_000 / 1e9)
    keys = [KEY(number) for number in range(100)]
    store.need(keys)
    for epoch in range(3):
        missed = 0
        for number, key in enumerate(keys):
            if store.get(key) is None:
                missed += 1
                store.put(key, features(number))
        store.flush()
        assert store.full
        if epoch:
            assert missed < 100
    assert store.stats().evicted == 0
    assert store.stats().bytes <= 20_000


def test_a_shard_that_is_being_read_is_not_evicted(tmp_path):
    import fcntl

    filled(tmp_path, 2)
    (path,) = shard_files(tmp_path)
    with path.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        store = make(tmp_path, budget_gb=path.stat().st_size * 1.1 / 1e9)
        store.put(KEY(9), features(9))
        store.flush()
        assert path.exists()
        assert store.stats().dropped == 1
    other = make(tmp_path, budget_gb=path.stat().st_size * 1.1 / 1e9)
    other.put(KEY(9), features(9))
    other.flush()
    assert not path.exists()
    assert other.get(KEY(9)) is not None


def test_an_index_that_is_behind_finds_evicted_shards_gone(tmp_path):
    behind = filled(tmp_path, 2)
    (path,) = shard_files(tmp_path)
    path.unlink()
    assert behind.has(KEY(0))
    assert behind.get(KEY(0)) is None
    assert not behind.has(KEY(0))


def test_claims_are_disjoint_and_end_with_flush_release_and_close(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    keys = [KEY(number) for number in range(6)]
    assert one.claim(keys, limit=2) == keys[:2]
    assert two.claim(keys) == keys[2:]
    assert one.claim(keys) == keys[:2]  # its own
    one.put(keys[0], features(0))
    one.flush()
    assert two.claim(keys) == keys[2:]  # 0 is stored, 1 is being computed
    one.release([keys[1]])
    assert two.claim(keys) == keys[1:]
    two.close()
    assert one.claim(keys) == keys[1:]


def test_wait_returns_when_the_other_process_is_done(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    one.claim([KEY(1), KEY(2)])
    assert two.wait([KEY(1)], timeout=0.05) == []
    one.put(KEY(1), features(1))
    one.flush()
    assert two.wait([KEY(1), KEY(2)], timeout=5) == [KEY(1)]
    assert same(two.get(KEY(1)), features(1))


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.*set store\.path"):
        make(tmp_path / "file")


def test_a_full_disk_names_path_and_size(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    store = make(tmp_path)
    store.put(KEY(1), features(1))
    monkeypatch.setattr("mmemo.features.shard.save_file", full)
    with pytest.raises(StoreError, match=r"shards cannot take a shard of 514 bytes.*No space"):
        store.flush()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("claims/*/[0-9]*")] == []
    store.flush()  # what was pending is still there
    assert same(make(tmp_path).get(KEY(1)), features(1))


def test_open_store_is_beside_the_run_or_off(tmp_path):
    store = open_store(StoreConfig(), tmp_path / "runs" / "sft")
    assert store is not None
    assert store.folder == tmp_path / "runs" / "features"
    assert open_store(StoreConfig(enabled=False), tmp_path) is None


def test_journals_share_survive_torn_lines_and_compact(tmp_path):
    lock = Lease(tmp_path / "claims")
    path = tmp_path / "map.jsonl"
    one, two = Journal(path, lock), Journal(path, lock)
    one.set("a", {"n": 1})
    one.flush()
    assert two.get("a") is None
    two.refresh()
    assert two.get("a") == {"n": 1}
    with path.open("a") as handle:
        handle.write('["torn", {"n"')  # a writer was killed here
    two.set("b", [1, 2])
    two.flush()
    assert Journal(path, lock).get("b") == [1, 2]
    for number in range(2500):
        one.set("a", number)
        one.flush()
    assert len(path.read_text().splitlines()) < 1500
    two.refresh()
    assert (two.get("a"), two.get("b")) == (2499, [1, 2])
    assert all(isinstance(json.loads(line), list) for line in path.read_text().splitlines())


def test_a_journal_takes_entries_while_it_is_flushed(tmp_path):
    """A thread that reads ahead notes digests while another one flushes."""
    journal = Journal(tmp_path / "map.jsonl", Lease(tmp_path / "claims"))
    stop = threading.Event()
    failures: list[Exception] = []

    def flush() -> None:
        try:
            while not stop.is_set():
                journal.flush()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    for number in range(5000):
        journal.set(str(number), number)
    stop.set()
    thread.join()
    journal.flush()
    assert failures == []
    again = Journal(tmp_path / "map.jsonl", Lease(tmp_path / "claims"))
    assert [again.get(str(number)) for number in range(5000)] == list(range(5000))
