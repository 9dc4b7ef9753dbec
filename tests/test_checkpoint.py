"""A checkpoint is whole or is not there: every byte, every point of death, every full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo import checkpoint
from mmemo.errors import CheckpointError


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(text.encode() * 50)
        (folder / "shards").mkdir()
        (folder / "shards" / "rank-0.bin").write_bytes(text.encode() * 9)

    return write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path / f"checkpoint-{step}", writer(f"at {step} "), meta={"step": step})
    return tmp_path


def test_a_saved_folder_is_what_was_written(run: Path) -> None:
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.meta) == (30, {"step": 30})
    assert set(found.checkpoint.files) == {"weights.safetensors", "shards/rank-0.bin"}
    assert found.refused == []
    assert sorted(p.name for p in run.iterdir()) == [f"checkpoint-{n}" for n in (10, 20, 30)]


@pytest.mark.parametrize("name", ["weights.safetensors", "shards/rank-0.bin", "manifest.json"])
@settings(max_examples=20)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoint.save(run / f"checkpoint-{step}", writer(str(step)))
    path = run / "checkpoint-2" / name
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(raw))
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert str(path) in str(found.refused[0])


@pytest.mark.parametrize("name", ["weights.safetensors", "shards/rank-0.bin", "manifest.json"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused_by_name(run: Path, name: str, keep: float) -> None:
    path = run / "checkpoint-30" / name
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.verify(path.parents[name.count("/")])
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 20


def test_missing_added_and_linked_files_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-30" / "weights.safetensors").unlink()
    (run / "checkpoint-20" / "extra.bin").write_bytes(b"x")
    secret = tmp_path / "elsewhere"
    secret.write_bytes(b"at 10 " * 9)
    shard = run / "checkpoint-10" / "shards" / "rank-0.bin"
    shard.unlink()
    shard.symlink_to(secret)
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is None
    assert [str(e).split(":")[0].rpartition("/")[2] for e in found.refused] == [
        "weights.safetensors",
        "extra.bin",
        "rank-0.bin",
    ]
    assert checkpoint.verify(run / "checkpoint-20", extra_ok=True).step == 20


def test_only_exact_names_count(run: Path) -> None:
    os.rename(run / "checkpoint-30", run / "checkpoint-30-backup")
    (run / "checkpoint-40.tmp-123").mkdir()
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 20
    assert found.refused == []


def test_the_sweep_takes_leftovers_and_nothing_else(run: Path) -> None:
    for name in ("checkpoint-40.tmp-77", "final.tmp-9-old", "notes.tmp"):
        (run / name).mkdir()
    (run / "data.tmp-1").write_text("a file")
    assert {p.name for p in checkpoint.sweep(run)} == {"checkpoint-40.tmp-77", "final.tmp-9-old"}
    assert (run / "notes.tmp").exists()
    assert (run / "data.tmp-1").exists()
    assert checkpoint.sweep(run / "not-there") == []


def test_pruning_never_counts_a_newer_refused_checkpoint(run: Path) -> None:
    (run / "checkpoint-30" / "manifest.json").write_text("{}")
    removed = checkpoint.prune(run, newest=20, keep=1)
    assert [p.name for p in removed] == ["checkpoint-10"]
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 20
    assert checkpoint.prune(run, newest=20, keep=None) == []


def test_saving_over_a_damaged_folder_replaces_it_and_over_an_equal_one_keeps_it(run: Path) -> None:
    (run / "checkpoint-30" / "weights.safetensors").write_bytes(b"damage")
    checkpoint.save(run / "checkpoint-30", writer("at 30 "), meta={"step": 30})
    assert checkpoint.verify(run / "checkpoint-30").meta == {"step": 30}
    before = (run / "checkpoint-30").stat().st_ino
    checkpoint.save(run / "checkpoint-30", writer("at 30 "), meta={"step": 30})
    assert (run / "checkpoint-30").stat().st_ino == before
    assert len(list(run.iterdir())) == 3


DIES = """
import os, sys
from pathlib import Path
from mmemo import checkpoint

point, folder = int(sys.argv[1]), Path(sys.argv[2])
count = 0
def die_at(real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == point:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call

def write(staged):
    for name in ("a.bin", "b.bin"):
        descriptor = os.open(staged / name, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"new " * 100)
        os.close(descriptor)

real_open = Path.open
for name in ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink"):
    setattr(os, name, die_at(getattr(os, name)))
checkpoint.sha256 = die_at(checkpoint.sha256)
checkpoint.save(folder / "checkpoint-2", write, meta={"n": 2})
checkpoint.prune(folder, newest=2, keep=1)
print("points", count)
"""


def die_at(point: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Save in a forked child that kills itself before its ``point``-th operation."""
    return subprocess.run(
        [sys.executable, "-c", DIES, str(point), str(folder)], capture_output=True, text=True
    )


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_dying_before_any_operation_of_a_save_leaves_old_or_new(tmp_path: Path) -> None:
    done = die_at(0, tmp_path / "count")
    points = int(done.stdout.split()[-1])
    assert points > 15
    outcomes: set[tuple[int, ...]] = set()
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        checkpoint.save(folder / "checkpoint-1", lambda f: _old(f), meta={"n": 1})
        died = die_at(point, folder)
        assert died.returncode == -signal.SIGKILL
        found = checkpoint.latest_valid(folder)
        assert found.checkpoint is not None
        assert not found.refused
        text = b"old " if found.checkpoint.step == 1 else b"new "
        names = {"a.bin", "b.bin", "manifest.json"}
        whole = content_of(found.checkpoint.path)
        assert set(whole) == names
        assert all(whole[name] == text * 100 for name in ("a.bin", "b.bin"))
        checkpoint.sweep(folder)
        assert all(
            p.name.startswith("checkpoint-") and ".tmp" not in p.name for p in folder.iterdir()
        )
        outcomes.add((found.checkpoint.step,))
    assert outcomes == {(1,), (2,)}


def _old(folder: Path) -> None:
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(b"old " * 100)


def test_dying_at_the_rename_leaves_the_old_one(tmp_path: Path) -> None:
    """The default tier's single point: everything is written, only the name is missing."""
    checkpoint.save(tmp_path / "checkpoint-1", _old)
    child = os.fork()
    if child == 0:
        os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        checkpoint.save(tmp_path / "checkpoint-2", _old)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = checkpoint.latest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert len(checkpoint.sweep(tmp_path)) == 1


def test_too_little_room_is_said_before_anything_is_written(run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(run / "checkpoint-40", writer("x"), needed=1 << 60)
    message = str(caught.value)
    assert str(run / "checkpoint-40") in message
    assert f"{1 << 60:,} bytes" in message
    assert sorted(p.name for p in run.iterdir()) == [f"checkpoint-{n}" for n in (10, 20, 30)]


def in_child(action: Callable[[], None]) -> str:
    """What the CheckpointError of ``action`` says, in a process whose limits may be changed."""
    reader, writer_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            text = "no error"
        except CheckpointError as error:
            text = str(error)
        except BaseException as error:
            text = repr(error)
        os.write(writer_end, text.encode())
        os._exit(0)
    os.close(writer_end)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as handle:
        return handle.read().decode()


def big(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(100_000, dtype=np.float32)}, folder / "weights.safetensors")


def test_a_quota_reached_in_the_middle_of_a_save_keeps_the_last_one(run: Path) -> None:
    def action() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        checkpoint.save(run / "checkpoint-40", big, needed=400_000)

    message = in_child(action)
    assert str(run / "checkpoint-40") in message
    assert "400,000 bytes" in message
    assert "earlier checkpoints are untouched" in message
    found = checkpoint.latest_valid(run)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 30
    assert not [p for p in run.iterdir() if ".tmp" in p.name]


def test_a_read_only_folder_keeps_the_last_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoint.save(folder / "checkpoint-1", _old)
    before = content_of(folder)

    def action() -> None:
        if os.geteuid() == 0:  # root may write anywhere
            os.chdir(folder)
            os.seteuid(65534)
            checkpoint.save(Path("checkpoint-2"), _old)
        else:
            checkpoint.save(folder / "checkpoint-2", _old)

    folder.chmod(0o555)
    try:
        message = in_child(action)
    finally:
        folder.chmod(0o755)
    assert "checkpoint-2: could not be saved (Permission denied)" in message
    assert content_of(folder) == before


class TwoRanks:
    """One rank of two as the other one sees it fail."""

    is_main = True

    def __init__(self, fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at

    def any(self, flag: bool) -> bool:
        self.calls += 1
        return flag or self.calls == self.fails_at

    def broadcast_text(self, text: str) -> str:
        return text


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failure_on_another_rank_fails_the_save_here(run: Path, fails_at: int) -> None:
    with pytest.raises(CheckpointError, match="another process could not write"):
        checkpoint.save(run / "checkpoint-40", writer("x"), ranks=TwoRanks(fails_at))
    assert not [p for p in run.iterdir() if ".tmp" in p.name]
