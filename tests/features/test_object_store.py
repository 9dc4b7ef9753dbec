"""A store at a URL: read through a local copy, every byte checked, and never written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mmemo.errors import StoreError
from mmemo.features.ingest import ensure_features
from mmemo.features.store import FeatureStore, StoreConfig, open_store
from mmemo.media.config import DecodeConfig, store_place
from mmemo.run_log import RunRecord
from tests.features.test_store import KEY, features, filled, same
from tests.features.tiny_backbone import TinyBackbone, sample
from tests.media_files import write_clip

URL = "memory://bucket/features"


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Any:
    """A file system of objects, and an empty user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def upload(fs: Any, folder: Path) -> None:
    """As ``aws s3 sync`` does: files, and no empty folders."""
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"/bucket/features/{file.relative_to(folder)}", file.read_bytes())


def opened(**more: Any) -> FeatureStore:
    store = open_store(StoreConfig(path=URL, **more), "runs/x")
    assert store is not None
    return store


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("shards/*"))


def test_shards_are_fetched_when_needed_and_once(tmp_path, remote, monkeypatch):
    filled(tmp_path / "store", 6)
    upload(remote, tmp_path / "store")
    store = opened()
    assert store.stats().features == 6
    assert copies(tmp_path) == []
    assert same(store.get(KEY(3)), features(3))
    assert same(store.get(KEY(2)), features(2))  # of the same shard
    assert len(copies(tmp_path)) == 1
    assert store.get(KEY(9)) is None
    store.close()
    monkeypatch.setattr(type(remote), "get_file", None)
    assert same(opened().get(KEY(3)), features(3))
    assert store_place(StoreConfig(path=URL), "runs/x") == URL


def test_a_small_budget_fetches_again_what_it_evicted(tmp_path, remote):
    filled(tmp_path / "store", 6)
    upload(remote, tmp_path / "store")
    size = max(p.stat().st_size for p in (tmp_path / "store/shards").iterdir())
    store = opened(budget_gb=1.5 * size / 1e9)
    for _ in range(2):
        for number in range(6):
            assert same(store.get(KEY(number)), features(number))
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 1.5 * size


def test_a_damaged_or_short_object_is_one_sentence(tmp_path, remote):
    filled(tmp_path / "store", 2)
    upload(remote, tmp_path / "store")
    (path,) = remote.find("/bucket/features/shards")
    whole = remote.cat_file(path)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5], b""):
        remote.pipe_file(path, damaged)
        with pytest.raises(StoreError, match=r"shard at memory://bucket.*damaged.*copy it there"):
            opened()
    remote.pipe_file(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    store = opened()
    with pytest.raises(StoreError, match=r"does not match its checksum.*copy it there anew"):
        [store.get(KEY(number)) for number in range(2)]
    assert copies(tmp_path) == []
    # Whole and sound, but another shard's bytes.
    filled(tmp_path / "other", 4, per_shard=4)
    (other,) = (tmp_path / "other/shards").iterdir()
    remote.pipe_file(path, other.read_bytes())
    with pytest.raises(StoreError, match="not that of its name"):
        opened().get(KEY(0))


def test_a_damaged_copy_is_fetched_anew(tmp_path, remote):
    filled(tmp_path / "store", 2)
    upload(remote, tmp_path / "store")
    assert same(opened().get(KEY(0)), features(0))
    (path,) = copies(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    store = opened()
    assert same(store.get(KEY(0)), features(0))
    assert same(store.get(KEY(1)), features(1))


@pytest.mark.parametrize("url", ["memory://nowhere", "nosuch://bucket", "memory://bucket/features"])
def test_what_is_no_store_is_one_sentence(remote, url):
    with pytest.raises(
        StoreError, match=rf"{url} cannot be read as a feature store.*check the URL"
    ):
        open_store(StoreConfig(path=url), "runs/x")


def test_a_stage_reads_it_and_what_is_missing_is_refused(tmp_path, remote):
    media = tmp_path / "media"
    for name, tone in (("0.mp4", 200.0), ("1.mp4", 300.0)):
        write_clip(media / name, seconds=0.5, size=(64, 64), tone=tone)
    (media / "page.mp4").write_text("<html>")
    rows = [sample("0.mp4"), sample("page.mp4")]

    def ensure(store: FeatureStore, names: list[Any]) -> Any:
        return ensure_features(
            names,
            TinyBackbone(),
            store,
            media_root=media,
            limits=DecodeConfig(workers=1, max_bad_share=1.0, backend="pyav"),
            record=RunRecord(tmp_path / "out"),
            out_dir=tmp_path / "out",
        )

    with FeatureStore(StoreConfig(path=str(tmp_path / "store"))) as local:
        made = ensure(local, rows)
    upload(remote, tmp_path / "store")
    objects = {path: remote.cat_file(path) for path in remote.find("/bucket")}
    with opened() as store:
        found = ensure(store, rows)
        assert (found.new, found.reused) == (0, made.new)
        assert found.kinds == {"not_media": 1}  # known from there, too
        with pytest.raises(StoreError, match=r"lacks 3 or more .* read only;.*aws s3 sync DIR mem"):
            ensure(store, [*rows, sample("1.mp4")])
        with pytest.raises(StoreError, match="lacks a feature and is read only"):
            store.put(KEY(9), {"x": torch.zeros(1)})
    assert objects == {path: remote.cat_file(path) for path in remote.find("/bucket")}
