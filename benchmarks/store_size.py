"""The feature store at many clips: bytes, shards, index and times, measured and extrapolated.

    python benchmarks/store_size.py [--clips 10000] [--target 10000000] [--folder DIR]

Entries of the shapes that the quickstart's encoders make of its 2-second clips are written, with
random values, by one process into a store without a budget; then a second process opens it as a
training run does. Nothing is decoded or encoded. The columns are what was measured, the same a
clip, and the target: all of it grows with the number of clips or of shards. A clip of another model
has other bytes, which ``mmemo encode --dry-run`` forecasts; what is said of the index depends on
the number of features alone.

The script prints one JSON line, and the table as Markdown on standard error. Times are of this
process's computing (``cpu``) and by the clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from mmemo.features.store import FeatureStore, StoreConfig

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "video": {"x": (8, 128)},
    "audio": {"x": (10, 96)},
    "face": {"x": (8, 128), "found": (1,)},
}
"""Tensors of one clip: of the quickstart's encoders in float32; ``found`` says in which
frames a face was found."""


def entry(modality: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.ones(shape, dtype=torch.bool) if name == "found" else torch.randn(shape)
        for name, shape in SHAPES[modality].items()
    }


def key_of(clip: int, modality: str) -> str:
    return f"{clip:028x}{list(SHAPES).index(modality):04x}"


def fill(folder: Path, clips: int, shard_mb: float) -> dict[str, float]:
    """Write the entries of all clips, claiming them as ``mmemo encode`` does."""
    began, computing = time.perf_counter(), time.process_time()
    config = StoreConfig(path=str(folder), budget_gb=None, crops_gb=0, shard_mb=shard_mb)
    with FeatureStore(config) as store:
        for start in range(0, clips, 64):
            chunk = range(start, min(clips, start + 64))
            keys = [(key_of(clip, m), m) for clip in chunk for m in SHAPES]
            store.claim([key for key, _ in keys])
            for key, modality in keys:
                store.put(key, entry(modality))
    return {
        "write_s": time.perf_counter() - began,
        "write_cpu_s": time.process_time() - computing,
    }


def read(folder: Path, clips: int) -> dict[str, float]:
    """Open the store and read a thousand features, in a fresh process."""
    gc.collect()
    before = resident()
    began, computing = time.perf_counter(), time.process_time()
    store = FeatureStore(StoreConfig(path=str(folder), budget_gb=None, crops_gb=0), read_only=True)
    opened, opened_cpu = time.perf_counter() - began, time.process_time() - computing
    memory = resident() - before
    generator = torch.Generator().manual_seed(0)
    wanted = [
        key_of(int(clip), "audio") for clip in torch.randint(clips, (1000,), generator=generator)
    ]
    began = time.perf_counter()
    for key in wanted:
        assert store.get(key) is not None
    taken = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(100):
        store.missing([])
    looked = time.perf_counter() - began
    return {
        "open_s": opened,
        "open_cpu_s": opened_cpu,
        "index_memory": memory,
        "get_ms": taken / len(wanted) * 1000,
        "refresh_ms": looked * 10,
    }


def resident() -> int:
    """Bytes of memory that this process has now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def on_disk(folder: Path) -> dict[str, float]:
    shards = list((folder / "shards").iterdir())
    heads = 0
    for path in shards:
        with path.open("rb") as handle:
            heads += 8 + int.from_bytes(handle.read(8), "little")
    size = sum(path.stat().st_size for path in shards)
    return {"bytes": size, "shards": len(shards), "index_bytes": heads}


def table(found: dict[str, Any], clips: int, target: int) -> str:
    """The measured values, a clip's, and those of the target, as Markdown."""
    from mmemo.features.encode import human_size, human_time  # loads transformers

    rows = [
        ("features", "features", "{:,.0f}".format),
        ("size on disk", "bytes", lambda n: human_size(round(n))),
        ("shards", "shards", "{:,.0f}".format),
        ("headers of the shards (the index)", "index_bytes", lambda n: human_size(round(n))),
        ("memory of the index, each process", "index_memory", lambda n: human_size(round(n))),
        ("opening the store, computing", "open_cpu_s", human_time),
        ("writing, computing of one process", "write_cpu_s", human_time),
    ]
    lines = [f"| | {clips:,} clips | one clip | {target:,} clips |", "| --- | --- | --- | --- |"]
    for title, name, show in rows:
        value = found[name]
        one = value / clips
        each = f"{one * 1e6:.0f} µs" if name.endswith("_s") else f"{one:,.4g}"
        lines.append(f"| {title} | {show(value)} | {each} | {show(one * target)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--target", type=int, default=10_000_000)
    parser.add_argument("--shard-mb", type=float, default=64.0)
    parser.add_argument("--folder", type=Path, help="where to write; it is not removed")
    parser.add_argument("--read", action="store_true", help="only open and read (a child process)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read:
        print(json.dumps(read(options.folder, options.clips)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "features"
        found: dict[str, Any] = {"features": options.clips * len(SHAPES)}
        found |= fill(folder, options.clips, options.shard_mb) | on_disk(folder)
        command = [sys.executable, __file__, "--read", "--folder", str(folder)]
        command += ["--clips", str(options.clips)]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(table(found, options.clips, options.target), file=sys.stderr)
    print(json.dumps({"clips": options.clips, **{k: round(v, 4) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
