"""A thousand damaged files, memory that must not grow. Minutes; run with ``-m fault``."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode
from mmemo.media.decode_pool import DecodePool
from mmemo.media.probe import file_digest
from tests.media_files import write_clip, write_wav

pytestmark = pytest.mark.fault

KINDS = ("cut", "flip", "zero", "drop", "insert")
SEEDS = 1000


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """``data`` with one kind of damage at a random place."""
    at, length = rng.randrange(len(data)), rng.choice([1, 64, 2048])
    if kind == "cut":
        return data[:at]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    if kind == "drop":
        return data[:at] + data[at + length :]
    if kind == "insert":
        return data[:at] + rng.randbytes(length) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 16])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def sources(folder: Path) -> list[Path]:
    return [
        write_clip(folder / "h264.mp4", fps=25, size=(128, 96)),
        write_clip(folder / "hevc.mp4", codec="libx265"),
        write_clip(folder / "variable.mp4", frame_times=[0, 0.1, 0.3, 0.35, 1.2, 1.9]),
        write_clip(folder / "h264.mkv", fps=25),
        write_clip(folder / "mpeg4.avi", codec="mpeg4"),
        write_clip(folder / "stream.ts"),
        write_clip(folder / "old.flv"),
    ]


def make_job(path: Path, limits: DecodeConfig) -> DecodeJob:
    want = frozenset({"audio"} if path.suffix == ".wav" else {"video", "audio"})
    return DecodeJob(path, path.name, want, SamplingConfig(frames=24), limits)  # type: ignore[arg-type]


def equal(one: DecodedClip, two: DecodedClip) -> bool:
    return all(
        left is right is None
        or (
            left is not None
            and right is not None
            and left.shape == right.shape
            and np.allclose(left, right, atol=1e-4)
        )
        for left, right in ((one.frames, two.frames), (one.waveform, two.waveform))
    )


@pytest.mark.timeout(1200)
def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    """No stall, no crash of the run; every file is either refused by name or decoded."""
    limits = DecodeConfig(workers=2, timeout=20.0, memory_mb=1024)
    rng = random.Random(7)
    whole = [*sources(tmp_path), write_wav(tmp_path / "sound.wav")]
    good = {path.name: decode(make_job(path, limits)) for path in whole}
    jobs: list[DecodeJob] = []
    origin: list[str] = []
    for number in range(SEEDS):
        source = whole[number % len(whole)]
        kind = KINDS[number // len(whole) % len(KINDS)]
        path = tmp_path / f"{number:04}-{kind}{source.suffix}"
        data = changed = source.read_bytes()
        while changed == data:  # zeroing a zero is no damage
            changed = damaged(data, kind, rng)
        path.write_bytes(changed)
        jobs.append(make_job(path, limits))
        origin.append(source.name)
    outcome: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    with DecodePool(limits) as pool:
        for job, source_name, result in zip(jobs, origin, pool.map(jobs), strict=True):
            if isinstance(result, BadClip):
                assert result.path == job.name
                assert result.detail
                outcome[result.kind] += 1
                continue
            same = equal(result, good[source_name])
            outcome["identical" if same else "silent"] += 1
            silent[source_name] += not same
            # What no decoder can see, the digest does.
            assert result.digest == file_digest(job.path) != good[source_name].digest
    print(dict(outcome), dict(silent))
    assert sum(outcome.values()) == SEEDS
    assert outcome["timeout"] == 0
    # MP4 is what the field ships. Decoders alone let a third of such damage pass.
    mp4 = [name for name in origin if name.endswith(".mp4")]
    assert sum(count for name, count in silent.items() if name.endswith(".mp4")) < 0.2 * len(mp4)


@pytest.mark.timeout(1200)
def test_cut_mp4s_never_pass(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    data = path.read_bytes()
    cut = tmp_path / "cut.mp4"
    limits = DecodeConfig(backend="pyav")
    for length in range(0, len(data), 97):
        cut.write_bytes(data[:length])
        with pytest.raises(MediaError) as caught:
            decode(make_job(cut, limits))
        assert caught.value.kind in {"truncated", "empty", "not_media"}, length


@pytest.mark.timeout(1200)
def test_memory_stays_flat_over_hundreds_of_clips(tmp_path: Path) -> None:
    limits = DecodeConfig(workers=1)
    job = make_job(write_clip(tmp_path / "a.mp4", seconds=1, size=(64, 64)), limits)
    me = psutil.Process()
    others = set(me.children())
    with DecodePool(limits) as pool:
        for _ in pool.map([job] * 200):  # allocators settle
            pass
        (worker,) = set(me.children()) - others
        before = (me.memory_info().rss, worker.memory_info().rss)
        for result in pool.map([job] * 600):
            assert isinstance(result, DecodedClip)
        after = (me.memory_info().rss, worker.memory_info().rss)
        assert set(me.children()) - others == {worker}  # the same one all along
    for old, new in zip(before, after, strict=True):
        assert new < 1.05 * old + (4 << 20)


@pytest.mark.timeout(600)
def test_a_clip_too_large_for_the_memory_limit(tmp_path: Path) -> None:
    """A real decode that runs into the limit, not an injected one."""
    path = write_clip(tmp_path / "large.mp4", seconds=1, size=(4096, 2160), audio=False)
    small = write_clip(tmp_path / "small.mp4", seconds=1, audio=False)
    limits = DecodeConfig(workers=1, memory_mb=256)
    jobs = [
        DecodeJob(p, p.name, frozenset({"video"}), SamplingConfig(frames=12), limits)
        for p in (small, path, small)
    ]
    with DecodePool(limits) as pool:
        first, bad, last = pool.map(jobs)
    assert isinstance(first, DecodedClip)
    assert isinstance(last, DecodedClip)
    assert isinstance(bad, BadClip)
    assert bad.kind == "out_of_memory", bad
