"""Clips per second of ``mmemo encode`` with one rank and with two, each on a core of its own.

    python benchmarks/encode_ranks.py [--clips 96] [--rounds 3] [--size 256]

Real mp4 files of the synthetic world are decoded and encoded by the quickstart's encoders into an
empty store. One rank, with its decoding worker, is bound to one core; two ranks with theirs are
bound to two. Without that, one rank's worker would use the second core already, and the ratio would
say less about the ranks. The arms alternate. A time is what the run itself notes: from hashing the
files to the list of bad clips, without the start of Python and of the model, which two ranks do at
the same time.

The script prints one JSON line: clips per second of one rank (``baseline``) and of two (``ours``),
and the median ``ratio`` of their times, which is 2 at best. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from feature_store import make_world, stage_values

from mmemo import console
from mmemo.config import parse, save_resolved
from mmemo.features.encode import EncodeConfig
from mmemo.run_log import read_events


def write_config(folder: Path, name: str) -> Path:
    """An encode config with an empty store, and its file."""
    stage = stage_values()
    manifests = [f"world/manifests/train_{tier}.jsonl" for tier in ("attribute", "emotion")]
    values = {
        "output_dir": str(folder / name),
        "model": stage["model"],
        "data": {
            "manifests": [str(folder / path) for path in manifests],
            "media_root": str(folder / "world"),
        },
        "decode": {"workers": 1, "backend": "pyav"},
        "store": {"path": str(folder / name / "store"), "crops_gb": 0},
    }
    file = folder / f"{name}.yaml"
    save_resolved(parse(EncodeConfig, values), file)
    return file


def encode(file: Path, ranks: int, cores: Sequence[int]) -> dict[str, float]:
    """Run it on as many cores as ranks; clips, features and seconds of the run."""
    command = [sys.executable, "-m", "mmemo.cli", "encode", str(file)]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--processes", str(ranks)],
        check=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:ranks]),
    )
    wall = time.perf_counter() - began
    events = list(read_events(file.with_suffix("") / "events.jsonl"))
    (done,) = (event for event in events if event["kind"] == "ingest")
    total = next((event for event in events if event["kind"] == "encoded"), done)
    return {
        "clips": done["clips"],
        "features": total["new"],
        "seconds": done["seconds"],
        "wall": wall,
    }


def summary(one: Sequence[dict[str, float]], two: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds."""
    if {run["features"] for run in one} != {run["features"] for run in two}:
        raise SystemExit("the arms made different numbers of features")
    clips = one[0]["clips"]
    speed = [clips / statistics.median(run["seconds"] for run in arm) for arm in (one, two)]
    pairs = list(zip(one, two, strict=True))
    return {
        "ours": round(speed[1], 2),
        "baseline": round(speed[0], 2),
        "ratio": round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3),
        "wall_ratio": round(statistics.median(a["wall"] / b["wall"] for a, b in pairs), 3),
        "unit": "clips/s",
        "clips": clips,
        "rounds": len(one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    console.console.quiet = True  # the JSON line is all of standard output
    times: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_world(folder / "world", options.clips, {"size": options.size, "fps": 25})
        for number in range(options.rounds):
            for ranks in (1, 2) if number % 2 == 0 else (2, 1):
                file = write_config(folder, f"{ranks}-{number}")
                times[ranks].append(encode(file, ranks, cores))
                print(f"round {number + 1}: {ranks}: {times[ranks][-1]}", file=sys.stderr)
    print(json.dumps({**summary(times[1], times[2]), "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
