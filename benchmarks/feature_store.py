"""Clips per second of training with the feature store, compared with decoding and encoding each
time.

    python benchmarks/feature_store.py [--clips 96] [--rounds 5] [--size 256] [--fps 25]

The setting is one process, one thread, real mp4 files of the synthetic world, and the quickstart's
encoders and language model. Three arms alternate over the same batches, one epoch each per round:
the store switched off (every clip is decoded and encoded), a warm store (read from disk with
verified checksums, nothing kept in memory), and features held in memory, which is as fast as any
store could be. A step is collation, forward, backward and an optimizer step on connectors and
language model. The rows are those of the quickstart's three tiers in turn, in its batches. The
clips are small: larger frames take longer to decode and real encoders take longer to run, and both
make the ratio larger.

The script prints one JSON line. ``ours`` and ``baseline`` are in clips per second with their
``ratio``. ``limit`` is the ratio of features in memory to the baseline, and ``share_of_limit`` the
share of it that is reached. Ratios are medians over rounds; ``cpu_ratio`` is by computing time,
which other work on the machine disturbs less. The features of all arms are compared bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from mmemo import console
from mmemo.config import parse, read_yaml
from mmemo.content import find
from mmemo.data.collate import Collator, measure_lengths
from mmemo.data.curriculum import CurriculumConfig, plan_epoch
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.features.ingest import ensure_features
from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.run_log import RunRecord
from mmemo.train.sft import SftObjective, sft_batch
from mmemo.world.config import WorldConfig
from mmemo.world.render import run_world

STAGE = "train_configs/quickstart/attribute.yaml"
ENCODERS = "train_configs/quickstart/encoders.yaml"
TIERS = ("attribute", "expression", "emotion")
ARMS = ("off", "store", "memory")
Say = Callable[[str], None]


def make_world(folder: Path, clips: int, media: dict[str, Any]) -> list[Sample]:
    """A small world. One row per clip, of each tier in turn."""
    size = {
        "train_clips": clips,
        "val_clips": 6,
        "test_clips": 6,
        "train_speakers": 6,
        "val_speakers": 2,
        "test_speakers": 2,
    }
    world = {"output_dir": str(folder), "size": size, "media": media}
    run_world(parse(WorldConfig, world))
    rows: dict[str, dict[str, Sample]] = {}
    for tier in TIERS:
        manifest = folder / "manifests" / f"train_{tier}.jsonl"
        for row in load_samples(DataConfig(manifests=[str(manifest)], media_root=str(folder))):
            path = next(iter(row.media.values())).path
            rows.setdefault(path, {}).setdefault(tier, row)
    chosen = zip(sorted(rows), itertools.cycle(TIERS), strict=False)
    return [rows[path].get(tier) or next(iter(rows[path].values())) for path, tier in chosen]


def stage_values() -> dict[str, Any]:
    """The quickstart's first stage, its encoders with random weights."""
    stage, encoders = (
        read_yaml(find(path), {"run": ".", "seed": "0"}) for path in (STAGE, ENCODERS)
    )
    values: dict[str, Any] = stage["model"]
    for name, tower in encoders["encoders"].items():
        branch = {key: value for key, value in values[name].items() if key != "encoder"}
        parts = {"encoder_config": tower["architecture"], "preprocessor": tower["preprocessor"]}
        values[name] = branch | parts
    return stage


def build(samples: Sequence[Sample]) -> tuple[Loaded, int]:
    """The quickstart's model, its encoders with random weights; and its batch size."""
    stage = stage_values()
    values = stage["model"]
    texts = [turn.text for sample in samples for turn in sample.turns]
    loaded = load_model(parse(ModelConfig, values), texts)
    set_trainable(loaded.model, stage["trainable"])
    return loaded, int(stage["train"]["per_device_train_batch_size"])


class Training:
    """The steps of an SFT stage: collate, forward, backward, optimizer."""

    def __init__(self, loaded: Loaded, samples: Sequence[Sample], batch_size: int) -> None:
        self.loaded, self.samples, self.batch_size = loaded, samples, batch_size
        self.lengths = measure_lengths(samples, loaded.processor)
        learnt = [value for value in loaded.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(learnt, lr=1e-4)

    def epoch(self, source: FeatureSource, number: int) -> tuple[float, float]:
        """Seconds of one epoch by the clock, and of this process's computing."""
        collate, objective = Collator(self.loaded.processor, source), SftObjective()
        plan = plan_epoch(
            self.samples, CurriculumConfig(), self.lengths, self.batch_size, seed=0, epoch=number
        )
        began, computing = time.perf_counter(), time.process_time()
        for rows in plan:
            batch = sft_batch(collate([self.samples[row] for row in rows]))
            objective(self.loaded.model, batch).rows.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began, time.process_time() - computing


def same_features(sources: Sequence[FeatureSource], samples: Sequence[Sample]) -> bool:
    """Whether all sources give the same bits."""
    first, *others = sources
    for sample in samples:
        want = first.get(sample)
        for other in others:
            found = other.get(sample)
            for modality, features in want.items():
                if any(not torch.equal(found[modality][n], x) for n, x in features.items()):
                    return False
    return True


def measure(folder: Path, samples: Sequence[Sample], rounds: int, say: Say) -> dict[str, Any]:
    """Build everything under ``folder``, run the arms in turn, return the JSON values."""
    loaded, batch_size = build(samples)
    backbone = unwrap(loaded.model)
    media_root, limits = folder / "world", DecodeConfig(workers=1, backend="pyav")
    with FeatureStore(StoreConfig(path=str(folder / "features"))) as store:
        report = ensure_features(
            samples,
            backbone,
            store,
            media_root=media_root,
            limits=limits,
            record=RunRecord(folder / "run"),
            out_dir=folder / "run",
        )
        make = [
            FeatureSource(samples, backbone, None, media_root, limits, isolate=False),
            FeatureSource(samples, backbone, store, media_root, limits, memory_mb=0),
            FeatureSource(samples, backbone, store, media_root, limits, memory_mb=1e6),
        ]
        sources = dict(zip(ARMS, make, strict=True))
        same = same_features(make, report.kept)
        training = Training(loaded, report.kept, batch_size)
        for source in reversed(make):  # warm up: allocator, page cache, first steps
            training.epoch(source, 0)
        times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for number in range(rounds):
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                times[arm].append(training.epoch(sources[arm], number))
                say(f"round {number + 1}: {arm} {times[arm][-1][0]:.2f} s")
    return {**summary(times, len(report.kept)), "same_features": same}


def summary(times: dict[str, list[tuple[float, float]]], clips: int) -> dict[str, Any]:
    """Medians over rounds, by the clock; the ratio of computing time beside them."""

    def ratios(clock: int) -> tuple[float, float]:
        found = {
            arm: statistics.median(
                off[clock] / other[clock]
                for off, other in zip(times["off"], times[arm], strict=True)
            )
            for arm in ("store", "memory")
        }
        return found["store"], found["memory"]

    ratio, limit = ratios(0)
    rate = {arm: clips / statistics.median(wall for wall, _ in times[arm]) for arm in ARMS}
    return {
        "ours": round(rate["store"], 2),
        "baseline": round(rate["off"], 2),
        "ratio": round(ratio, 2),
        "limit": round(limit, 2),
        "share_of_limit": round(ratio / limit, 3),
        "unit": "clips/s",
        "clips": clips,
        "rounds": len(times["off"]),
        "cpu_ratio": round(ratios(1)[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--keep", type=Path, help="work in this folder instead of a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console.console.quiet = True  # the JSON line is all of standard output

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        media = {"size": options.size, "fps": options.fps}
        samples = make_world(folder / "world", options.clips, media)
        result = measure(folder, samples, options.rounds, say)
        print(json.dumps({**result, "media": f"{options.size} px, {options.fps} fps, 2 s"}))


if __name__ == "__main__":
    main()
