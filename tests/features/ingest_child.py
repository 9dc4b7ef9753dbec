"""A process that uses a store, to be killed: ``python -m tests.features.ingest_child ROLE
JSON``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmemo.features.ingest import ensure_features
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.media.config import DecodeConfig
from mmemo.run_log import RunRecord
from tests.features.tiny_backbone import TinyBackbone, sample

if TYPE_CHECKING:
    from mmemo.models.backbone import Features


def features_of(key: str, steps: int = 16, width: int = 16) -> Features:
    """What the stress roles store under ``key``."""
    generator = torch.Generator().manual_seed(int(key, 16) % 2**31)
    return {"x": torch.randn(steps, width, generator=generator)}


def main(role: str, job: dict[str, Any]) -> None:
    roles = {"rank": rank, "writer": writer, "reader": reader, "holder": holder, "late": late}
    roles[role](job)


def rank(job: dict[str, Any]) -> None:
    """One rank of a stage: fill the store with the clips of ``media``."""
    folder, number, world = Path(job["folder"]), job["rank"], job["world"]
    met = 0

    def barrier() -> None:
        nonlocal met
        met += 1
        (folder / f"barrier-{met}-{number}").touch()
        deadline = time.monotonic() + 120
        while any(not (folder / f"barrier-{met}-{other}").exists() for other in range(world)):
            assert time.monotonic() < deadline, "a rank did not come"
            time.sleep(0.01)

    backbone = TinyBackbone(log=folder / f"encoded-{job['name']}", seconds=job["seconds"])
    with FeatureStore(StoreConfig(path=str(folder / "store"), shard_mb=job["shard_mb"])) as store:
        report = ensure_features(
            [sample(name) for name in job["clips"]],
            backbone,
            store,
            media_root=Path(job["media"]),
            limits=DecodeConfig(workers=1, max_bad_share=1.0, backend="pyav"),
            record=RunRecord(folder / "out", enabled=number == 0),
            out_dir=folder / "out",
            rank=number,
            world_size=world,
            barrier=barrier if world > 1 else lambda: None,
        )
    result = {"kept": [row.sample_id for row in report.kept], "bad": report.kinds}
    (folder / f"result-{job['name']}").write_text(json.dumps(result))


def writer(job: dict[str, Any]) -> None:
    """Claim, make and put every key that nobody else has, again and again until told to stop."""
    folder = Path(job["folder"])
    config = StoreConfig(path=str(folder / "store"), shard_mb=0.003, budget_gb=job["budget_gb"])
    log = (folder / f"made-{job['name']}").open("a", buffering=1)
    with FeatureStore(config) as store:
        (folder / f"ready-{job['name']}").touch()
        while not (folder / "stop").exists():
            mine = store.claim(job["keys"], limit=5)
            for key in mine:
                time.sleep(job["seconds"])
                store.put(key, features_of(key))
                log.write(key + "\n")
            store.flush()
            if not mine:
                left = store.missing(job["keys"])
                if not left and job["once"]:
                    return
                store.wait(left, timeout=0.05)


def reader(job: dict[str, Any]) -> None:
    """Read keys until told to stop; a wrong tensor is a failure, a missing one is not."""
    folder = Path(job["folder"])
    found = 0
    with FeatureStore(StoreConfig(path=str(folder / "store"))) as store:
        (folder / f"ready-{job['name']}").touch()
        while not (folder / "stop").exists():
            for key in job["keys"]:
                features = store.get(key)
                if features is not None:
                    found += 1
                    assert torch.equal(features["x"], features_of(key)["x"]), key
        damaged = store.stats().damaged
    (folder / f"result-{job['name']}").write_text(json.dumps({"found": found, "damaged": damaged}))


def holder(job: dict[str, Any]) -> None:
    """Claim everything and sleep; with ``fork``, a forked child outlives this process."""
    folder = Path(job["folder"])
    store = FeatureStore(StoreConfig(path=str(folder / "store")))
    assert store.claim(job["keys"]) == job["keys"]
    store.put(job["keys"][0], features_of(job["keys"][0]))  # never flushed
    if job["fork"]:
        child = os.fork()
        if child == 0:
            (folder / "child").write_text(str(os.getpid()))
            time.sleep(120)
            os._exit(0)
    (folder / f"ready-{job['name']}").touch()
    time.sleep(120)


def late(job: dict[str, Any]) -> None:
    """Claim and put all keys, wait for ``go``, and only then write them; then a key of its own."""
    folder = Path(job["folder"])
    config = StoreConfig(path=str(folder / "store"), lease_seconds=job["lease_seconds"])
    with FeatureStore(config) as store:
        assert store.claim(job["keys"]) == job["keys"]
        for key in job["keys"]:
            store.put(key, features_of(key))
        (folder / f"ready-{job['name']}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        store.flush()
        again = store.claim(job["keys"])
        store.put("f" * 32, features_of("f" * 32))
        store.flush()
        result = {"again": again, "other": store.stats().written}
    (folder / f"result-{job['name']}").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
