"""Workers are real processes, and really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.sample import FaceBox
from mmemo.errors import ConfigError, MmemoError
from mmemo.media import decode_pool
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob, FaceTrack
from mmemo.media.config import DecodeConfig, FaceConfig, SamplingConfig
from mmemo.media.decode import decode
from mmemo.media.decode_pool import DecodePool
from tests.media_files import write_clip

TARGET = "tests.media.decode_targets:act"
LIMITS = DecodeConfig(workers=2, timeout=2.5, memory_mb=512, backend="pyav")


def job(name: str, limits: DecodeConfig = LIMITS) -> DecodeJob:
    return DecodeJob(Path(name), name, frozenset({"video"}), SamplingConfig(), limits)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(LIMITS, target=TARGET) as pool:
        yield pool


def pid(result: DecodedClip | BadClip) -> int:
    assert isinstance(result, DecodedClip), result
    assert result.times is not None
    return int(result.times[0])


def test_results_come_in_the_order_of_the_jobs(pool: DecodePool) -> None:
    delays = np.random.default_rng(0).permutation(12) / 50
    names = [f"sleep-{delay}" for delay in delays]
    results = list(pool.map(job(name) for name in names))
    assert [r.name if isinstance(r, DecodedClip) else r.path for r in results] == names
    assert len({pid(r) for r in results}) == 2  # both workers took part


@pytest.mark.parametrize(
    ("name", "kind", "detail"),
    [
        ("sleep", "timeout", "within 2.5 s"),
        ("hang", "timeout", "within 2.5 s"),  # holds the interpreter: no thread could stop it
        ("segfault", "crashed", "Segmentation fault"),
        ("exit", "crashed", "exit status 3; something to say"),
        ("allocate-4000", "out_of_memory", "memory_mb"),
        ("raise", "crashed", "IndexError: a bug (decode_targets.py:"),
    ],
)
def test_a_failing_clip_is_named_and_the_others_are_unaffected(
    pool: DecodePool, name: str, kind: str, detail: str
) -> None:
    start = time.monotonic()
    results = list(pool.map(job(n) for n in ["a", "b", name, "c", "d", "e"]))
    assert time.monotonic() - start < 30
    bad = results.pop(2)
    assert isinstance(bad, BadClip)
    assert (bad.path, bad.kind) == (name, kind)
    assert detail in bad.detail
    assert [pid(r) > 0 for r in results] == [True] * 5


def test_memory_below_the_limit_may_be_used(pool: DecodePool) -> None:
    (result,) = pool.map([job("allocate-300")])
    assert isinstance(result, DecodedClip)


def test_a_fresh_worker_follows_a_crash() -> None:
    limits = LIMITS.model_copy(update={"workers": 1})
    with DecodePool(limits, target=TARGET) as pool:
        first, second, _, third = pool.map([job("a"), job("b"), job("segfault"), job("c")])
    assert pid(first) == pid(second) != pid(third)


def test_with_backend_auto_a_clip_gets_a_second_chance_without_decord() -> None:
    limits = DecodeConfig(workers=1, timeout=5.0)
    with DecodePool(limits, target=TARGET) as pool:
        once, always = pool.map([job("once", limits), job("segfault", limits)])
    assert isinstance(once, DecodedClip)
    assert isinstance(always, BadClip)
    assert always.kind == "crashed"


def test_wrong_settings_are_no_bad_clip(pool: DecodePool) -> None:
    with pytest.raises(ConfigError, match=r"face\.model must name a file"):
        list(pool.map([job("a"), job("config"), job("b")]))
    assert len(list(pool.map([job("a")]))) == 1  # the pool lives on


def test_workers_are_light(pool: DecodePool) -> None:
    (result,) = pool.map([job("modules")])
    assert isinstance(result, DecodedClip)
    loaded = set(result.digest.split(","))
    assert "mmemo.media.decode_pool" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "sklearn", "pandas", "rich"}


def test_only_a_few_clips_are_decoded_ahead(pool: DecodePool) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[DecodeJob]:
        for number in range(1000):
            taken.append(number)
            yield job("a")

    results = pool.map(jobs())
    next(results)
    time.sleep(0.3)
    assert len(taken) < 20
    results.close()
    assert len(list(pool.map([job("a")] * 3))) == 3  # an abandoned run leaves the pool usable


def test_the_default_target_decodes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    limits = DecodeConfig(workers=1)
    boxes = tuple(FaceBox(i / 12, (8, 8, 80, 80), (30, 40), (60, 40)) for i in range(24))
    real = DecodeJob(
        path,
        "a.mp4",
        frozenset({"video", "audio", "face"}),
        SamplingConfig(face=FaceConfig(detector="boxes")),
        limits,
        0.5,
        1.5,
        boxes,
    )
    with DecodePool(limits) as pool:
        (clip,) = pool.map([real])
    assert isinstance(clip, DecodedClip)
    _same(clip, decode(real))


def _same(one: DecodedClip, two: DecodedClip) -> None:
    for name in ("name", "digest", "duration", "sample_rate"):
        assert getattr(one, name) == getattr(two, name)
    pairs = [(one.frames, two.frames), (one.times, two.times), (one.waveform, two.waveform)]
    assert (one.faces is None) == (two.faces is None)
    if one.faces is not None and two.faces is not None:
        for name in ("crops", "found", "scores"):
            pairs.append((getattr(one.faces, name), getattr(two.faces, name)))
        assert (one.faces.detector, one.faces.colour) == (two.faces.detector, two.faces.colour)
    for left, right in pairs:
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
            assert left.flags.writeable  # torch warns of arrays that are not


@settings(deadline=None)
@given(
    frames=st.none() | st.integers(0, 3),
    samples=st.none() | st.integers(0, 50),
    faces=st.none() | st.integers(0, 3),
    name=st.text(max_size=20),
)
def test_clips_travel_unchanged(
    frames: int | None, samples: int | None, faces: int | None, name: str
) -> None:
    rng = np.random.default_rng(1)
    clip = DecodedClip(
        name=name,
        digest="d",
        duration=0.1 + 0.2,
        frames=None
        if frames is None
        else rng.integers(0, 255, (frames, 4, 6, 3)).astype(np.uint8)[:, ::2],
        times=None if frames is None else rng.random(frames),
        waveform=None if samples is None else rng.random(samples).astype(np.float32),
        sample_rate=8000,
        faces=None
        if faces is None
        else FaceTrack(
            rng.integers(0, 255, (faces, 5, 5, 3)).astype(np.uint8),
            rng.random(faces) > 0.5,
            rng.random(faces).astype(np.float32),
            "boxes",
        ),
    )
    ours, theirs = Pipe()
    decode_pool.send_result(ours, clip)
    back = decode_pool.receive_result(theirs)
    assert isinstance(back, DecodedClip)
    _same(back, clip)


@settings(deadline=None)
@given(
    name=st.text(max_size=20),
    times=st.none() | st.tuples(st.floats(0, 9), st.floats(0, 9)),
    eyes=st.booleans(),
    frames=st.integers(1, 512),
)
def test_jobs_travel_unchanged(
    name: str, times: tuple[float, float] | None, eyes: bool, frames: int
) -> None:
    box = FaceBox(0.1, (1.0, 2.5, 3.0, 4.0), (1.5, 2.0) if eyes else None, (2.5, 2.0))
    sent = DecodeJob(
        Path("/x/y.mp4"),
        name,
        frozenset({"audio", "face"}),
        SamplingConfig(frames=frames, max_side=64),
        DecodeConfig(timeout=7.5),
        *(times or (None, None)),
        (box,),
    )
    ours, theirs = Pipe()
    decode_pool.send_job(ours, sent)
    assert decode_pool.receive_job(theirs) == sent


def test_an_array_type_that_is_none_of_ours_is_refused() -> None:
    ours, theirs = Pipe()
    ours.send_bytes(b'{"clip": {}, "face": null, "arrays": {"frames": ["object", 1]}}')
    with pytest.raises(MmemoError, match="object"):
        decode_pool.receive_result(theirs)


@pytest.mark.parametrize("target", ["tests.media.none:act", "tests.media.decode_targets:none"])
def test_a_worker_that_cannot_start_says_why(target: str) -> None:
    with (
        DecodePool(LIMITS, target=target) as pool,
        pytest.raises(MmemoError, match=r"cannot start: .*none"),
    ):
        list(pool.map([job("a")]))


def test_closing_does_not_wait_for_a_hung_clip(tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"timeout": 60.0})
    pool = DecodePool(limits, target=TARGET)
    results = pool.map([job("a", limits), *[job(f"pid-{tmp_path}/{i}", limits) for i in (0, 1)]])
    next(results)
    workers = [_pid_in(tmp_path / str(i)) for i in (0, 1)]
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_a_closed_pool_leaves_no_files_open() -> None:
    me = psutil.Process()
    before = me.num_fds()
    for _ in range(2):
        with DecodePool(LIMITS, target=TARGET) as pool:
            list(pool.map([job("a"), job("segfault"), job("b")]))
    assert me.num_fds() == before


def test_a_fork_must_make_its_own_pool(pool: DecodePool) -> None:
    ours, theirs = Pipe()
    child = os.fork()
    if child == 0:
        try:
            list(pool.map([job("a")]))
            theirs.send_bytes(b"decoded")
        except MmemoError as error:
            theirs.send_bytes(str(error).encode())
        finally:
            os._exit(0)
    assert ours.poll(20)
    assert b"belongs to the process that made it" in ours.recv_bytes()
    os.waitpid(child, 0)


SCRIPT = """
    from pathlib import Path
    from mmemo.media.clip import DecodeJob
    from mmemo.media.config import DecodeConfig, SamplingConfig
    from mmemo.media.decode_pool import DecodePool

    limits = DecodeConfig(workers=2, timeout=100)
    names = {names!r}
    jobs = [DecodeJob(Path(n), n, frozenset({{"video"}}), SamplingConfig(), limits) for n in names]
    with DecodePool(limits, target={target!r}) as pool:
        for result in pool.map(jobs):
            print("got", flush=True)
"""


def _pid_in(path: Path) -> int:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError("the worker did not start")


def _run(tmp_path: Path, names: list[str]) -> subprocess.Popen[str]:
    """A program of its own that waits for two hung workers; deliberately without a main guard."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(names=names, target=TARGET)))
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _gone(pids: list[int], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not any(psutil.pid_exists(p) for p in pids):
            return True
        time.sleep(0.02)
    return False


def test_ctrl_c_ends_everything_with_one_traceback(tmp_path: Path) -> None:
    names = [f"pid-{tmp_path}/{i}" for i in (0, 1)]
    program = _run(tmp_path, names)
    workers = [_pid_in(tmp_path / str(i)) for i in (0, 1)]
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does
    _, errors = program.communicate(timeout=30)
    assert _gone(workers, 5)
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    names = [f"pid-{tmp_path}/{i}" for i in (0, 1)]
    program = _run(tmp_path, names)
    workers = [_pid_in(tmp_path / str(i)) for i in (0, 1)]
    assert all(psutil.pid_exists(worker) for worker in workers)
    program.kill()
    program.wait()
    assert _gone(workers, 5)
