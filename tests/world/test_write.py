"""Writing: the same bytes for any number of workers, resumable, whole files only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans
from mmemo.world.preview import preview
from mmemo.world.render import WorldError, run_world
from tests.world.conftest import small

TINY = {"train_clips": 6, "val_clips": 6, "test_clips": 6}


def _content(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as file:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    with av.open(str(path)) as file:
        sound = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], axis=1)
    return frames, sound


def _files(folder: Path, pattern: str) -> dict[str, bytes]:
    found = sorted(folder.glob(pattern))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_clips_are_h264_and_aac_of_the_asked_form(world: Path) -> None:
    clips = sorted(world.glob("clips/*/*.mp4"))
    assert len(clips) == 36
    with av.open(str(clips[0])) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.average_rate) == (112, 112, 12)
        assert audio.rate == 16000
    frames, sound = _content(clips[0])
    assert len(frames) == 24
    assert abs(sound.shape[1] / 16000 - 2.0) < 0.1


def test_two_workers_write_the_same_world(world: Path, tmp_path: Path) -> None:
    run_world(small(tmp_path, workers=2))
    assert _files(world, "manifests/*.jsonl") == _files(tmp_path, "manifests/*.jsonl")
    assert len(_files(world, "manifests/*.jsonl")) == 11
    for path in sorted(world.glob("clips/*/*.mp4"))[::6]:
        one, other = _content(path), _content(tmp_path / path.relative_to(world))
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()


def test_another_seed_is_another_world() -> None:
    ours, theirs = (
        manifests(c, make_plans(c)) for c in (small(Path("x")), small(Path("x"), seed=1))
    )
    assert ours == manifests(small(Path("y")), make_plans(small(Path("y"))))
    assert all(ours[name] != theirs[name] for name in ours)


def test_whole_clips_are_kept_and_damaged_ones_made_again(tmp_path: Path) -> None:
    run_world(small(tmp_path, size=TINY))
    clips = sorted(tmp_path.glob("clips/*/*.mp4"))
    before = {path: path.read_bytes() for path in clips}
    times = {path: path.stat().st_mtime_ns for path in clips}
    clips[0].write_bytes(before[clips[0]][:500])
    clips[1].unlink()
    run_world(small(tmp_path, size=TINY))
    made = [path for path in clips if path.stat().st_mtime_ns != times[path]]
    assert made == clips[:2]
    assert {path: path.read_bytes() for path in clips} == before


def test_changed_noise_makes_clips_again(tmp_path: Path) -> None:
    run_world(small(tmp_path, size=TINY))
    before = _files(tmp_path, "clips/*/*.mp4")
    run_world(small(tmp_path, size=TINY, difficulty={"video_noise": 12.0}))
    after = _files(tmp_path, "clips/*/*.mp4")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def _start(folder: Path, workers: int = 1) -> subprocess.Popen[str]:
    """The small world, written by a process of its own (and its workers)."""
    code = (
        "import sys; from pathlib import Path; from tests.world.conftest import small\n"
        "from mmemo.errors import MmemoError; from mmemo.world.render import run_world\n"
        "if __name__ == '__main__':\n"
        "    try: run_world(small(Path(sys.argv[1]), workers=int(sys.argv[2])))\n"
        "    except MmemoError as error: sys.exit(str(error))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(workers)],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_clips(folder: Path, number: int) -> None:
    deadline = time.time() + 60
    while len(list(folder.glob("clips/*/*.mp4"))) < number and time.time() < deadline:
        time.sleep(0.02)


def _workers(parent: int) -> list[int]:
    """The processes that draw for ``parent``."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == parent and b"spawn_main" in command:
            found.append(int(path.name))
    return found


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _whole_world(folder: Path) -> dict[str, bytes]:
    return _files(folder, "manifests/*.jsonl") | _files(folder, "clips/*/*.mp4")


@pytest.mark.fault
def test_killed_run_goes_on(world: Path, tmp_path: Path) -> None:
    child = _start(tmp_path)
    _wait_for_clips(tmp_path, 5)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clips/*/*.mp4")}
    assert 5 <= len(done) < 36
    run_world(small(tmp_path))
    kept = [path for path, at in done.items() if path.stat().st_mtime_ns == at]
    assert len(kept) >= len(done) - 4
    assert _whole_world(world) == _whole_world(tmp_path)


@pytest.mark.fault
def test_a_killed_worker_ends_the_run_in_one_sentence(world: Path, tmp_path: Path) -> None:
    child = _start(tmp_path, workers=2)
    _wait_for_clips(tmp_path, 14)  # two workers with four clips each in hand: four are noted
    os.kill(_workers(child.pid)[0], signal.SIGKILL)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert said.count("\n") == 1
    assert "was killed, perhaps because memory ran out; run the same command again" in said
    noted = (tmp_path / "clips/index.jsonl").read_text().splitlines()
    done = {tmp_path / json.loads(line)["clip"] for line in noted}
    assert len(done) >= 4
    times = {path: path.stat().st_mtime_ns for path in done}
    run_world(small(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert _whole_world(world) == _whole_world(tmp_path)


@pytest.mark.fault
def test_workers_end_with_the_run_that_started_them(tmp_path: Path) -> None:
    child = _start(tmp_path, workers=2)
    _wait_for_clips(tmp_path, 3)
    workers = _workers(child.pid)
    assert len(workers) == 2
    child.kill()
    child.communicate()
    deadline = time.time() + 10
    while any(map(_alive, workers)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, workers))


@pytest.mark.fault
@pytest.mark.parametrize("clips", [0, 3])
def test_an_interrupt_stops_the_workers_at_once(tmp_path: Path, clips: int) -> None:
    child = _start(tmp_path, workers=2)
    _wait_for_clips(tmp_path, clips)
    while len(_workers(child.pid)) < 2:
        time.sleep(0.02)
    time.sleep(0.0 if clips else 0.4)  # without clips, they are importing now
    os.killpg(child.pid, signal.SIGINT)  # as a terminal sends it: to all
    _, said = child.communicate(timeout=30)
    assert said.count("Traceback") == 1  # the run's own; mmemo's command line prints a sentence
    assert len(list(tmp_path.glob("clips/*/*.mp4"))) < 36


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "sheet.png").mkdir()
    config = small(tmp_path / "file" / "world", size=TINY)
    with pytest.raises(WorldError, match=r"file.*Not a directory.*choose another output_dir"):
        run_world(config)
    with pytest.raises(WorldError, match=r"the contact sheet is a PNG; give a file name"):
        preview(config, tmp_path / "sheet.txt")
    for path in (tmp_path / "file/sheet.png", tmp_path / "sheet.png"):
        with pytest.raises(WorldError, match=r"sheet\.png: cannot be written .*give another file"):
            preview(config, path, rows=1)
    assert not (tmp_path / "sheet.txt").exists()


def test_preview_writes_a_picture(tmp_path: Path) -> None:
    path = preview(small(tmp_path), tmp_path / "sheets" / "world.png", rows=3)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 50_000
    assert not (tmp_path / "clips").exists()
