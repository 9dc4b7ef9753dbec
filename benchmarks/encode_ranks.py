"""Clips per second of ``mmemo encode`` with one rank and with two, each on a core of its own.

    python benchmarks/encode_ranks.py [--clips 96] [--rounds 3] [--size 256]

Real mp4 files of the synthetic world are decoded and encoded by the quickstart's encoders into an
empty store. One rank, with its decoding worker, is bound to one core; two ranks with theirs are
bound to two. Without that, one rank's worker would use the second core already, and the ratio would
say less about the ranks. The limit is what the machine itself gives: two runs side by side, on a
core and with a store each, of half of the clips. The arms alternate. A time is what the run itself
notes: from hashing the files to the list of bad clips, without the start of Python and of the
model, which two ranks do at the same time.

The script prints one JSON line: clips per second of one rank (``baseline``) and of two (``ours``),
the median ``ratio`` of their times, and that of one rank's and of the two runs' (``limit``). Run it
where nothing else runs.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from feature_store import make_world, stage_values

from mmemo import console
from mmemo.config import parse, save_resolved
from mmemo.features.encode import EncodeConfig
from mmemo.run_log import read_events

MANIFESTS = [f"manifests/train_{tier}.jsonl" for tier in ("attribute", "emotion")]


def write_halves(world: Path) -> list[list[str]]:
    """The manifests of every second clip, and those of the others."""
    clips: dict[str, int] = {}
    halves: list[list[str]] = [[], []]
    for name in MANIFESTS:
        parts: list[list[str]] = [[], []]
        for line in (world / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            clip = next(row[kind][0] for kind in ("videos", "audios", "faces") if row.get(kind))
            parts[clips.setdefault(clip, len(clips)) % 2].append(line)
        for number, part in enumerate(parts):
            halves[number].append(name.replace(".jsonl", f"_half{number}.jsonl"))
            (world / halves[number][-1]).write_text("\n".join(part) + "\n", encoding="utf-8")
    return halves


def write_config(folder: Path, name: str, manifests: Sequence[str] = MANIFESTS) -> Path:
    """An encode config with an empty store, and its file."""
    world = folder / "world"
    values = {
        "output_dir": str(folder / name),
        "model": stage_values()["model"],
        "data": {"manifests": [str(world / path) for path in manifests], "media_root": str(world)},
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


def side_by_side(files: Sequence[Path], cores: Sequence[int]) -> dict[str, float]:
    """Each on a core of its own; the seconds of the slower one."""
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda file, core: encode(file, 1, [core]), files, cores))
    worst = {name: max(run[name] for run in runs) for name in ("seconds", "wall")}
    return {**worst, **{name: sum(run[name] for run in runs) for name in ("clips", "features")}}


def summary(times: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds."""
    one, two, limit = times["one"], times["two"], times["limit"]
    if len({run["features"] for runs in times.values() for run in runs}) > 1:
        raise SystemExit("the arms made different numbers of features")
    clips = one[0]["clips"]
    speed = [clips / statistics.median(run["seconds"] for run in arm) for arm in (one, two)]

    def ratio(arm: Sequence[dict[str, float]], name: str) -> float:
        pairs = zip(one, arm, strict=True)
        return round(statistics.median(a[name] / b[name] for a, b in pairs), 3)

    return {
        "ours": round(speed[1], 2),
        "baseline": round(speed[0], 2),
        "ratio": ratio(two, "seconds"),
        "limit": ratio(limit, "seconds"),
        "wall_ratio": ratio(two, "wall"),
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
    times: dict[str, list[dict[str, float]]] = {"one": [], "two": [], "limit": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_world(folder / "world", options.clips, {"size": options.size, "fps": 25})
        halves = write_halves(folder / "world")
        for number in range(options.rounds):
            for arm in list(times) if number % 2 == 0 else list(times)[::-1]:
                name = f"{arm}-{number}"
                if arm == "limit":
                    files = [write_config(folder, f"{name}-{n}", halves[n]) for n in (0, 1)]
                    times[arm].append(side_by_side(files, cores))
                else:
                    ranks = 1 if arm == "one" else 2
                    times[arm].append(encode(write_config(folder, name), ranks, cores))
                print(f"round {number + 1}: {arm}: {times[arm][-1]}", file=sys.stderr)
    print(json.dumps({**summary(times), "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
