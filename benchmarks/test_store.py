"""The benchmarks of the feature store do what they say, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import encode_ranks
import pytest
import store_size


def test_a_small_store_is_measured_and_extrapolated(tmp_path: Path) -> None:
    clips = 100
    found = {"features": 3 * clips, **store_size.fill(tmp_path, clips, shard_mb=0.5)}
    found |= store_size.on_disk(tmp_path) | store_size.read(tmp_path, clips)
    # 8 x 128, 10 x 96 and 8 x 128 float32 values, a byte, and the headers.
    assert found["bytes"] - found["index_bytes"] == clips * (4096 + 3840 + 4096 + 1)
    assert found["shards"] == 3  # 41 clips fill one
    lines = store_size.table(found, clips, 1000 * clips).splitlines()
    assert lines[2].split(" | ")[1:] == ["300", "3", "300,000 |"]
    assert lines[4].split(" | ")[1:] == ["3", "0.03", "3,000 |"]


def test_the_ratio_is_of_the_same_work() -> None:
    one = [{"clips": 8, "features": 24, "seconds": s, "wall": s + 1} for s in (4.0, 8.0, 6.0)]
    two = [{"clips": 8, "features": 24, "seconds": s, "wall": s + 1} for s in (2.0, 5.0, 3.0)]
    times = {"one": one, "two": two, "limit": [{**run, "seconds": 2.0} for run in two]}
    found = encode_ranks.summary(times)
    assert (found["baseline"], found["ours"]) == (1.33, 2.67)
    assert (found["ratio"], found["limit"]) == (2.0, 3.0)
    with pytest.raises(SystemExit, match="different numbers"):
        encode_ranks.summary({**times, "limit": [{**run, "features": 23} for run in two]})


def test_every_clip_is_in_one_half(tmp_path: Path) -> None:
    rows = {
        "attribute": ["a", "b", "a"],
        "emotion": ["b", "c", "a"],
    }
    (tmp_path / "manifests").mkdir()
    for tier, clips in rows.items():
        lines = "".join(json.dumps({"videos": [clip]}) + "\n" for clip in clips)
        (tmp_path / f"manifests/train_{tier}.jsonl").write_text(lines)
    halves = encode_ranks.write_halves(tmp_path)
    found = [
        [json.loads(line)["videos"][0] for line in (tmp_path / name).read_text().splitlines()]
        for half in halves
        for name in half
    ]
    assert found == [["a", "a"], ["c", "a"], ["b"], ["b"]]
