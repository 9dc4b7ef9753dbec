"""Renders the world: clips in worker processes, then the manifests.

A clip is written to a temporary file and renamed, then recorded in ``clips/index.jsonl`` with the
hashes of its plan and of its bytes. Clips whose record still matches are kept, so killed runs
resume where they stopped, and a changed config renders again only the clips that it changes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from mmemo import files
from mmemo.config import save_resolved
from mmemo.console import console, progress
from mmemo.content import sha256
from mmemo.errors import MmemoError
from mmemo.world import scene
from mmemo.world.config import WorldConfig
from mmemo.world.face import draw_clip
from mmemo.world.manifest import write_manifests
from mmemo.world.plan import ClipPlan, make_plans, plan_hash
from mmemo.world.voice import speak

_BATCH = 4  # clips per job of a worker


class WorldError(MmemoError):
    """The world cannot be written."""


def run_world(config: WorldConfig) -> Path:
    """Write the data set to ``config.output_dir`` and return that folder.

    Writes ``clips/{split}/NNNN.mp4``, ``manifests/*.jsonl`` and ``config.yaml``. The same config
    gives byte-identical manifests, whatever the number of workers.

    Raises:
        WorldError: the folder cannot be written, or a worker process was killed.
    """
    folder = Path(config.output_dir)
    try:
        _write_world(config, folder)
    except OSError as error:
        raise WorldError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); free "
            "space there or choose another output_dir"
        ) from error
    return folder


def _write_world(config: WorldConfig, folder: Path) -> None:
    plans = make_plans(config)
    every = [plan for listed in plans.values() for plan in listed]
    for split, listed in plans.items():
        if listed:
            (folder / "clips" / split).mkdir(parents=True, exist_ok=True)
    hashes = {plan.name: plan_hash(plan, config) for plan in every}
    kept = _kept(folder, hashes)
    todo = [plan for plan in every if plan.name not in kept]
    index = folder / "clips" / "index.jsonl"
    files.write_rows(index, kept.values())
    with (
        progress("world", len(every), done=len(kept), unit="clips") as bar,
        closing(_make(todo, config, folder)) as made,
    ):
        for name, digest in made:
            note = {"clip": name, "plan": hashes[name], "sha256": digest}
            files.append_rows(index, [note])
            bar.advance()
    counts = write_manifests(config, plans, folder)
    save_resolved(config, folder / "config.yaml")
    rows = ", ".join(f"{name} {count}" for name, count in counts.items())
    console.print(f"world: {len(every)} clips ({len(kept)} kept) in {folder}; rows: {rows}")


def render(plan: ClipPlan, config: WorldConfig) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Render one clip: frames (F, H, W, 3) uint8 RGB, and waveform (S,) in [-1, 1]."""
    form, knobs = config.media, config.difficulty
    voice = speak(plan, form.seconds, form.sample_rate)
    sound = scene.mix(voice, plan, form.sample_rate, knobs.audio_snr, knobs.music_snr)
    return draw_clip(plan, config), sound


def write_clip(plan: ClipPlan, config: WorldConfig, path: Path) -> str:
    """Render and encode one clip (H.264, AAC); returns the SHA-256 of the file."""
    frames, sound = render(plan, config)
    part = path.with_name(f".{path.name}.part")
    encode(part, frames, sound, config)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    part.rename(path)
    return digest


def encode(
    path: Path, frames: NDArray[np.uint8], sound: NDArray[np.float64], config: WorldConfig
) -> None:
    """Write an mp4 file, with one thread and fixed settings so that equal arrays give equal
    bytes."""
    form = config.media
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        options = {"preset": "veryfast", "crf": str(form.crf), "threads": "1", "bf": "0"}
        # x264's macroblock tree gives other bytes in about 1 of 30 encodings of the same frames,
        # and with other clips every later stage differs.
        options["x264-params"] = "mbtree=0"
        video: Any = file.add_stream("libx264", rate=form.fps, options=options)
        video.width = video.height = frames.shape[1]
        video.pix_fmt = "yuv420p"
        audio: Any = file.add_stream(
            "aac", rate=form.sample_rate, layout="mono", options={"aac_coder": "fast"}
        )
        audio.bit_rate = form.audio_bit_rate
        for image in frames:
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            file.mux(video.encode(picture))
        file.mux(video.encode())
        samples = np.clip(sound, -1, 1).astype(np.float32)[None]
        block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        block.sample_rate, block.time_base = form.sample_rate, Fraction(1, form.sample_rate)
        block.pts = 0
        file.mux(audio.encode(block))
        file.mux(audio.encode())


def _kept(folder: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Notes of the clips that are whole and still wanted, by name."""
    notes: dict[str, dict[str, str]] = {}
    for note in files.read_intact_rows(folder / "clips" / "index.jsonl"):
        clip = folder / note["clip"]
        wanted = hashes.get(note["clip"]) == note["plan"]
        if wanted and clip.is_file() and sha256(clip) == note["sha256"]:
            notes[note["clip"]] = note
    return notes


def _make(
    todo: list[ClipPlan], config: WorldConfig, folder: Path
) -> Generator[tuple[str, str], None, None]:
    """Name and digest of each clip, in order, as they are written."""
    workers = config.workers or len(os.sched_getaffinity(0))
    jobs = [(todo[at : at + _BATCH], config, folder) for at in range(0, len(todo), _BATCH)]
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield from _work(job)
        return
    context = multiprocessing.get_context("spawn")
    killed: BrokenProcessPool | None = None
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_attend) as pool:
        # The workers are started here, and inherit that Ctrl-C waits: it would end one that is
        # still importing with a traceback. In this process it is only put off.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = [pool.submit(_work, job) for job in jobs]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in futures:
                try:
                    yield from future.result()
                except BrokenProcessPool as error:  # later jobs may have finished nevertheless
                    killed = error
        finally:
            pool.shutdown(cancel_futures=True)
    if killed is not None:
        raise WorldError(
            f"{folder}: a worker process was killed, perhaps because memory ran out; run the same "
            "command again, which keeps the clips made so far (workers: 1 needs the least memory)"
        ) from killed


def _attend() -> None:
    """Worker initialiser: leave Ctrl-C to the parent, and exit when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(job: tuple[list[ClipPlan], WorldConfig, Path]) -> list[tuple[str, str]]:
    plans, config, folder = job
    return [(plan.name, write_clip(plan, config, folder / plan.name)) for plan in plans]
